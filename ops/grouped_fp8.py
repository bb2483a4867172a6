"""FP8 products of experts: rows sorted by expert, rows with fixed capacity, and the gradient of the experts' weights.

Shapes and formats as in `fp8`; R routed rows, E experts, C rows of capacity per expert, Rb = ceil(R/128).
"""

import torch
from torch import Tensor

from .fp8 import PRODUCT, real_blocks, real_tiles
from .gemm import in_segment, in_use
from .op import op


def _grouped_cost(
    a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, offsets: Tensor, out_dtype: torch.dtype
) -> tuple[int, int]:
    (R, K), N = a.shape, b.shape[1]
    return 2 * R * N * K, R * K + b.numel() + R * N * out_dtype.itemsize + sa.nbytes + sb.nbytes


def _grouped_fake(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, offsets: Tensor, out_dtype: torch.dtype) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=out_dtype)


@op(
    shapes={"a": "R K", "sa": "R K/128", "b": "E N K", "sb": "E N/128 K/128", "offsets": "E+1"},
    tolerance=PRODUCT,
    cost=_grouped_cost,
    fake=_grouped_fake,
)
def grouped_fp8_gemm(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, offsets: Tensor, out_dtype: torch.dtype) -> Tensor:
    """A linear layer of every expert, on rows that are sorted by expert.

    a [R, K] FP8, sa [R, Kb] f32; b [E, N, K] FP8, sb [E, Nb, Kb] f32; offsets i32 [E + 1] with offsets[0] = 0: expert e
    computes the rows offsets[e] to offsets[e + 1] -> [R, N] out_dtype. Rows from offsets[E] on come out as 0.
    GPU kernels want the segments to start at multiples of 128 (`permute` with align 128); the result does not need it.
    """
    real = real_tiles(a, sa)
    out = real.new_zeros(a.shape[0], b.shape[1])
    for expert in range(b.shape[0]):
        product = real @ real_blocks(b[expert], sb[expert]).T
        out = torch.where(in_segment(offsets, expert, a.shape[0]), product, out)
    return out.to(out_dtype)


def _masked_cost(
    a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, counts: Tensor, out_dtype: torch.dtype
) -> tuple[int, int]:
    (E, C, K), N = a.shape, b.shape[1]
    return 2 * E * C * N * K, a.numel() + b.numel() + E * C * N * out_dtype.itemsize + sa.nbytes + sb.nbytes


@op(
    shapes={"a": "E C K", "sa": "E C K/128", "b": "E N K", "sb": "E N/128 K/128", "counts": "E"},
    tolerance=PRODUCT,
    cost=_masked_cost,
)
def masked_fp8_gemm(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, counts: Tensor, out_dtype: torch.dtype) -> Tensor:
    """A linear layer of every expert, each with its own C rows of which the first counts[e] hold tokens (decoding).

    a [E, C, K] FP8, sa [E, C, Kb] f32; b [E, N, K] FP8, sb [E, Nb, Kb] f32; counts i32 [E] -> [E, C, N] out_dtype; rows
    from counts[e] on come out as 0.
    """
    out = real_tiles(a, sa) @ real_blocks(b, sb).transpose(1, 2)
    return torch.where(in_use(counts, a.shape[1]), out, 0.0).to(out_dtype)


def _wgrad_cost(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, offsets: Tensor) -> tuple[int, int]:
    (N, R), K, E = a.shape, b.shape[0], offsets.shape[0] - 1
    return 2 * R * N * K, R * (N + K) + 4 * E * N * K + sa.nbytes + sb.nbytes


def _wgrad_fake(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, offsets: Tensor) -> Tensor:
    return sa.new_empty(offsets.shape[0] - 1, a.shape[0], b.shape[0])


@op(
    shapes={"a": "N R", "sa": "N R/128", "b": "K R", "sb": "K R/128", "offsets": "E+1"},
    tolerance=PRODUCT,
    cost=_wgrad_cost,
    fake=_wgrad_fake,
)
def grouped_fp8_wgrad(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, offsets: Tensor) -> Tensor:
    """Gradient of the experts' weights: gradient times activations, segment by segment, in tiles along the rows.

    a = grad^T [N, R] FP8, sa [N, Rb] f32; b = x^T [K, R] FP8, sb [K, Rb] f32 (both from `quantize_tiles_both`); offsets
    i32 [E + 1] -> [E, N, K] f32, 0 for an expert without rows. Rows from offsets[E] on are not used.
    """
    experts = []
    real_a, real_b = real_tiles(a, sa), real_tiles(b, sb)
    for expert in range(offsets.shape[0] - 1):
        mine = in_segment(offsets, expert, a.shape[1]).T
        experts.append(torch.where(mine, real_a, 0.0) @ torch.where(mine, real_b, 0.0).T)
    return torch.stack(experts)
