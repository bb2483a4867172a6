"""Rotary positions and SwiGLU, and their gradients: one read, one write, everything in between in registers."""

import torch
import triton.language as tl
from torch import Tensor

from ...ops.general import rope, rope_backward, swiglu, swiglu_backward
from .operands import as_rows, by_rows, is_real
from .runtime import gpu_kernel, kernel, launch, power_of_two
from .tables import tile


@kernel
def rope_kernel(
    x, positions, table, out, N, H, r, x_token, x_head,
    SIGN: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """x [T, H, r] -> out [N = T * H, r], each pair turned by SIGN times the angle of its token's position."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = (row // H).to(tl.int64), (row % H).to(tl.int64)
    column, pair = tl.arange(0, 2 * PAIRS), tl.arange(0, PAIRS)
    inside = row < N
    mask = inside[:, None] & (column < r)[None, :]
    place = x + (token * x_token + head * x_head)[:, None] + column[None, :]
    # Read as it lies, 16 bytes a thread, and parted in registers.
    values = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    a, b = tl.split(tl.reshape(values, (ROWS, PAIRS, 2)))
    position = tl.load(positions + token, mask=inside, other=0).to(tl.int64)
    angle = table + (position * r)[:, None] + pair[None, :]
    known = inside[:, None] & (pair < r // 2)[None, :]
    cos = tl.load(angle, mask=known, other=0.0)
    sin = tl.load(angle + r // 2, mask=known, other=0.0) * SIGN
    turned = tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (ROWS, 2 * PAIRS))
    tl.store(out + row.to(tl.int64)[:, None] * r + column[None, :], turned.to(out.dtype.element_ty), mask=mask)


@kernel
def swiglu_kernel(gate_up, weight, out, T, width, row_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """gate_up [T, 2 * width], gate first; weight f32 [T] or None -> out [T, width]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (row < T)[:, None] & (column < width)[None, :]
    place = gate_up + row[:, None] * row_stride + column[None, :]
    gate = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(place + width, mask=mask, other=0.0).to(tl.float32)
    hidden = gate / (1.0 + tl.exp(-gate)) * up
    if weight is not None:
        hidden = hidden * tl.load(weight + row, mask=row < T, other=0.0)[:, None]
    tl.store(out + row[:, None] * width + column[None, :], hidden.to(out.dtype.element_ty), mask=mask)


@kernel
def swiglu_backward_kernel(
    grad, gate_up, weight, of_gate_up, of_weight, T, width, grad_row, row_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad [T, width], the rest as in swiglu_kernel -> of_gate_up [T, 2 * width]; of_weight f32 [T], whose program goes
    over whole rows (one program along the columns); without a weight, programs share the columns."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < T
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(tl.program_id(1) * BLOCK, width, tl.num_programs(1) * BLOCK):
        column = first + tl.arange(0, BLOCK)
        mask = inside[:, None] & (column < width)[None, :]
        place = row[:, None] * row_stride + column[None, :]
        gate = tl.load(gate_up + place, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up + place + width, mask=mask, other=0.0).to(tl.float32)
        of_out = tl.load(grad + row[:, None] * grad_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        active = gate * sigmoid
        if weight is not None:
            total += of_out * active * up
            of_out = of_out * tl.load(weight + row, mask=inside, other=0.0)[:, None]
        of_gate = of_out * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        into = of_gate_up + row[:, None] * (2 * width) + column[None, :]
        tl.store(into, of_gate.to(of_gate_up.dtype.element_ty), mask=mask)
        tl.store(into + width, (of_out * active).to(of_gate_up.dtype.element_ty), mask=mask)
    if weight is not None:
        tl.store(of_weight + row, tl.sum(total, 1), mask=inside)


# Launchers -----------------------------------------------------------------------------------------------------------


def _turn(x: Tensor, positions: Tensor, table: Tensor, sign: float) -> Tensor:
    x = by_rows(x)
    r, H = x.shape[-1], x.shape[1] if x.dim() == 3 else 1
    N, out = x.shape[0] * H, x.new_empty(x.shape)
    shape = tile("rope", N=N, r=r)
    launch(
        rope_kernel, (-(-N // shape["ROWS"]),), x, positions.contiguous(), table.contiguous(), out, N, H, r,
        x.stride(0), x.stride(1) if x.dim() == 3 else 0, SIGN=sign, PAIRS=power_of_two(r // 2), enable_fp_fusion=True,
        **shape,
    )  # fmt: skip
    return out


def _turns(x: Tensor, positions: Tensor, table: Tensor) -> bool:
    return is_real(x) and table.dtype == torch.float32 and x.shape[-1] <= 256


@gpu_kernel(rope, _turns)
def rope_triton(x: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    return _turn(x, positions, table, 1.0)


@gpu_kernel(rope_backward, _turns)
def rope_backward_triton(grad: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    return _turn(grad, positions, table, -1.0)


def _activates(gate_up: Tensor, weight: Tensor | None) -> bool:
    return is_real(gate_up) and (weight is None or weight.dtype == torch.float32)


@gpu_kernel(swiglu, _activates)
def swiglu_triton(gate_up: Tensor, weight: Tensor | None) -> Tensor:
    rows = as_rows(gate_up)
    T, width = rows.shape[0], rows.shape[1] // 2
    out = rows.new_empty(T, width)
    shape = tile("swiglu", T=T, I=width)
    launch(
        swiglu_kernel, (-(-T // shape["ROWS"]), -(-width // shape["BLOCK"])), rows,
        None if weight is None else weight.contiguous(), out, T, width, rows.stride(0), enable_fp_fusion=True, **shape,
    )  # fmt: skip
    return out


@gpu_kernel(swiglu_backward, lambda grad, gate_up, weight: is_real(grad) and _activates(gate_up, weight))
def swiglu_backward_triton(grad: Tensor, gate_up: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    rows, of_out = as_rows(gate_up), as_rows(grad)
    T, width = of_out.shape
    of_gate_up = rows.new_empty(T, 2 * width)
    of_weight = rows.new_empty(0 if weight is None else T, dtype=torch.float32)
    shape = tile("swiglu_backward", T=T, I=width)
    across = -(-width // shape["BLOCK"]) if weight is None else 1
    launch(
        swiglu_backward_kernel, (-(-T // shape["ROWS"]), across), of_out, rows,
        None if weight is None else weight.contiguous(), of_gate_up, of_weight, T, width, of_out.stride(0),
        rows.stride(0), enable_fp_fusion=True, **shape,
    )  # fmt: skip
    return of_gate_up, of_weight
