"""Products of experts, FP8 and real: rows sorted by expert, and rows of fixed capacity (decoding).

The bounds of the experts stay on the device. A grid is as large as the rows could need, and a program finds its expert.
"""

import torch
from torch import Tensor

from ...ops.gemm import grouped_gemm, grouped_gemm_dgrad, masked_gemm
from ...ops.grouped_fp8 import grouped_fp8_gemm, masked_fp8_gemm
from .fp8_gemm import in_native_format, multiplies
from .operands import is_real
from .products import multiply
from .runtime import gpu_kernel


def _multiplies(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, bounds: Tensor, out_dtype: torch.dtype) -> bool:
    return multiplies(a, sa, b, sb, out_dtype) and bounds.dtype == torch.int32


def real(a: Tensor, b: Tensor, bounds: Tensor, layout: str = "plain") -> bool:
    """Of one real dtype that a GPU multiplies?"""
    return a.dtype == b.dtype and is_real(a) and bounds.dtype == torch.int32 and layout == "plain"


@gpu_kernel(grouped_fp8_gemm, _multiplies, pack=in_native_format)
def grouped_fp8_gemm_triton(
    a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, offsets: Tensor, out_dtype: torch.dtype
) -> Tensor:
    return multiply("grouped_fp8_gemm", a, b, out_dtype, (sa, sb), offsets)


@gpu_kernel(masked_fp8_gemm, _multiplies)
def masked_fp8_gemm_triton(
    a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, counts: Tensor, out_dtype: torch.dtype
) -> Tensor:
    E, C, _ = a.shape
    out = multiply("masked_fp8_gemm", a.flatten(0, 1), b, out_dtype, (sa.flatten(0, 1), sb), counts, C)
    return out.view(E, C, -1)


def _name(op: str, a: Tensor) -> str:
    return f"{op}_f32" if a.dtype == torch.float32 else op


@gpu_kernel(grouped_gemm, real)
def grouped_gemm_triton(a: Tensor, b: Tensor, offsets: Tensor, layout: str = "plain") -> Tensor:
    return multiply(_name("grouped_gemm", a), a, b, a.dtype, bounds=offsets)


@gpu_kernel(grouped_gemm_dgrad, real)
def grouped_gemm_dgrad_triton(grad: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    return multiply(_name("grouped_gemm_dgrad", grad), grad, b.mT, grad.dtype, bounds=offsets)


@gpu_kernel(masked_gemm, real)
def masked_gemm_triton(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    E, C, _ = a.shape
    return multiply(_name("masked_gemm", a), a.flatten(0, 1), b, a.dtype, bounds=counts, capacity=C).view(E, C, -1)
