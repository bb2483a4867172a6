"""The small ops between the matrix products: RMS norm, rotary positions, SwiGLU. All compute in float32 at least."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from .op import Near, op


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# RMS norm ------------------------------------------------------------------------------------------------------------


@op(
    shapes={"x": "... D", "w": "D"},
    tolerance=Near(1e-6, 5e-3),
    cost=lambda x, w, eps: (4 * x.numel(), 2 * x.nbytes + w.nbytes),
)
def rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * w over the last dimension.

    x [..., D], w [D] -> [..., D] in x's dtype. The normalised x is rounded to x's dtype before it is multiplied by w,
    as the released code does.
    """
    wide = _wide(x)
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normal.to(x.dtype) * w).to(x.dtype)


@op(
    shapes={"grad": "... D", "x": "... D", "w": "D"},
    tolerance=(Near(1e-5, 5e-3), Near(1e-5, 5e-3)),
    cost=lambda grad, x, w, eps: (12 * x.numel(), 3 * x.nbytes),
)
def rms_norm_backward(grad: Tensor, x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and w; grad [..., D], the rest as in rms_norm."""
    wide, grad_, D = _wide(x), _wide(grad), x.shape[-1]
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normal, scaled = wide * rstd, grad_ * w
    of_x = (scaled - normal * (scaled * normal).mean(-1, keepdim=True)) * rstd
    of_w = (grad_ * normal).reshape(-1, D).sum(0)
    return of_x.to(x.dtype), of_w.to(w.dtype)


def _keep_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, ctx.eps = inputs
    ctx.save_for_backward(x, w)


@rms_norm.backward(_keep_rms_norm)
def _(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *rms_norm_backward(grad, *ctx.saved_tensors, ctx.eps), None


@op(
    shapes={"x": "... D", "residual": "... D", "w": "D"},
    tolerance=(Near(1e-6, 8e-3), 1e-6),
    cost=lambda x, residual, w, eps: (5 * x.numel(), 4 * x.nbytes + w.nbytes),
)
def add_rms_norm(x: Tensor, residual: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """A residual sum and its norm: x, residual [..., D], w [D] -> (rms_norm(x + residual), x + residual)."""
    total = x + residual
    wide = _wide(total)
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normal.to(x.dtype) * w).to(x.dtype), total


@op(
    shapes={"grad": "... D", "grad_total": "... D", "total": "... D", "w": "D"},
    tolerance=(Near(1e-5, 5e-3), Near(1e-5, 5e-3)),
    cost=lambda grad, grad_total, total, w, eps: (13 * total.numel(), 4 * total.nbytes),
)
def add_rms_norm_backward(
    grad: Tensor, grad_total: Tensor, total: Tensor, w: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the sum (the same for both terms) and of w; grad and grad_total [..., D]: those of the outputs."""
    wide, grad_, D = _wide(total), _wide(grad), total.shape[-1]
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normal, scaled = wide * rstd, grad_ * w
    of_total = (scaled - normal * (scaled * normal).mean(-1, keepdim=True)) * rstd + grad_total
    return of_total.to(total.dtype), (grad_ * normal).reshape(-1, D).sum(0).to(w.dtype)


def _keep_add_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], inputs[2])
    ctx.eps = inputs[3]


@add_rms_norm.backward(_keep_add_rms_norm)
def _(ctx: Any, grad: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
    of_total, of_w = add_rms_norm_backward(grad, grad_total, *ctx.saved_tensors, ctx.eps)
    return of_total, of_total, of_w, None


# Rotary positions ----------------------------------------------------------------------------------------------------


def _angles(x: Tensor, positions: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, [T, r/2] or [T, 1, r/2], in the dtype to compute in."""
    rows = table[positions].to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = (rows if x.dim() == 2 else rows[:, None]).chunk(2, -1)
    return cos, sin


@op(
    shapes={"x": "T H? r", "positions": "T", "table": "P r"},
    tolerance=1e-6,
    cost=lambda x, positions, table: (3 * x.numel(), 2 * x.nbytes + 4 * x.shape[0] * x.shape[-1]),
)
def rope(x: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    """Rotate interleaved pairs (x0, x1), (x2, x3), ... by the angles of their positions; the result is interleaved too.

    x [T, H, r] or [T, r], positions i32 or i64 [T], table f32 [P, r]: cos of the r/2 angles, then sin -> as x.
    """
    cos, sin = _angles(x, positions, table)
    a, b = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


@op(
    shapes={"grad": "T H? r", "positions": "T", "table": "P r"},
    tolerance=1e-6,
    cost=lambda grad, positions, table: (3 * grad.numel(), 2 * grad.nbytes),
)
def rope_backward(grad: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    """Gradient of x: the rotation back. grad as x in rope."""
    cos, sin = _angles(grad, positions, table)
    a, b = grad.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos + b * sin, b * cos - a * sin], -1).flatten(-2).to(grad.dtype)


@rope.backward(lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:]), of=("x",))
def _(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return rope_backward(grad, *ctx.saved_tensors), None, None


# SwiGLU --------------------------------------------------------------------------------------------------------------


@op(
    shapes={"gate_up": "T 2*I", "weight": "T"},
    tolerance=1e-6,
    cost=lambda gate_up, weight: (8 * gate_up.numel(), 3 * gate_up.nbytes // 2),
)
def swiglu(gate_up: Tensor, weight: Tensor | None) -> Tensor:
    """silu(gate) * up * weight [T, I]; gate_up [T, 2I], gate first; weight f32 [T] (an expert's gate value) or None."""
    gate, up = _wide(gate_up).chunk(2, -1)
    hidden = silu(gate) * up
    if weight is not None:
        hidden = hidden * weight[:, None]
    return hidden.to(gate_up.dtype)


@op(
    shapes={"grad": "T I", "gate_up": "T 2*I", "weight": "T"},
    tolerance=(Near(1e-5, 5e-3), Near(1e-5, 5e-3)),
    cost=lambda grad, gate_up, weight: (24 * grad.numel(), grad.nbytes + 2 * gate_up.nbytes),
)
def swiglu_backward(grad: Tensor, gate_up: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """grad [T, I], the rest as in swiglu -> gradients of gate_up [T, 2I] and of weight f32 [T] ([0] without one)."""
    gate, up = _wide(gate_up).chunk(2, -1)
    grad_, sigmoid = _wide(grad), gate.sigmoid()
    active = gate * sigmoid
    of_weight = grad_.new_empty(0)
    if weight is not None:
        of_weight = (grad_ * active * up).sum(-1).to(weight.dtype)
        grad_ = grad_ * weight[:, None]
    of_gate = grad_ * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([of_gate, grad_ * active], -1).to(gate_up.dtype), of_weight


@swiglu.backward(lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
def _(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gate_up, weight = ctx.saved_tensors
    of_gate_up, of_weight = swiglu_backward(grad, gate_up, weight)
    return of_gate_up, None if weight is None else of_weight
