"""A norm and its quantisation on the CPU: one after the other, each by its own kernel. Both leave the row in the cache;
what is saved is the quantisation for every further reader, and that is the op's."""

import torch
from torch import Tensor

from ...ops.fp8 import quantize_tiles
from ...ops.general import add_rms_norm, rms_norm
from ...ops.norm_quantize import add_rms_norm_quantize, rms_norm_quantize


@rms_norm_quantize.kernel("cpu", "torch")
def rms_norm_quantize_torch(
    x: Tensor, w: Tensor, eps: float, dtype: torch.dtype, power_of_two: bool
) -> tuple[Tensor, Tensor]:
    values, scales = quantize_tiles(rms_norm(x, w, eps), dtype, power_of_two)
    return values, scales


@add_rms_norm_quantize.kernel("cpu", "torch")
def add_rms_norm_quantize_torch(
    x: Tensor, residual: Tensor, w: Tensor, eps: float, dtype: torch.dtype, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    normed, total = add_rms_norm(x, residual, w, eps)
    return normed, total, *quantize_tiles(normed, dtype, power_of_two)
