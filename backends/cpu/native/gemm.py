"""Products of a few rows with small weights."""

import torch
from torch import Tensor

from ....ops.gemm import batched_gemm, gemm, grouped_gemm
from . import ROWS, SMALL_PRODUCT, built, extension, is_real


def _gemm_applies(a: Tensor, b: Tensor, layout: str = "plain") -> bool:
    if layout != "plain" or not is_real(a) or b.dtype is not torch.float32:
        return False
    (M, K), (N, columns) = a.shape, b.shape
    return M <= ROWS and columns == K and M * N * K <= SMALL_PRODUCT and a.stride(1) == 1 == b.stride(1)


@gemm.kernel("cpu", "native", priority=20, available=built, supports=_gemm_applies)
def _gemm(a: Tensor, b: Tensor, layout: str = "plain") -> Tensor:
    (M, K), N = a.shape, b.shape[0]
    out = torch.empty(M, N)
    extension.gemm(a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0), out.data_ptr(), M, N, K)
    return out


def _batched_applies(a: Tensor, b: Tensor) -> bool:
    if not is_real(a) or b.dtype is not torch.float32:
        return False
    (B, M, K), (batch, N, columns) = a.shape, b.shape
    same = batch == B and columns == K
    return same and M <= ROWS and B * M * N * K <= SMALL_PRODUCT and a.stride(2) == 1 == b.stride(2)


@batched_gemm.kernel("cpu", "native", priority=20, available=built, supports=_batched_applies)
def _batched_gemm(a: Tensor, b: Tensor) -> Tensor:
    (B, M, K), N = a.shape, b.shape[1]
    out = torch.empty(B, M, N)
    extension.batched_gemm(
        a.data_ptr(), a.stride(0), a.stride(1), b.data_ptr(), b.stride(0), b.stride(1), out.data_ptr(), B, M, N, K
    )
    return out


def _grouped_applies(a: Tensor, b: Tensor, offsets: Tensor, layout: str = "plain") -> bool:
    if layout != "plain" or not is_real(a) or b.dtype is not torch.float32:
        return False
    (R, K), (E, N, columns) = a.shape, b.shape
    few = R <= 2 * ROWS and R * N * K <= SMALL_PRODUCT
    whole = a.is_contiguous() and b.is_contiguous() and offsets.is_contiguous()
    return few and whole and columns == K and offsets.dtype is torch.int32 and offsets.shape == (E + 1,)


@grouped_gemm.kernel("cpu", "native", priority=20, available=built, supports=_grouped_applies)
def _grouped_gemm(a: Tensor, b: Tensor, offsets: Tensor, layout: str = "plain") -> Tensor:
    (R, K), (E, N, _) = a.shape, b.shape
    out = torch.empty(R, N)
    extension.grouped_gemm(a.data_ptr(), b.data_ptr(), offsets.data_ptr(), out.data_ptr(), E, R, N, K)
    return out
