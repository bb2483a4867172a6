"""Products in tiles of fixed heights, so that a row's result does not depend on how many rows come with it.

A library picks its kernel by the sizes of a product, and kernels differ in the order in which they sum: a row alone and
the same row among eight come out differently in their last bits. So rows are multiplied in tiles of few heights, filled
up with zeros, and for each shape of a weight those heights are used that agree: with random numbers in every place of
every tile it is checked once per process that a row's result is bitwise that of a tile of 32, wherever it stands. Other
rows cannot enter a row's sums, so place and height are all that there is to check. Where the tile of 32 itself depends
on the place, rows are multiplied one by one.

The check sees an order of summation through results that are nothing but rounding: half of the columns of its weight
cancel the row's first half with its second, so that other orders give other numbers, in bfloat16 too.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

HEIGHTS = (1, 2, 4, 8, 16, 32, 128)
REFERENCE = 32  # the height that others are held to
ALIGNED = 64  # bytes; libraries may choose by alignment, so a tile begins where fresh memory does

# a [..., M, K], b [..., N, K] -> a b^T [..., M, N]
Multiply = Callable[[Tensor, Tensor], Tensor]


@cache
def agreeing_heights(
    multiply: Multiply, shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, offset: int, threads: int
) -> tuple[int, ...]:
    """The heights, ascending, whose tiles give a row the same result, for weights [..., N, K] of this kind."""
    weight, row = _trial(shape, strides, dtype, offset)
    results = {height: multiply(repeated(row, height), weight) for height in HEIGHTS}
    wanted = results[REFERENCE][..., :1, :]
    agree = tuple(height for height, result in results.items() if bool((result == wanted).all()))
    return agree if REFERENCE in agree else (1,)


def _trial(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, offset: int) -> tuple[Tensor, Tensor]:
    """A weight [..., N, K] in the given memory layout and a row [..., 1, K]; see the module's docstring."""
    generator = torch.Generator().manual_seed(0)
    N, K = shape[-2:]
    real = torch.float64 if dtype == torch.float64 else torch.float32
    values = torch.rand(shape, generator=generator, dtype=real).sub_(0.5)
    row = torch.rand((*shape[:-2], 1, K), generator=generator, dtype=real).sub_(0.5)
    half, columns = K // 2, slice(0, N // 2)
    values[..., columns, half : 2 * half] = -values[..., columns, :half]
    row[..., half : 2 * half] = row[..., :half]
    skipped = offset // dtype.itemsize
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    memory = torch.empty(skipped + extent, dtype=dtype)
    weight = memory.as_strided(shape, strides, skipped)
    weight.copy_(values)
    return weight, row.to(dtype)


def repeated(row: Tensor, height: int) -> Tensor:
    """row [..., 1, K] -> [..., height, K]."""
    return row.expand(*row.shape[:-2], height, row.shape[-1]).contiguous()


def in_tiles(multiply: Multiply, a: Tensor, b: Tensor) -> Tensor:
    """a [..., M, K], b [..., N, K] of one dtype -> multiply(a, b) [..., M, N], each row as if it were the only one."""
    offset, threads = b.data_ptr() % ALIGNED, torch.get_num_threads()
    heights = agreeing_heights(multiply, b.shape, b.stride(), b.dtype, offset, threads)
    results, start, M = [], 0, a.shape[-2]
    while start < M:
        height = _next_height(heights, M - start)
        result = multiply(_tile(a, start, height), b)
        results.append(result[..., : M - start, :])
        start += height
    if not results:
        return a.new_empty(*a.shape[:-1], b.shape[-2])
    return results[0].contiguous() if len(results) == 1 else torch.cat(results, -2)


def _next_height(heights: tuple[int, ...], rows: int) -> int:
    """For the next tile of `rows` that are left: one that takes all where it is not half empty, else a smaller one."""
    enough = [height for height in heights if height >= rows]
    smaller = [height for height in heights if height < rows]
    return enough[0] if enough and (enough[0] <= 2 * rows or not smaller) else smaller[-1]


def _tile(a: Tensor, start: int, height: int) -> Tensor:
    """Rows `start` to `start + height` of a, contiguous and aligned, with zeros where there are fewer."""
    rows = a[..., start : start + height, :]
    if rows.shape[-2] == height and rows.is_contiguous() and rows.data_ptr() % ALIGNED == 0:
        return rows
    tile = a.new_zeros(*a.shape[:-2], height, a.shape[-1])
    tile[..., : rows.shape[-2], :] = rows
    return tile
