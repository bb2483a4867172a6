"""cuBLASLt through torch: FP8 products with block scales on Hopper.

Signature: torch 2.13, torch.nn.functional.scaled_mm; its checks: pytorch 0174dfa, aten/.../cuda/ScaledBlas.cpp. Tiles
of 1 x 128 by blocks of 128 x 128 want compute capability 9.0 and CUDA 12.9, a [M, K] by rows, b^T [K, N] by columns, sa
f32 [M, Kb] with strides (1, M): those of quantize_tiles where M is a multiple of 4; sb as [Kb rounded up to 4, Nb] with
strides (1, that): the transpose of ours where K is a multiple of 512. Releases differ in how many columns of scales an
N has that is no multiple of 128: not taken.

Taken for many rows only: with 16, cuBLASLt takes 1.7 times what a Triton kernel takes, from about a thousand on it is
the fastest there is (vLLM #49932, on H20).
"""

import torch
from torch import Tensor
from torch.nn import functional

from ...ops.formats import BLOCK, E4M3
from ...ops.fp8 import fp8_gemm
from ..probing import Unavailable, available, find, require_hopper, version_of

LEAST_ROWS = 1024


def _probe() -> None:
    require_hopper()
    find("torch.nn.functional", ("scaled_mm", "ScalingType"))
    if version_of(torch.version.cuda) < (12, 9):
        raise Unavailable(f"block scales want CUDA 12.9, torch is built with {torch.version.cuda}")


def _supports(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, out_dtype: torch.dtype) -> bool:
    T, K = a.shape
    return (
        a.dtype == b.dtype == E4M3
        and out_dtype == torch.bfloat16
        and sa.dtype == sb.dtype == torch.float32
        and T >= LEAST_ROWS
        and T % 4 == 0
        and K % (4 * BLOCK) == 0
        and b.shape[0] % BLOCK == 0
        and a.is_contiguous()
        and b.is_contiguous()
        and sa.stride() == (1, T)
        and sb.is_contiguous()
    )


@fp8_gemm.kernel(
    "cuda",
    "cublaslt",
    priority=20,
    available=available("cublaslt", _probe),
    supports=_supports,
    checked="emulated",
)
def fp8_gemm_cublaslt(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, out_dtype: torch.dtype) -> Tensor:
    kind = functional.ScalingType
    return functional.scaled_mm(a, b.T, sa, kind.BlockWise1x128, sb.T, kind.BlockWise128x128, output_dtype=out_dtype)
