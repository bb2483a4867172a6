"""RMSNorm, alone and with the residual stream, for readers that want its result as it is or in FP8.

A reader is a product that multiplies the norm's result. Where all readers hold FP8 weights of one format, the norm
quantises for them, once: with the same bytes that each would have made by itself. For a gradient, results stay real.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops.general import add_rms_norm, rms_norm
from ..ops.norm_quantize import add_rms_norm_quantize, rms_norm_quantize
from ..ops.weight import Quantized
from .linear import Linear

LATENT_NORM_EPS = 1e-6  # of the norms on the query and key-value latents, whatever rms_norm_eps says


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32."""

    def __init__(
        self, size: int, eps: float, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size, device=device, dtype=dtype)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def for_readers(self, x: Tensor, readers: Sequence[Linear]) -> Tensor | Quantized:
        """x [T, D] normed, as its `readers` want it; nobody else may read it."""
        fp8 = self._fp8_for(readers, x)
        if fp8 is None:
            return rms_norm(x, self.weight, self.eps)
        values, scales = rms_norm_quantize(x, self.weight, self.eps, *fp8)
        return Quantized(values, scales, x.dtype)

    def after_adding(
        self, x: Tensor, residual: Tensor, readers: Sequence[Linear]
    ) -> tuple[Tensor, Tensor | Quantized, Tensor]:
        """x, residual [T, D] -> (norm(x + residual), the same as its `readers` want it, x + residual)."""
        fp8 = self._fp8_for(readers, x, residual)
        if fp8 is None:
            normed, total = add_rms_norm(x, residual, self.weight, self.eps)
            return normed, normed, total
        normed, total, values, scales = add_rms_norm_quantize(x, residual, self.weight, self.eps, *fp8)
        return normed, Quantized(values, scales, x.dtype), total

    def _fp8_for(self, readers: Sequence[Linear], *inputs: Tensor) -> tuple[torch.dtype, bool] | None:
        """The FP8 format of all readers, and whether scales are powers of two; None where rows stay real."""
        if not readers:
            return None
        fp8 = readers[0].fp8_input(inputs[0])
        if fp8 is None or any(reader.fp8_input(inputs[0]) != fp8 for reader in readers[1:]):
            return None
        wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (self.weight, *inputs))
        return None if wanted else fp8
