"""Joining attention over two disjoint sets of keys, by their log-sum-exps, and its gradient.

Both are bound by memory: a program reads some rows [dv] of both sides, once. A row is a token's head; lse is per row.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...ops.mla import merge_lse, merge_lse_backward
from .operands import is_real
from .runtime import device_function, gpu_kernel, kernel, launch, power_of_two
from .tables import tile


@device_function
def merge_weights(lse_a, lse_b):
    """(weight of a, weight of b, joint log-sum-exp); weights are 0 where both sides saw nothing."""
    top = tl.maximum(lse_a, lse_b)
    finite = tl.where(top == float("-inf"), 0.0, top)
    of_a, of_b = tl.exp(lse_a - finite), tl.exp(lse_b - finite)
    both = tl.where(top == float("-inf"), 1.0, of_a + of_b)
    return of_a / both, of_b / both, top + tl.log(both)


@device_function
def joined_rows(base, row, R, V: tl.constexpr, DV: tl.constexpr):
    """(pointers to rows [.., V] of contiguous memory, which of them exist)."""
    column = tl.arange(0, DV)
    return base + row.to(tl.int64)[:, None] * V + column[None, :], (row < R)[:, None] & (column < V)[None, :]


@kernel
def merge_lse_kernel(
    out_a, lse_a, out_b, lse_b, out, lse, R, V: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """out_a, out_b [R, V], lse_a, lse_b f32 [R] -> out [R, V], lse f32 [R] of the union."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    of_a, of_b, joint = merge_weights(
        tl.load(lse_a + row, mask=row < R, other=0.0), tl.load(lse_b + row, mask=row < R, other=0.0)
    )
    tl.store(lse + row, joint, mask=row < R)
    place, mask = joined_rows(out_a, row, R, V, DV)
    a = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    place, mask = joined_rows(out_b, row, R, V, DV)
    b = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    place, mask = joined_rows(out, row, R, V, DV)
    tl.store(place, (of_a[:, None] * a + of_b[:, None] * b).to(out.dtype.element_ty), mask=mask)


@kernel
def merge_lse_backward_kernel(
    grad_out, grad_lse, out_a, lse_a, out_b, lse_b, of_out_a, of_lse_a, of_out_b, of_lse_b, R,
    V: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """grad_out [R, V], grad_lse f32 [R] -> gradients of out_a, lse_a, out_b, lse_b, shaped and typed as these."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    of_a, of_b, _ = merge_weights(
        tl.load(lse_a + row, mask=row < R, other=0.0), tl.load(lse_b + row, mask=row < R, other=0.0)
    )
    place, mask = joined_rows(grad_out, row, R, V, DV)
    grad = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    place, mask = joined_rows(out_a, row, R, V, DV)
    a = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    place, mask = joined_rows(out_b, row, R, V, DV)
    b = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    shift = of_a * of_b * tl.sum(grad * (a - b), 1)  # what moving weight from b to a is worth
    place, mask = joined_rows(of_out_a, row, R, V, DV)
    tl.store(place, (of_a[:, None] * grad).to(of_out_a.dtype.element_ty), mask=mask)
    place, mask = joined_rows(of_out_b, row, R, V, DV)
    tl.store(place, (of_b[:, None] * grad).to(of_out_b.dtype.element_ty), mask=mask)
    grad_joint = tl.load(grad_lse + row, mask=row < R, other=0.0)
    tl.store(of_lse_a + row, of_a * grad_joint + shift, mask=row < R)
    tl.store(of_lse_b + row, of_b * grad_joint - shift, mask=row < R)


# Launchers -----------------------------------------------------------------------------------------------------------


def _merges(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> bool:
    return is_real(out_a, out_b) and lse_a.dtype == lse_b.dtype == torch.float32


def _launch(name: str, kernel: Any, *tensors: Tensor) -> None:
    """Launch over the rows of the first tensor, [T, H, dv]."""
    T, H, dv = tensors[0].shape
    shape = tile(name)
    launch(
        kernel, (-(-T * H // shape["ROWS"]),), *tensors, T * H, V=dv, DV=power_of_two(dv), enable_fp_fusion=True,
        **shape,
    )  # fmt: skip


@gpu_kernel(merge_lse, _merges)
def merge_lse_triton(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)
    sides = (x.contiguous() for x in (out_a, lse_a, out_b, lse_b))
    _launch("merge_lse", merge_lse_kernel, *sides, out, lse)
    return out, lse


@gpu_kernel(
    merge_lse_backward,
    lambda grad_out, grad_lse, *sides: _merges(*sides) and _merges(grad_out, grad_lse, grad_out, grad_lse),
)
def merge_lse_backward_triton(
    grad_out: Tensor, grad_lse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_out_a, of_lse_a, of_out_b, of_lse_b = (x.new_empty(x.shape) for x in (out_a, lse_a, out_b, lse_b))
    inputs = (x.contiguous() for x in (grad_out, grad_lse, out_a, lse_a, out_b, lse_b))
    gradients = of_out_a, of_lse_a, of_out_b, of_lse_b
    _launch("merge_lse_backward", merge_lse_backward_kernel, *inputs, *gradients)
    return gradients
