"""Norms, rotary positions and SwiGLU of a few rows."""

import torch
from torch import Tensor

from ....ops.general import add_rms_norm, rms_norm, rope, swiglu
from ....ops.mtp import mtp_input
from . import SMALL, are_small, built, extension, is_real


def _norm_applies(x: Tensor, w: Tensor, eps: float) -> bool:
    return (
        is_real(x)
        and x.dim() == 2
        and x.numel() <= SMALL
        and x.stride(1) == 1
        and w.dtype is torch.float32
        and w.shape == x.shape[1:]
        and w.is_contiguous()
    )


@rms_norm.kernel("cpu", "native", priority=20, available=built, supports=_norm_applies)
def _rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    out = torch.empty(x.shape)
    extension.rms_norm(x.data_ptr(), x.stride(0), w.data_ptr(), out.data_ptr(), x.shape[1], *x.shape, eps)
    return out


def _mtp_applies(hidden: Tensor, embedding: Tensor, hnorm_w: Tensor, enorm_w: Tensor, eps: float) -> bool:
    return (
        hidden.shape == embedding.shape
        and _norm_applies(hidden, hnorm_w, eps)
        and _norm_applies(embedding, enorm_w, eps)
    )


@mtp_input.kernel("cpu", "native", priority=20, available=built, supports=_mtp_applies)
def _mtp_input(hidden: Tensor, embedding: Tensor, hnorm_w: Tensor, enorm_w: Tensor, eps: float) -> Tensor:
    rows, width = hidden.shape
    out = torch.empty(rows, 2 * width)
    for x, w, part in ((embedding, enorm_w, out), (hidden, hnorm_w, out[:, width:])):
        extension.rms_norm(x.data_ptr(), x.stride(0), w.data_ptr(), part.data_ptr(), 2 * width, rows, width, eps)
    return out


def _add_norm_applies(x: Tensor, residual: Tensor, w: Tensor, eps: float) -> bool:
    return x.dim() == 2 and x.shape == residual.shape and w.shape == x.shape[1:] and are_small(x, residual, w)


@add_rms_norm.kernel("cpu", "native", priority=20, available=built, supports=_add_norm_applies)
def _add_rms_norm(x: Tensor, residual: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, total = torch.empty_like(x), torch.empty_like(x)
    addresses = x.data_ptr(), residual.data_ptr(), w.data_ptr(), out.data_ptr(), total.data_ptr()
    extension.add_rms_norm(*addresses, *x.shape, eps)
    return out, total


def _rope_applies(x: Tensor, positions: Tensor, table: Tensor) -> bool:
    return (
        is_real(x)
        and x.dim() in (2, 3)
        and x.numel() <= SMALL
        and x.stride(-1) == 1
        and positions.dtype is torch.int64
        and positions.shape == x.shape[:1]
        and positions.is_contiguous()
        and table.dtype is torch.float32
        and table.shape[1:] == x.shape[-1:]
        and table.is_contiguous()
    )


@rope.kernel("cpu", "native", priority=20, available=built, supports=_rope_applies)
def _rope(x: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    out, shape = torch.empty(x.shape), x.shape
    heads, head_stride = (shape[1], x.stride(1)) if len(shape) == 3 else (1, 0)
    extension.rope(
        x.data_ptr(), x.stride(0), head_stride, positions.data_ptr(), table.data_ptr(), len(table), out.data_ptr(),
        shape[0], heads, shape[-1],
    )  # fmt: skip
    return out


def _swiglu_applies(gate_up: Tensor, weight: Tensor | None) -> bool:
    if weight is not None and (weight.shape != gate_up.shape[:1] or not are_small(weight)):
        return False
    return gate_up.dim() == 2 and are_small(gate_up)


@swiglu.kernel("cpu", "native", priority=20, available=built, supports=_swiglu_applies)
def _swiglu(gate_up: Tensor, weight: Tensor | None) -> Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width)
    extension.swiglu(gate_up.data_ptr(), 0 if weight is None else weight.data_ptr(), out.data_ptr(), rows, width)
    return out
