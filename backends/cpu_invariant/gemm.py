"""Products with real-valued weights, each row as if it were alone."""

from torch import Tensor

from ...ops.gemm import batched_gemm, gemm, grouped_gemm, masked_gemm
from ..cpu.gemm import is_plain, segments
from . import NAME
from .products import batched_product, product


@gemm.kernel(NAME, "tiles", supports=is_plain, checked="hardware")
def gemm_tiles(a: Tensor, b: Tensor, layout: str = "plain") -> Tensor:
    return product(a, b)


@grouped_gemm.kernel(
    NAME, "tiles", supports=lambda a, b, offsets, layout="plain": layout == "plain", checked="hardware"
)
def grouped_gemm_tiles(a: Tensor, b: Tensor, offsets: Tensor, layout: str = "plain") -> Tensor:
    out = a.new_zeros(len(a), b.shape[1])
    for expert, rows in segments(offsets):
        out[rows] = product(a[rows], b[expert])
    return out


@masked_gemm.kernel(NAME, "tiles", checked="hardware")
def masked_gemm_tiles(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    out = a.new_zeros(*a.shape[:2], b.shape[1])
    for expert, count in enumerate(counts.tolist()):
        if count:
            out[expert, :count] = product(a[expert, :count], b[expert])
    return out


@batched_gemm.kernel(NAME, "tiles", checked="hardware")
def batched_gemm_tiles(a: Tensor, b: Tensor) -> Tensor:
    return batched_product(a, b) if b.numel() and a.numel() else a.new_zeros(*a.shape[:2], b.shape[1])
