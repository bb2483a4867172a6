"""RMS norms: alone, after a residual sum, two into one row for multi-token prediction; and their gradients.

All are bound by memory: a row is read once, lies in registers, and is written once. The weight's gradient is summed in
two stages, each in an order of its own making: every program over its rows, then the programs' sums, in float32.
"""

import torch
import triton.language as tl
from torch import Tensor

from ...ops.general import add_rms_norm, add_rms_norm_backward, rms_norm, rms_norm_backward
from ...ops.mtp import mtp_input, mtp_input_backward
from .operands import as_rows, is_real
from .runtime import device_function, gpu_kernel, kernel, launch, power_of_two
from .tables import tile
from .target import current_target

LONGEST = 8192  # numbers of a row, in the registers of a program; V3's are 7168


@device_function
def read_rows(x, residual, total, row, column, mask, D, x_row, residual_row):
    """Rows of x [N, D] in float32; where there is a residual [N, D], of the sum, which goes to total [N, D]."""
    values = tl.load(x + row[:, None] * x_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        more = tl.load(residual + row[:, None] * residual_row + column[None, :], mask=mask, other=0.0)
        summed = (values + more.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + row[:, None] * D + column[None, :], summed, mask=mask)
        values = summed.to(tl.float32)
    return values


@device_function
def normed(values, w, column, D, eps, like):
    """Norms of rows f32 [ROWS, BLOCK], weighted by w [D], in the dtype that `like` points to."""
    normal = values * tl.rsqrt(tl.sum(values * values, 1) / D + eps)[:, None]
    weight = tl.load(w + column, mask=column < D, other=0.0).to(tl.float32)
    # Rounded before it is weighted, as the specification says.
    scaled = normal.to(like.dtype.element_ty).to(tl.float32) * weight[None, :]
    return scaled.to(like.dtype.element_ty)


@device_function
def norm_rows(
    x, residual, w, out, total, N, D, x_row, residual_row, out_row, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Norms of a program's rows. x [N, D], residual [N, D] or None, w [D] -> out [N, D], total [N, D] contiguous."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < N)[:, None] & (column < D)[None, :]
    values = read_rows(x, residual, total, row, column, mask, D, x_row, residual_row)
    tl.store(out + row[:, None] * out_row + column[None, :], normed(values, w, column, D, eps, out), mask=mask)


@kernel
def rms_norm_kernel(
    x, residual, w, out, total, N, D, x_row, residual_row, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """x, residual [N, D], w [D] -> out [N, D]; total [N, D] = x + residual where there is one."""
    norm_rows(x, residual, w, out, total, N, D, x_row, residual_row, D, eps, ROWS, BLOCK)


@kernel
def mtp_input_kernel(
    hidden, embedding, hnorm_w, enorm_w, out, T, D, hidden_row, embedding_row, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """hidden, embedding [T, D] -> out [T, 2D]: norms of the embedding, then of the hidden state; a program one half."""
    if tl.program_id(1) == 0:
        norm_rows(embedding, None, enorm_w, out, None, T, D, embedding_row, 0, 2 * D, eps, ROWS, BLOCK)
    else:
        norm_rows(hidden, None, hnorm_w, out + D, None, T, D, hidden_row, 0, 2 * D, eps, ROWS, BLOCK)


@kernel
def rms_norm_backward_kernel(
    grad, grad_total, x, w, of_x, partial, N, D, grad_row, grad_total_row, x_row, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad, x [N, D] (grad_total: the sum's own gradient, or None), w [D] -> of_x [N, D]; partial f32 [programs, D]:
    the weight's gradient of the rows of each program."""
    column = tl.arange(0, BLOCK)
    of_w = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(tl.program_id(0) * ROWS, N, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < N)[:, None] & (column < D)[None, :]
        values = tl.load(x + row[:, None] * x_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
        of_out = tl.load(grad + row[:, None] * grad_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(w + column, mask=column < D, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(values * values, 1) / D + eps)
        normal = values * rstd[:, None]
        of_w += of_out * normal
        scaled = of_out * weight[None, :]
        of_row = (scaled - normal * (tl.sum(scaled * normal, 1) / D)[:, None]) * rstd[:, None]
        if grad_total is not None:
            more = tl.load(grad_total + row[:, None] * grad_total_row + column[None, :], mask=mask, other=0.0)
            of_row += more.to(tl.float32)
        tl.store(of_x + row[:, None] * D + column[None, :], of_row.to(of_x.dtype.element_ty), mask=mask)
    tl.store(partial + tl.program_id(0).to(tl.int64) * D + column, tl.sum(of_w, 0), mask=column < D)


@kernel
def sum_rows_kernel(partial, out, N, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """partial f32 [N, D] -> out [D], the sum over the rows."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, N, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < N)[:, None] & (column < D)[None, :]
        total += tl.load(partial + row.to(tl.int64)[:, None] * D + column[None, :], mask=mask, other=0.0)
    tl.store(out + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < D)


# Launchers -----------------------------------------------------------------------------------------------------------


def fits(x: Tensor, *others: Tensor | None) -> bool:
    """Real numbers, in rows that a program can hold?"""
    return is_real(x, *others) and 0 < x.shape[-1] <= LONGEST


def _forward(x: Tensor, residual: Tensor | None, w: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
    rows, more = as_rows(x), None if residual is None else as_rows(residual)
    (N, D), out = rows.shape, x.new_empty(x.shape)
    total = None if residual is None else x.new_empty(x.shape)
    shape = tile("rms_norm", N=N, D=D)
    launch(
        rms_norm_kernel, (-(-N // shape["ROWS"]),), rows, more, w.contiguous(), out, total, N, D, rows.stride(0),
        0 if more is None else more.stride(0), eps, BLOCK=power_of_two(D), **shape,
    )  # fmt: skip
    return out, total


@gpu_kernel(rms_norm, lambda x, w, eps: fits(x, w))
def rms_norm_triton(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return _forward(x, None, w, eps)[0]


@gpu_kernel(add_rms_norm, lambda x, residual, w, eps: fits(x, w) and residual.dtype == x.dtype)
def add_rms_norm_triton(x: Tensor, residual: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, total = _forward(x, residual, w, eps)
    assert total is not None
    return out, total


def _backward(grad: Tensor, grad_total: Tensor | None, x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows, of_out = as_rows(x), as_rows(grad)
    more = None if grad_total is None else as_rows(grad_total)
    (N, D), of_x, of_w = rows.shape, x.new_empty(x.shape), w.new_empty(w.shape)
    shape = dict(tile("rms_norm_backward", N=N, D=D))
    programs = min(-(-N // (2 * shape["ROWS"])), shape.pop("PER_UNIT") * current_target().units)
    partial = x.new_empty(programs, D, dtype=torch.float32)
    launch(
        rms_norm_backward_kernel, (programs,), of_out, more, rows, w.contiguous(), of_x, partial, N, D,
        of_out.stride(0), 0 if more is None else more.stride(0), rows.stride(0), eps, BLOCK=power_of_two(D), **shape,
    )  # fmt: skip
    shape = tile("sum_rows", D=D)
    launch(sum_rows_kernel, (-(-D // shape["BLOCK"]),), partial, of_w, programs, D, **shape)
    return of_x, of_w


@gpu_kernel(rms_norm_backward, lambda grad, x, w, eps: fits(x, grad, w))
def rms_norm_backward_triton(grad: Tensor, x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _backward(grad, None, x, w, eps)


@gpu_kernel(add_rms_norm_backward, lambda grad, grad_total, total, w, eps: fits(total, grad, grad_total, w))
def add_rms_norm_backward_triton(
    grad: Tensor, grad_total: Tensor, total: Tensor, w: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _backward(grad, grad_total, total, w, eps)


def _takes_mtp(hidden: Tensor, embedding: Tensor, hnorm_w: Tensor, enorm_w: Tensor, eps: float) -> bool:
    return fits(hidden, hnorm_w, enorm_w) and embedding.dtype == hidden.dtype


@gpu_kernel(mtp_input, _takes_mtp)
def mtp_input_triton(hidden: Tensor, embedding: Tensor, hnorm_w: Tensor, enorm_w: Tensor, eps: float) -> Tensor:
    T, D = hidden.shape
    states, embedded, out = as_rows(hidden), as_rows(embedding), hidden.new_empty(T, 2 * D)
    shape = tile("rms_norm", N=T, D=D)
    launch(
        mtp_input_kernel, (-(-T // shape["ROWS"]), 2), states, embedded, hnorm_w.contiguous(), enorm_w.contiguous(),
        out, T, D, states.stride(0), embedded.stride(0), eps, BLOCK=power_of_two(D), **shape,
    )  # fmt: skip
    return out


@gpu_kernel(mtp_input_backward, lambda grad, *inputs: is_real(grad) and _takes_mtp(*inputs))
def mtp_input_backward_triton(
    grad: Tensor, hidden: Tensor, embedding: Tensor, hnorm_w: Tensor, enorm_w: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_first, of_second = grad.chunk(2, -1)
    of_embedding, of_enorm_w = _backward(of_first, None, embedding, enorm_w, eps)
    of_hidden, of_hnorm_w = _backward(of_second, None, hidden, hnorm_w, eps)
    return of_hidden, of_embedding, of_hnorm_w, of_enorm_w
