"""FP8 products of a linear layer: forward, the gradient of the input (a transposed weight) and of the weight.

On Hopper tiles come by TMA into persistent programs; few tokens lie on the short side of the matrix instruction, and
their sums over K are split to keep all units reading. Where the chip multiplies no E4M3, it is decoded to float16.
On gfx942, whose E4M3 is another one, weights are brought into it when they are loaded (`pack`).
"""

from dataclasses import replace

import torch
from torch import Tensor

from ...ops.formats import E4M3, E4M3_FNUZ, fn_to_fnuz
from ...ops.fp8 import fp8_gemm, fp8_gemm_wgrad
from ...ops.weight import Weight
from .operands import REAL
from .products import multiply, with_aligned_rows
from .quantize import knows
from .runtime import gpu_kernel
from .target import current_target


def in_native_format(weight: Weight) -> Weight:
    """An E4M3FN weight as the same number of bytes that gfx942 multiplies; every other weight and chip: as it is.

    Activations follow: they are quantised into the format of the weight that they meet.
    """
    if current_target().fp8 != E4M3_FNUZ or weight.data.dtype != E4M3 or weight.scale is None:
        return weight
    data, scale = fn_to_fnuz(weight.data, weight.scale)
    return replace(weight, data=data, scale=scale)


def multiplies(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, out_dtype: torch.dtype = torch.float32) -> bool:
    """Of one FP8 format that is known here, with scales in float32?"""
    return a.dtype == b.dtype and knows(a.dtype) and sa.dtype == sb.dtype == torch.float32 and out_dtype in REAL


@gpu_kernel(fp8_gemm, multiplies, pack=in_native_format)
def fp8_gemm_triton(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, out_dtype: torch.dtype) -> Tensor:
    return multiply("fp8_gemm", a, b[None], out_dtype, (sa, sb[None]))


@gpu_kernel(fp8_gemm_wgrad, multiplies)
def fp8_gemm_wgrad_triton(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor) -> Tensor:
    a, b = with_aligned_rows(a), with_aligned_rows(b)  # the number of tokens may be odd
    return multiply("fp8_gemm_wgrad", a, b[None], torch.float32, (sa, sb[None]))
