"""The one seam through which weights reach the matrix products.

A weight may be plain (float32, bfloat16), FP8 with block scales, or packed into the layout that some kernel of the
active backend wants. Core says `linear(x, weight)` and `grouped_linear(x, weight, offsets)` and never asks which.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .fp8 import fp8_gemm, quantize_tiles
from .gemm import gemm, grouped_gemm, masked_gemm
from .grouped_fp8 import grouped_fp8_gemm, masked_fp8_gemm
from .op import Op, active_backend

Format = Literal["plain", "fp8", "fp8_ue8m0"]


@dataclass(frozen=True)
class Weight:
    """A matrix [N, K], or one per expert [E, N, K].

    scale: f32 [..., ceil(N/128), ceil(K/128)] for the FP8 formats, else None.
    format: "plain"; "fp8" (scales of any value); "fp8_ue8m0" (power-of-two scales, the activations' too: V3.1).
    layout: "plain", or the name that a kernel's `pack` gave it.
    """

    data: Tensor
    scale: Tensor | None = None
    format: Format = "plain"
    layout: str = "plain"


@dataclass(frozen=True)
class Quantized:
    """Activations [T, K], quantised once for all products that read them. Made where no gradient is wanted.

    values [T, K] in the FP8 format of the weights that they meet, scales f32 [T, ceil(K/128)] M-major; dtype: what they
    were, and what the products come out in.
    """

    values: Tensor
    scales: Tensor
    dtype: torch.dtype
    requires_grad: ClassVar[bool] = False


def linear(x: Tensor | Quantized, weight: Weight) -> Tensor:
    """x [..., K] -> [..., N] in x's dtype. FP8 weights meet activations in tiles of 1 x 128, made here or before."""
    if isinstance(x, Quantized):
        assert weight.scale is not None
        return fp8_gemm(x.values, x.scales, weight.data, weight.scale, x.dtype)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if weight.scale is None:
        y = gemm(rows, weight.data, weight.layout)
    else:
        values, scales = quantize_tiles(rows, weight.data.dtype, weight.format == "fp8_ue8m0")
        y = fp8_gemm(values, scales, weight.data, weight.scale, x.dtype)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def grouped_linear(x: Tensor, weight: Weight, offsets: Tensor) -> Tensor:
    """x [R, K], rows of expert e from offsets[e] to offsets[e + 1] -> [R, N]; rows behind the last are 0."""
    if weight.scale is None:
        return grouped_gemm(x, weight.data, offsets, weight.layout)
    values, scales = quantize_tiles(x, weight.data.dtype, weight.format == "fp8_ue8m0")
    return grouped_fp8_gemm(values, scales, weight.data, weight.scale, offsets, x.dtype)


def masked_linear(x: Tensor, weight: Weight, counts: Tensor) -> Tensor:
    """x [E, C, K], of which the first counts[e] rows of expert e hold tokens, weight in layout "plain" -> [E, C, N].

    The other rows are 0.
    """
    if weight.scale is None:
        return masked_gemm(x, weight.data, counts)
    values, scales = quantize_tiles(x.flatten(0, 1), weight.data.dtype, weight.format == "fp8_ue8m0")
    values, scales = (part.unflatten(0, x.shape[:2]) for part in (values, scales))
    return masked_fp8_gemm(values, scales, weight.data, weight.scale, counts, x.dtype)


def consumer(weight: Weight) -> Op:
    """The op that multiplies by this weight."""
    grouped = weight.data.dim() == 3
    if weight.scale is None:
        return grouped_gemm if grouped else gemm
    return grouped_fp8_gemm if grouped else fp8_gemm


def pack(weight: Weight) -> Weight:
    """`weight` in the layout of the first usable kernel of the active backend that packs; run once, on load."""
    for kernel in consumer(weight).kernels.get(active_backend(), ()):
        if kernel.usable and kernel.pack is not None:
            return kernel.pack(weight)
    return weight
