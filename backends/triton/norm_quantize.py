"""RMS norms into FP8: a row is read once, lies in registers, and leaves them as tiles, and as it is where wanted.
The norm is that of `norms`, rounding for rounding, and the tiles are those of `quantize`."""

import torch
import triton.language as tl
from torch import Tensor

from ...ops.formats import num_blocks
from ...ops.norm_quantize import add_rms_norm_quantize, rms_norm_quantize
from .fp8_bits import as_fp8
from .norms import fits, normed, read_rows
from .operands import by_rows
from .quantize import SIDE, format_of, knows, quantized, scales_like, storage
from .runtime import gpu_kernel, kernel, launch, power_of_two
from .tables import tile


@kernel
def norm_quantize_kernel(
    x, residual, w, out, total, q, s, N, D, x_row, residual_row, s_column, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, FP8_LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    DECODE: tl.constexpr,
):  # fmt: skip
    """x [N, D], residual [N, D] or None, w [D] -> q [N, D], s [N, Db] M-major; out [N, D], the norm itself, or None;
    total [N, D] = x + residual where there is one. BLOCK: a power of two of whole tiles."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < N)[:, None] & (column < D)[None, :]
    values = normed(read_rows(x, residual, total, row, column, mask, D, x_row, residual_row), w, column, D, eps, x)
    if out is not None:
        tl.store(out + row[:, None] * D + column[None, :], values, mask=mask)
    TILES: tl.constexpr = BLOCK // SIDE
    scaled, scale = quantized(tl.reshape(values.to(tl.float32), (ROWS * TILES, SIDE)), 1, FP8_LARGEST, POWER_OF_TWO)
    narrow = tl.reshape(as_fp8(scaled, q, DECODE), (ROWS, BLOCK))
    tl.store(q + row[:, None] * D + column[None, :], narrow, mask=mask)
    side = tl.arange(0, TILES)
    place = s + side.to(tl.int64)[None, :] * s_column + row[:, None]
    tl.store(place, tl.reshape(scale, (ROWS, TILES)), mask=(row < N)[:, None] & (side * SIDE < D)[None, :])


# Launchers -----------------------------------------------------------------------------------------------------------


def _quantized(
    x: Tensor, residual: Tensor | None, w: Tensor, eps: float, dtype: torch.dtype, power: bool
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    rows, more = by_rows(x), None if residual is None else by_rows(residual)
    N, D = x.shape
    out, total = (None, None) if residual is None else (x.new_empty(N, D), x.new_empty(N, D))
    q, s = x.new_empty(N, D, dtype=dtype), scales_like(x, N, num_blocks(D))
    shape = tile("norm_quantize", N=N, D=D)
    launch(
        norm_quantize_kernel, (-(-N // shape["ROWS"]),), rows, more, w.contiguous(), out, total, storage(q)[0], s, N, D,
        rows.stride(0), 0 if more is None else more.stride(0), s.stride(1), eps, BLOCK=power_of_two(D, int(SIDE)),
        **format_of(dtype, power), **shape,
    )  # fmt: skip
    return out, total, q, s


@gpu_kernel(rms_norm_quantize, lambda x, w, eps, dtype, power_of_two: fits(x, w) and knows(dtype))
def rms_norm_quantize_triton(
    x: Tensor, w: Tensor, eps: float, dtype: torch.dtype, power_of_two: bool
) -> tuple[Tensor, Tensor]:
    return _quantized(x, None, w, eps, dtype, power_of_two)[2:]


def _takes(x: Tensor, residual: Tensor, w: Tensor, eps: float, dtype: torch.dtype, power_of_two: bool) -> bool:
    return fits(x, w) and residual.dtype == x.dtype and knows(dtype)


@gpu_kernel(add_rms_norm_quantize, _takes)
def add_rms_norm_quantize_triton(
    x: Tensor, residual: Tensor, w: Tensor, eps: float, dtype: torch.dtype, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, total, q, s = _quantized(x, residual, w, eps, dtype, power_of_two)
    assert out is not None and total is not None
    return out, total, q, s
