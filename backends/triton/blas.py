"""Products that a vendor's library computes best: plain ones by cuBLAS or hipBLAS, those of experts by torch on Hopper.

Sums run in float32: that torch may not reduce them in 16 bits, `sum_in_float32` says when a backend is activated.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...ops.gemm import (
    batched_gemm,
    gemm,
    gemm_dgrad,
    gemm_wgrad,
    grouped_gemm,
    grouped_gemm_dgrad,
    grouped_gemm_wgrad,
)
from ...ops.op import Op
from .grid import zero_rows
from .operands import is_real
from .products import has_aligned_rows
from .runtime import BACKENDS, can_launch, kernel, launch
from .tables import tile
from .target import current_target

# Public from some release on.
grouped_mm: Any = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)

FEW_ROWS = 64  # of an expert: up to here reading the weights is all, and `products` reads them faster


def _is_plain(a: Tensor, b: Tensor, layout: str = "plain") -> bool:
    return a.dtype == b.dtype and is_real(a) and layout == "plain"


def blas(op: Op) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated call of the vendor's BLAS on both backends; the tests make it with that of the CPU."""

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        for backend in BACKENDS:
            op.kernel(backend, "blas", available=can_launch, supports=_is_plain, checked="emulated")(run)
        return run

    return register


@blas(gemm)
def gemm_blas(a: Tensor, b: Tensor, layout: str = "plain") -> Tensor:
    return torch.mm(a, b.T)


@blas(gemm_dgrad)
def gemm_dgrad_blas(grad: Tensor, b: Tensor) -> Tensor:
    return torch.mm(grad, b)


@blas(gemm_wgrad)
def gemm_wgrad_blas(grad: Tensor, a: Tensor) -> Tensor:
    return torch.mm(grad.T, a)


@blas(batched_gemm)
def batched_gemm_blas(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a, b.transpose(1, 2))


# Experts on Hopper: CUTLASS, through torch ----------------------------------------------------------------------------


@kernel
def zero_tail_kernel(out, bounds, R, N, experts, COLUMNS: tl.constexpr):
    """Rows of out [R, N] behind those of the last expert := 0."""
    zero_rows(out, tl.load(bounds + experts), R, N, COLUMNS)


def zero_tail(out: Tensor, bounds: Tensor) -> Tensor:
    """grouped_mm leaves the rows of no expert as they were; it wants no host to know where they begin."""
    R, N = out.shape
    grid = (min(R, current_target().units),)
    launch(zero_tail_kernel, grid, out, bounds, R, N, bounds.shape[0] - 1, **tile("zero_tail"))
    return out


def is_hopper() -> bool:
    """Elsewhere torch waits for the device and visits the experts one by one."""
    return (
        grouped_mm is not None
        and torch.version.hip is None
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability()[0] == 9
    )


def _in_one_call(a: Tensor, b: Tensor, offsets: Tensor, layout: str = "plain") -> bool:
    """bfloat16 in rows of whole 16-byte units, many for an expert."""
    return (
        a.dtype == b.dtype == torch.bfloat16
        and offsets.dtype == torch.int32
        and layout == "plain"
        and a.shape[0] > FEW_ROWS * (offsets.shape[0] - 1)
        and all(x.is_contiguous() and has_aligned_rows(x) for x in (a, b))
    )


def cutlass(op: Op) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return op.kernel(
        "cuda", "torch", priority=10, available=is_hopper, supports=_in_one_call, checked="emulated"
    )  # fmt: skip


@cutlass(grouped_gemm)
def grouped_gemm_torch(a: Tensor, b: Tensor, offsets: Tensor, layout: str = "plain") -> Tensor:
    return zero_tail(grouped_mm(a, b.mT, offs=offsets[1:]), offsets)


@cutlass(grouped_gemm_dgrad)
def grouped_gemm_dgrad_torch(grad: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    return zero_tail(grouped_mm(grad, b, offs=offsets[1:]), offsets)


@cutlass(grouped_gemm_wgrad)
def grouped_gemm_wgrad_torch(grad: Tensor, a: Tensor, offsets: Tensor) -> Tensor:
    return grouped_mm(grad.T, a, offs=offsets[1:])
