"""FP8 with the block scales of DeepSeek-V3 (report, section 3.3.2): quantising, dequantising and plain products.

Activations and their gradients are scaled in tiles of 1 x 128, weights in blocks of 128 x 128; the weight's gradient
multiplies tiles of 128 x 1, which are 1 x 128 tiles of the transposed matrices. Products are summed in float32.

Shapes: T tokens, K inputs, N outputs, Tb = ceil(T/128), Kb = ceil(K/128), Nb = ceil(N/128). The last tile or block of a
dimension may be cut short. `dtype` is an FP8 format of `formats.FP8_MAX`.

The rule that makes bytes comparable between machines: a scale is the largest magnitude of its tile divided by the
format's maximum, at least 2**-126 (no subnormal scales: GPUs flush them), rounded up to a power of two if asked; values
are x / scale, rounded to nearest even; both divisions are IEEE float32. A tile of zeros has scale 1. A tile that holds
a NaN or an infinity becomes NaN as a whole, so that a diverged run is seen and not saturated away.
"""

import torch
from torch import Tensor

from .formats import BLOCK, E4M3, FP8_MAX, num_blocks, power_of_two_ceil, round_up
from .op import EXACT, Near, op

SMALLEST_SCALE = 2.0**-126
SCALE_ROWS = 4  # TMA reads 16 bytes: the columns of the M-major scales are padded to 4 floats

# Sums in float32 against float64 on the same FP8 inputs; bf16 outputs are rounded once.
PRODUCT = Near(f32=2e-6, bf16=4e-3)
DEQUANTIZED = Near(f32=1e-6, bf16=4e-3)
# Where silu differs in its last bit, a value half-way between two FP8 numbers may go to the other one.
REQUANTIZED = (Near(2e-2, 2e-2), Near(1e-5, 1e-5))


def fill_up(x: Tensor, dim: int) -> Tensor:
    """`x` with zeros behind it, so that whole blocks of 128 cover `dim`. (pad() branches on symbolic sizes.)"""
    shape = list(x.shape)
    shape[dim] = round_up(shape[dim], BLOCK) - shape[dim]
    return torch.cat([x, x.new_zeros(shape)], dim)


def spread(scale: Tensor, dim: int, size: int) -> Tensor:
    """Repeat each scale for the 128 elements of `dim` that it covers, `size` elements in all."""
    return scale.repeat_interleave(BLOCK, dim).narrow(dim, 0, size)


def scale_of(largest: Tensor, dtype: torch.dtype, power_of_two: bool) -> Tensor:
    """Scales f32 of tiles with these largest magnitudes f32: the rule of this module's docstring."""
    scale = (largest / FP8_MAX[dtype]).clamp_min(SMALLEST_SCALE)
    if power_of_two:
        scale = power_of_two_ceil(scale)
    scale = torch.where(largest > 0, scale, 1.0)
    return torch.where(largest.isfinite(), scale, torch.nan)


def to_fp8(scaled: Tensor, dtype: torch.dtype) -> Tensor:
    return scaled.clamp(-FP8_MAX[dtype], FP8_MAX[dtype]).to(dtype)


def m_major(scale: Tensor) -> Tensor:
    """The same scales [T, Kb] with strides (1, T rounded up to 4): the layout that Hopper's TMA wants."""
    T, Kb = scale.shape
    return torch.cat([scale.T, scale.new_zeros(Kb, round_up(T, SCALE_ROWS) - T)], 1).T[:T]


def _tiles(x: Tensor, dtype: torch.dtype, power_of_two: bool) -> tuple[Tensor, Tensor]:
    T, K = x.shape
    tiles = fill_up(x.float(), 1).view(T, num_blocks(K), BLOCK)
    scale = scale_of(tiles.abs().amax(-1), dtype, power_of_two)
    return to_fp8(tiles / scale[..., None], dtype).flatten(1)[:, :K].contiguous(), m_major(scale)


def _quantize_cost(x: Tensor, dtype: torch.dtype = E4M3, power_of_two: bool = False) -> tuple[int, int]:
    return 3 * x.numel(), x.nbytes + x.numel() + x.numel() // 32


def _quantize_both_cost(x: Tensor, dtype: torch.dtype = E4M3, power_of_two: bool = False) -> tuple[int, int]:
    return 6 * x.numel(), x.nbytes + 2 * x.numel() + x.numel() // 16


@op(shapes={"x": "T K"}, tolerance=EXACT, cost=_quantize_cost, quantized=True)
def quantize_tiles(x: Tensor, dtype: torch.dtype = E4M3, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Quantise activations: x [T, K] -> values [T, K] in dtype, scales [T, Kb] f32 M-major (`m_major`)."""
    return _tiles(x, dtype, power_of_two)


@op(shapes={"x": "T K"}, tolerance=EXACT, cost=_quantize_both_cost, quantized=True)
def quantize_tiles_both(
    x: Tensor, dtype: torch.dtype = E4M3, power_of_two: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantise x [T, K] along K and along T, reading it once: what a layer needs now and for its weight's gradient.

    -> values [T, K], scales [T, Kb], values of x^T [K, T], scales of x^T [K, Tb]; scales f32, M-major.
    """
    return *_tiles(x, dtype, power_of_two), *_tiles(x.T, dtype, power_of_two)


@op(shapes={"w": "E? N K"}, tolerance=EXACT, cost=_quantize_cost, quantized=True)
def quantize_blocks(w: Tensor, dtype: torch.dtype = E4M3, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Quantise a weight: w [N, K] or [E, N, K] -> values of that shape in dtype, scales [..., Nb, Kb] f32."""
    *experts, N, K = w.shape
    filled = fill_up(fill_up(w.float(), -1), -2)
    blocks = filled.view(*experts, num_blocks(N), BLOCK, num_blocks(K), BLOCK)
    scale = scale_of(blocks.abs().amax((-3, -1)), dtype, power_of_two)
    values = to_fp8(blocks / scale[..., :, None, :, None], dtype).view(filled.shape)
    return values[..., :N, :K].contiguous(), scale


def real_tiles(q: Tensor, s: Tensor) -> Tensor:
    """values [..., T, K] and scales [..., T, Kb] -> their product in the dtype of the scales."""
    return q.to(s.dtype) * spread(s, -1, q.shape[-1])


def real_blocks(q: Tensor, s: Tensor) -> Tensor:
    """values [..., N, K] and scales [..., Nb, Kb] -> their product in the dtype of the scales."""
    return q.to(s.dtype) * spread(spread(s, -2, q.shape[-2]), -1, q.shape[-1])


def _dequantize_cost(q: Tensor, s: Tensor, dtype: torch.dtype) -> tuple[int, int]:
    return q.numel(), q.numel() * (1 + dtype.itemsize) + s.nbytes


@op(shapes={"q": "T K", "s": "T K/128"}, tolerance=DEQUANTIZED, cost=_dequantize_cost)
def dequantize_tiles(q: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    """values [T, K] FP8, scales [T, Kb] f32 -> [T, K] in dtype. Exact in bf16 if the scales are powers of two."""
    return real_tiles(q, s).to(dtype)


@op(shapes={"q": "E? N K", "s": "E? N/128 K/128"}, tolerance=DEQUANTIZED, cost=_dequantize_cost)
def dequantize_blocks(q: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    """values [N, K] or [E, N, K] FP8, scales [..., Nb, Kb] f32 -> the weight in dtype: `weight * weight_scale_inv`."""
    return real_blocks(q, s).to(dtype)


def _fp8_gemm_cost(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, out_dtype: torch.dtype) -> tuple[int, int]:
    (T, K), N = a.shape, b.shape[0]
    return 2 * T * N * K, T * K + N * K + T * N * out_dtype.itemsize + sa.nbytes + sb.nbytes


@op(shapes={"a": "T K", "sa": "T K/128", "b": "N K", "sb": "N/128 K/128"}, tolerance=PRODUCT, cost=_fp8_gemm_cost)
def fp8_gemm(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Activations times a weight (Fprop; Dgrad with the weight transposed).

    a [T, K] FP8, sa [T, Kb] f32; b [N, K] FP8, sb [Nb, Kb] f32; any strides -> [T, N] out_dtype.
    """
    return (real_tiles(a, sa) @ real_blocks(b, sb).T).to(out_dtype)


def _fp8_wgrad_cost(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor) -> tuple[int, int]:
    (N, T), K = a.shape, b.shape[0]
    return 2 * T * N * K, T * K + N * T + 4 * N * K + sa.nbytes + sb.nbytes


@op(shapes={"a": "N T", "sa": "N T/128", "b": "K T", "sb": "K T/128"}, tolerance=PRODUCT, cost=_fp8_wgrad_cost)
def fp8_gemm_wgrad(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor) -> Tensor:
    """Gradient times activations, both in tiles along the tokens (Wgrad).

    a = grad^T [N, T] FP8, sa [N, Tb] f32; b = x^T [K, T] FP8, sb [K, Tb] f32 -> [N, K] f32.
    """
    return real_tiles(a, sa) @ real_tiles(b, sb).T


def _swiglu_quantize_cost(
    gate_up: Tensor, weight: Tensor | None = None, dtype: torch.dtype = E4M3, power_of_two: bool = False
) -> tuple[int, int]:
    outputs = gate_up.numel() // 2
    return 11 * outputs, gate_up.nbytes + outputs + outputs // 32


@op(shapes={"gate_up": "T 2*I", "weight": "T"}, tolerance=REQUANTIZED, cost=_swiglu_quantize_cost, quantized=True)
def swiglu_quantize(
    gate_up: Tensor, weight: Tensor | None = None, dtype: torch.dtype = E4M3, power_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    """SwiGLU into FP8 tiles without a rounding in between.

    gate_up [T, 2I], gate first; weight [T] f32, the routing weight of each row, or None
    -> values [T, I] of silu(gate) * up * weight in dtype, scales [T, Ib] f32 M-major.
    """
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, -1)
    hidden = torch.nn.functional.silu(gate) * up
    return _tiles(hidden if weight is None else hidden * weight[:, None], dtype, power_of_two)
