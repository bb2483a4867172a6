"""RMS norm and quantisation in one op, for inference with FP8 weights: what a norm's readers multiply is made once.

The specification is the composition, `quantize_tiles(rms_norm(x))`, byte for byte: the norm is rounded to x's dtype
before it is weighted and again after, and only then divided by the scale of its tile. There is no gradient: training
keeps real rows.

Two ops, by who reads the norm. Behind `rms_norm_quantize` there are FP8 products alone (attention's input, the query's
latent): the real row is never written. Behind `add_rms_norm_quantize` there is an expert layer: gate and dispatcher
read the real row, the shared expert the quantised one. The few dense layers of a model (3 of V3's 61) get a row there
that they do not read, and need no third op for it.

Shapes: T tokens, D hidden size, Db = ceil(D/128). Formats and scales as in `fp8`.
"""

import torch
from torch import Tensor

from .fp8 import quantize_tiles
from .general import add_rms_norm, rms_norm
from .op import Near, op

# A sum in another order may round the norm to its other neighbour, and that one to another FP8 number.
VALUES, SCALES = Near(2e-2, 2e-2), Near(1e-5, 8e-3)


def _cost(x: Tensor, w: Tensor, eps: float, dtype: torch.dtype, power_of_two: bool) -> tuple[int, int]:
    return 7 * x.numel(), x.nbytes + w.nbytes + x.numel() + x.numel() // 32


@op(shapes={"x": "T D", "w": "D"}, tolerance=(VALUES, SCALES), cost=_cost, quantized=True, rounds=True)
def rms_norm_quantize(
    x: Tensor, w: Tensor, eps: float, dtype: torch.dtype, power_of_two: bool
) -> tuple[Tensor, Tensor]:
    """x [T, D], w [D] -> rms_norm(x, w, eps) as values [T, D] in the FP8 format dtype, scales [T, Db] f32 M-major."""
    return quantize_tiles.spec(rms_norm.spec(x, w, eps), dtype, power_of_two)


def _adding_cost(
    x: Tensor, residual: Tensor, w: Tensor, eps: float, dtype: torch.dtype, power_of_two: bool
) -> tuple[int, int]:
    flops, moved = _cost(x, w, eps, dtype, power_of_two)
    return flops + x.numel(), moved + 3 * x.nbytes


@op(
    shapes={"x": "T D", "residual": "T D", "w": "D"},
    tolerance=(Near(1e-6, 8e-3), 1e-6, VALUES, SCALES),
    cost=_adding_cost,
    quantized=True,
    rounds=True,
)
def add_rms_norm_quantize(
    x: Tensor, residual: Tensor, w: Tensor, eps: float, dtype: torch.dtype, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A residual sum, and its norm both as it is and quantised.

    x, residual [T, D], w [D] -> (rms_norm(x + residual) [T, D], x + residual [T, D], values [T, D] of the former in
    the FP8 format dtype, their scales [T, Db] f32 M-major).
    """
    normed, total = add_rms_norm.spec(x, residual, w, eps)
    return normed, total, *quantize_tiles.spec(normed, dtype, power_of_two)
