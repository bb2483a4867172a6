"""Norms, rotary positions and SwiGLU on the CPU, in as few passes over memory as PyTorch's operators allow.

16-bit inputs are left to the specifications where nothing was to be gained.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu

from ...ops.general import (
    add_rms_norm,
    add_rms_norm_backward,
    rms_norm,
    rms_norm_backward,
    rope,
    rope_backward,
    swiglu,
    swiglu_backward,
)


def _is_wide(*tensors: Tensor | None) -> bool:
    return all(x is None or x.dtype in (torch.float32, torch.float64) for x in tensors)


def _rstd(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) [..., 1], without an x^2 in memory."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(norm.new_full((), eps), norm, norm, value=1 / x.shape[-1]).rsqrt_()


@rms_norm.kernel("cpu", "torch", supports=lambda x, w, eps: _is_wide(x, w))
def _rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return torch.mul(x, _rstd(x, eps)).mul_(w)


@add_rms_norm.kernel("cpu", "torch", supports=lambda x, residual, w, eps: _is_wide(x, residual, w))
def _add_rms_norm(x: Tensor, residual: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _rms_norm(total, w, eps), total


@rms_norm_backward.kernel("cpu", "torch", supports=lambda grad, x, w, eps: _is_wide(grad, x, w))
def _rms_norm_backward(grad: Tensor, x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """PyTorch's fused gradient of LayerNorm, told that the mean is 0; it then still subtracts the mean of grad * w,
    which is put back. A seventh of the time of separate operators."""
    D = x.shape[-1]
    rows, grad = x.reshape(-1, D), grad.reshape(-1, D)
    rstd = _rstd(rows, eps)
    of_x, of_w, _ = torch.ops.aten.native_layer_norm_backward(
        grad, rows, [D], torch.zeros_like(rstd), rstd, w, None, [True, True, False]
    )
    return of_x.addcmul_((grad @ w)[:, None], rstd, value=1 / D).view(x.shape), of_w


@add_rms_norm_backward.kernel("cpu", "torch", supports=lambda *args: _is_wide(*args[:4]))
def _add_rms_norm_backward(
    grad: Tensor, grad_total: Tensor, total: Tensor, w: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    of_total, of_w = _rms_norm_backward(grad, total, w, eps)
    return of_total.add_(grad_total), of_w


def _rotate(x: Tensor, positions: Tensor, table: Tensor, back: bool) -> Tensor:
    """A pair is a complex number and its angle another: one product, in one pass (a third of the time, or less)."""
    real = torch.promote_types(x.dtype, torch.float32)
    turn = torch.complex(*table.index_select(0, positions).to(real).chunk(2, -1))
    if back:
        turn = turn.conj_physical()
    wide = x.to(real).view(*x.shape[:-1], -1, 2)
    if any(stride % 2 for stride in wide.stride()[:-1]) or wide.storage_offset() % 2:
        wide = wide.contiguous()
    turned = torch.view_as_complex(wide) * (turn if x.dim() == 2 else turn[:, None])
    return torch.view_as_real(turned).flatten(-2).to(x.dtype).contiguous()


@rope.kernel("cpu", "torch")
def _rope(x: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    return _rotate(x, positions, table, back=False)


@rope_backward.kernel("cpu", "torch")
def _rope_backward(grad: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    return _rotate(grad, positions, table, back=True)


@swiglu.kernel("cpu", "torch", supports=lambda gate_up, weight: _is_wide(gate_up, weight))
def _swiglu(gate_up: Tensor, weight: Tensor | None) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    hidden = silu(gate).mul_(up)
    return hidden if weight is None else hidden.mul_(weight[:, None])


@swiglu_backward.kernel("cpu", "torch", supports=lambda *args: _is_wide(*args))
def _swiglu_backward(grad: Tensor, gate_up: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    gate, up = gate_up.chunk(2, -1)
    of_gate_up = torch.empty_like(gate_up)
    of_gate, of_up = of_gate_up.chunk(2, -1)
    torch.mul(grad, silu(gate), out=of_up)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=of_gate)
    if weight is None:
        return of_gate_up, grad.new_empty(0)
    of_weight = torch.linalg.vecdot(of_up, up)  # before of_up is weighted
    of_gate_up.mul_(weight[:, None])
    return of_gate_up, of_weight
