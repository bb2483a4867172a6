"""Launching a product: which of the two kernels, with which tiles, on which view of the operands."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...ops.formats import BLOCK
from .grid import splits_of
from .operands import by_rows
from .product_kernels import (
    persistent_product_kernel,
    product_kernel,
    sum_splits_kernel,
    transpose_kernel,
    widen_kernel,
)
from .quantize import storage
from .runtime import launch, power_of_two
from .tables import tile
from .target import current_target

ALIGNMENT = 16  # bytes: where memory and rows of a tensor descriptor begin
# Rows of an expert from which on a copy of its FP8 weight, transposed or decoded to 16 bits, costs less than doing that
# while multiplying.
MANY_ROWS = 256

Scales = tuple[Tensor, Tensor]


def cdiv(size: int, by: int) -> int:
    return -(-size // by)


def has_aligned_rows(x: Tensor) -> bool:
    """Can a tensor descriptor read x [.., rows, columns]?"""
    *steps, along_row = x.stride()
    aligned = not any(step * x.element_size() % ALIGNMENT for step in (x.storage_offset(), *steps))
    return along_row == 1 and 0 not in steps and aligned


def with_aligned_rows(x: Tensor) -> Tensor:
    """FP8 x [rows, columns] with as many zeros behind its rows as align them; itself where they are."""
    if has_aligned_rows(x):
        return x
    return pad(x.view(torch.uint8), (0, -x.shape[1] % ALIGNMENT)).view(x.dtype)


def transposed(b: Tensor) -> Tensor:
    """FP8 b [E, N, K] that is stored as [E, K, N] -> a copy in the order of its shape."""
    stored, out = b.mT.view(torch.uint8), b.new_empty(b.shape)
    experts, K, N = stored.shape
    shape = tile("transpose")
    grid = cdiv(K, shape["SIDE"]), cdiv(N, shape["SIDE"]), experts
    launch(
        transpose_kernel, grid, stored, out.view(torch.uint8), K, N, stored.stride(0), stored.stride(1), **shape
    )  # fmt: skip
    return out


def widened(x: Tensor) -> Tensor:
    """FP8 that the chip does not multiply -> the same numbers in float16, exact, stored in the same order."""
    if not (x.is_contiguous() or x.mT.is_contiguous()):
        x = x.contiguous()
    out, shape = torch.empty_like(x, dtype=torch.float16), tile("widen")
    grid = (cdiv(x.numel(), shape["BLOCK"]),)
    launch(widen_kernel, grid, x.view(torch.uint8), out, x.numel(), **shape)
    return out


def multiply(
    kernel: str,
    a: Tensor,
    b: Tensor,
    out_dtype: torch.dtype,
    scales: Scales | None = None,
    bounds: Tensor | None = None,
    capacity: int = 0,
) -> Tensor:
    """a [R, K], b [E, N, K] of any strides -> [R, N] out_dtype, with the tiles that tables/ has for `kernel`.

    scales: sa [R, Kb], and sb [E, Nb, Kb] or, where the rows of b have their own, [1, N, Kb].
    bounds i32: of the sorted rows of each expert [E + 1], or, with a capacity, how many it uses of so many rows [E].
    """
    R, (experts, N, _) = a.shape[0], b.shape
    rows = capacity or (R if bounds is None else cdiv(R, experts))  # of an expert, roughly
    a = by_rows(a)
    if scales is not None and rows >= MANY_ROWS and not capacity:
        if a.dtype != current_target().fp8:
            kernel, a, b = f"{kernel}_widened", widened(a), widened(b)
        elif b.stride(2) != 1 and b.stride(1) == 1:
            b = transposed(b)
    out = a.new_empty(R, N, dtype=out_dtype)
    if not a.numel():  # no rows, or a sum of nothing
        return out.zero_()
    shape = tile(kernel, rows=rows, N=N)
    # Matrix units take FP8 along K only, and wider numbers in either order.
    stored = b if b.stride(2) == 1 or b.element_size() == 1 else b.mT
    if shape["DESCRIPTORS"] and not capacity and all(map(has_aligned_rows, (a, stored, out))):
        _persistent(shape, a, b, stored, scales, bounds, out)
        return out
    if shape["DESCRIPTORS"] or stored.stride(2) != 1:
        shape = tile(f"{kernel}_strided", rows=rows, N=N)
    _by_pointers(shape, a, b, scales, bounds, capacity, out)
    return out


def _scaling(scales: Scales | None, N: int) -> dict[str, Any]:
    """What both kernels take about scales."""
    if scales is None:
        return {"SCALES": "none", "sa_row": 0, "sa_block": 0, "sb_expert": 0, "sb_row": 0, "sb_block": 0}
    sa, sb = scales
    steps = dict(zip(("sa_row", "sa_block", "sb_expert", "sb_row", "sb_block"), sa.stride() + sb.stride(), strict=True))
    return {"SCALES": "blocks" if sb.shape[1] == cdiv(N, BLOCK) else "rows", **steps}


def _persistent(
    shape: dict[str, Any], a: Tensor, b: Tensor, stored: Tensor, scales: Scales | None, bounds: Tensor | None,
    out: Tensor,
) -> None:  # fmt: skip
    (R, K), (experts, N, _) = a.shape, b.shape
    tiles = dict(shape)
    programs = current_target().units * tiles.pop("PER_UNIT")
    del tiles["DESCRIPTORS"]
    tiles_m = cdiv(R, tiles["BM"]) if bounds is None else R // tiles["BM"] + experts
    grid = (min(programs, tiles_m * cdiv(N, tiles["BN"] + tiles["EXTRA"])),)
    sa, sb = scales or (None, None)
    launch(
        persistent_product_kernel, grid, a, sa, stored, sb, out, bounds, R, N, K, experts,
        a.stride(0), stored.stride(0), stored.stride(1), **_scaling(scales, N),
        PROGRAMS=programs, EXPERTS=power_of_two(experts), TRANSPOSED=stored is not b,
        enable_fp_fusion=True, **tiles,
    )  # fmt: skip


def _by_pointers(
    shape: dict[str, Any], a: Tensor, b: Tensor, scales: Scales | None, bounds: Tensor | None, capacity: int,
    out: Tensor,
) -> None:  # fmt: skip
    (R, K), (experts, N, _) = a.shape, b.shape
    tiles = dict(shape)
    most = tiles.pop("SPLITS")
    del tiles["DESCRIPTORS"]
    if bounds is None:
        tiles_m = cdiv(R, tiles["BM"])
    else:
        tiles_m = experts * cdiv(capacity, tiles["BM"]) if capacity else R // tiles["BM"] + experts + 1
    programs = tiles_m * cdiv(N, tiles["BN"])
    splits = splits_of(programs, cdiv(K, tiles["BK"]), current_target().units, most, R) if most > 1 else 1
    to = out if splits == 1 else out.new_empty(splits, R, N, dtype=torch.float32)
    decode = False
    if a.element_size() == 1:
        (a, decode), (b, _) = storage(a), storage(b)
    sa, sb = scales or (None, None)
    launch(
        product_kernel, (programs, splits), a, sa, b, sb, to, bounds, R, N, K, experts, capacity, splits,
        a.stride(0), *b.stride(), **_scaling(scales, N), EXPERTS=0 if capacity else power_of_two(experts + 1),
        DECODE=decode, EVEN=K % tiles["BK"] == 0, ACROSS=b.stride(1) == 1 != b.stride(2),
        enable_fp_fusion=True, **tiles,
    )  # fmt: skip
    if splits > 1:
        shape = tile("sum_splits")
        grid = (cdiv(out.numel(), shape["BLOCK"]),)
        launch(sum_splits_kernel, grid, to, out, out.numel(), SPLITS=splits, **shape)
