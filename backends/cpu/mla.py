"""Attention on the CPU: PyTorch's blocked (flash) kernel, which never holds the logits of a whole sequence.

That kernel wants equal head sizes, so values are padded with zeros to the size of the keys. Even so, the forward pass
takes a third of the time of PyTorch's own choice for unequal sizes, both passes two thirds (4 x 512 tokens, 48/32).
"""

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.formats import round_up
from ...ops.mla import mla_attention, mla_attention_backward

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Run(NamedTuple):
    """`sequences` neighbouring sequences of equal lengths: one call of the kernel. Rows begin at q0 and k0."""

    sequences: int
    q0: int
    q_len: int
    k0: int
    k_len: int


def _runs(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[Run]:
    q_len, k_len = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    q0 = k0 = 0
    for (q, k), same in groupby(zip(q_len, k_len, strict=True)):
        count = len(list(same))
        yield Run(count, q0, q, k0, k)
        q0, k0 = q0 + count * q, k0 + count * k


def _parts(run: Run, causal: bool) -> list[tuple[slice, slice, bool]]:
    """(queries, keys, causal) of the calls that make up a run.

    The kernel aligns its causal mask to the start. Aligned to the end, surplus queries at the front see nothing, and
    surplus keys at the front are seen by all: they are a call of their own.
    """
    _, _, q_len, _, k_len = run
    if not causal:
        return [(slice(0, q_len), slice(0, k_len), False)] if q_len and k_len else []
    surplus, queries = k_len - q_len, slice(max(q_len - k_len, 0), q_len)
    parts = [(queries, slice(0, surplus), False)] if surplus > 0 and q_len else []
    if q_len and k_len:
        parts.append((queries, slice(max(surplus, 0), k_len), True))
    return parts


def _batch(x: Tensor, start: int, count: int, length: int) -> Tensor:
    """Rows of a run as [count, H, length, ...], a view."""
    return x[start : start + count * length].unflatten(0, (count, length)).transpose(1, 2)


def _widen(x: Tensor, size: int) -> Tensor:
    """The last dimension padded with zeros to `size`."""
    if x.shape[-1] == size:
        return x
    wide = x.new_zeros(*x.shape[:-1], size)
    wide[..., : x.shape[-1]] = x
    return wide


def _keys(k_nope: Tensor, k_rope: Tensor, size: int) -> Tensor:
    """[Tk, H, size]: every head's own part, the shared rotary part, zeros."""
    Tk, H, n = k_nope.shape
    end = n + k_rope.shape[1]
    k = k_nope.new_empty(Tk, H, size)
    k[..., :n], k[..., n:end] = k_nope, k_rope[:, None]
    k[..., end:] = 0
    return k


@mla_attention.kernel("cpu", "torch")
def attend(
    q: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    Tq, H, D = q.shape
    dv = v.shape[2]
    size = max(D, dv)
    q, k, v = _widen(q, size), _keys(k_nope, k_rope, size), _widen(v, size)
    out = q.new_zeros(Tq, H, dv)
    lse = q.new_full((Tq, H), float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32))
    for run in _runs(cu_seqlens_q, cu_seqlens_k):
        out_run, lse_run = (_batch(x, run.q0, run.sequences, run.q_len) for x in (out, lse))
        q_run = _batch(q, run.q0, run.sequences, run.q_len)
        k_run, v_run = (_batch(x, run.k0, run.sequences, run.k_len) for x in (k, v))
        parts = []
        for rows, keys, triangle in _parts(run, causal):
            parts.append(_flash(q_run[:, :, rows], k_run[:, :, keys], v_run[:, :, keys], 0.0, triangle, scale=scale))
        if not parts:
            continue
        part, part_lse = parts[0]
        part = part[..., :dv]
        if len(parts) == 2:
            other, other_lse = parts[1]
            joint = torch.logaddexp(part_lse, other_lse)
            of_part, of_other = ((x - joint).exp_()[..., None] for x in (part_lse, other_lse))
            part, part_lse = of_part * part + of_other * other[..., :dv], joint
        out_run[:, :, rows], lse_run[:, :, rows] = part, part_lse
    return out, lse


@mla_attention_backward.kernel("cpu", "torch")
def _mla_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    D, n, dv = q.shape[2], k_nope.shape[2], v.shape[2]
    size = max(D, dv)
    if grad_lse is not None and size == dv:
        size = round_up(dv + 1, 8)
    q, k, v = _widen(q, size), _keys(k_nope, k_rope, size), _widen(v, size)
    grad, out = _widen(grad_out, size), _widen(out, size)
    if grad_lse is not None:
        # The kernel subtracts rowsum(grad * out) from the gradient of the probabilities; the gradient of lse belongs
        # beside it. A spare column carries it there: its values are zero, so it changes nothing else.
        grad[..., dv], out[..., dv] = 1.0, -grad_lse
    of_q = torch.zeros_like(q)
    of_k, of_v = torch.zeros_like(k), torch.zeros_like(v)
    for run in _runs(cu_seqlens_q, cu_seqlens_k):
        of_q_run, q_run, grad_run, out_run, lse_run = (
            _batch(x, run.q0, run.sequences, run.q_len) for x in (of_q, q, grad, out, lse)
        )
        of_k_run, of_v_run, k_run, v_run = (_batch(x, run.k0, run.sequences, run.k_len) for x in (of_k, of_v, k, v))
        for rows, keys, triangle in _parts(run, causal):
            part_q, part_k, part_v = _flash_backward(
                grad_run[:, :, rows],
                q_run[:, :, rows],
                k_run[:, :, keys],
                v_run[:, :, keys],
                out_run[:, :, rows],
                lse_run[:, :, rows],  # of all keys: each call then gives its share of the gradient
                0.0,
                triangle,
                scale=scale,
            )
            of_q_run[:, :, rows] += part_q
            of_k_run[:, :, keys], of_v_run[:, :, keys] = part_k, part_v
    of_k_nope, of_k_rope = of_k[..., :n].contiguous(), of_k[..., n:D].sum(1)
    return of_q[..., :D].contiguous(), of_k_nope, of_k_rope, of_v[..., :dv].contiguous()
