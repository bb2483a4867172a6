"""Products with FP8 weights: widened piece by piece, each row as if it were alone."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ...ops.formats import BLOCK, E4M3
from ...ops.fp8 import fp8_gemm, quantize_tiles, swiglu_quantize
from ...ops.grouped_fp8 import grouped_fp8_gemm, masked_fp8_gemm
from ..cpu.fp8 import real_blocks, real_tiles
from ..cpu.gemm import segments
from . import NAME
from .elementwise import gated
from .products import piece_rows, product_with


def _pieces(b: Tensor, sb: Tensor) -> Iterator[Tensor]:
    """A weight [N, K] FP8 with scales [Nb, Kb] -> float32 [n, K] at a time, whole blocks of 128 rows."""
    rows = piece_rows(b.shape[1])
    for start in range(0, b.shape[0], rows):
        yield real_blocks(b[start : start + rows], sb[start // BLOCK : (start + rows) // BLOCK])


@fp8_gemm.kernel(NAME, "tiles", checked="hardware")
def fp8_gemm_tiles(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, out_dtype: torch.dtype) -> Tensor:
    return product_with(real_tiles(a, sa), _pieces(b, sb)).to(out_dtype)


@grouped_fp8_gemm.kernel(NAME, "tiles", checked="hardware")
def grouped_fp8_gemm_tiles(
    a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, offsets: Tensor, out_dtype: torch.dtype
) -> Tensor:
    out = a.new_zeros(len(a), b.shape[1], dtype=out_dtype)
    real = real_tiles(a, sa)
    for expert, rows in segments(offsets):
        out[rows] = product_with(real[rows], _pieces(b[expert], sb[expert])).to(out_dtype)
    return out


@masked_fp8_gemm.kernel(NAME, "tiles", checked="hardware")
def masked_fp8_gemm_tiles(
    a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, counts: Tensor, out_dtype: torch.dtype
) -> Tensor:
    out = a.new_zeros(*a.shape[:2], b.shape[1], dtype=out_dtype)
    for expert, count in enumerate(counts.tolist()):
        if count:
            real = real_tiles(a[expert, :count], sa[expert, :count])
            out[expert, :count] = product_with(real, _pieces(b[expert], sb[expert])).to(out_dtype)
    return out


@swiglu_quantize.kernel(NAME, "rows", checked="hardware")
def swiglu_quantize_rows(
    gate_up: Tensor, weight: Tensor | None = None, dtype: torch.dtype = E4M3, power_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    values, scales = quantize_tiles(gated(gate_up, weight), dtype, power_of_two)
    return values, scales
