"""Multi-head latent attention (report, section 2.1.1): the expanded form, for training and prefill.

Shapes: T tokens of all sequences end to end, H heads, n = qk_nope_head_dim, r = qk_rope_head_dim, dv = v_head_dim.
Sequence b owns the rows cu_seqlens[b] .. cu_seqlens[b + 1]; rows behind the last sequence are padding. One rotary key
serves all heads and is never expanded. The absorbed form, over the latent cache, is in mla_cache.py.
"""

from typing import Any

import torch
from torch import Tensor

from .op import Near, op


def _attention_cost(q: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor, max_k: int, causal: bool) -> tuple[int, int]:
    (Tq, H, D), dv = q.shape, v.shape[2]
    pairs = Tq * max_k // (2 if causal else 1)
    return 2 * H * pairs * (D + dv), q.nbytes + k_nope.nbytes + k_rope.nbytes + v.nbytes + Tq * H * dv * q.itemsize


ATTENTION = {
    "k_nope": "Tk H n", "k_rope": "Tk r", "q": "Tq H n+r", "v": "Tk H dv",
    "cu_seqlens_q": "B+1", "cu_seqlens_k": "B+1",
}  # fmt: skip


def visible_keys(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, Tq: int, Tk: int, causal: bool) -> Tensor:
    """bool [Tq, Tk]: may this query attend to this key? Same sequence and, if causal, not nearer to its end.

    Counted from the end, since the last query of a sequence sees all its keys however many queries there are.
    """
    last = cu_seqlens_q.shape[0] - 2
    queries = torch.arange(Tq, device=cu_seqlens_q.device, dtype=cu_seqlens_q.dtype)
    keys = torch.arange(Tk, device=cu_seqlens_k.device, dtype=cu_seqlens_k.dtype)
    ends_q, ends_k = cu_seqlens_q[1:].contiguous(), cu_seqlens_k[1:].contiguous()
    of_query = torch.searchsorted(ends_q, queries, right=True)  # last + 1 for padding
    of_key = torch.searchsorted(ends_k, keys, right=True)
    visible = (of_query[:, None] == of_key[None]) & (of_query <= last)[:, None]
    if causal:
        after_query = ends_q[of_query.clamp(max=last)] - queries
        after_key = ends_k[of_key.clamp(max=last)] - keys
        visible = visible & (after_key[None] >= after_query[:, None])
    return visible


def _logits(q: Tensor, k_nope: Tensor, k_rope: Tensor, scale: float, visible: Tensor) -> Tensor:
    """[H, Tq, Tk] in q's dtype, -inf where nothing is to be seen."""
    n = k_nope.shape[2]
    logits = torch.einsum("qhn,khn->hqk", q[..., :n], k_nope) + torch.einsum("qhr,kr->hqk", q[..., n:], k_rope)
    return (logits * scale).masked_fill(~visible, float("-inf"))


def _probabilities(logits: Tensor, lse: Tensor) -> Tensor:
    """softmax by a known log-sum-exp [H, Tq, 1]; zeros in rows that see nothing (lse -inf)."""
    return torch.exp(logits - lse.masked_fill(lse == float("-inf"), 0.0))


@op(
    shapes=ATTENTION,
    tolerance=(Near(2e-6, 5e-3), Near(2e-6, 1e-3)),
    cost=lambda q, k_nope, k_rope, v, cu_q, cu_k, max_q, max_k, scale, causal: _attention_cost(
        q, k_nope, k_rope, v, max_k, causal
    ),
)
def mla_attention(
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
    """softmax(q k^T * scale) v within each sequence, softmax in float32 at least.

    q [Tq, H, n + r], k_nope [Tk, H, n], k_rope [Tk, r], v [Tk, H, dv]; cu_seqlens i32 [B + 1]; max_q and max_k bound
    the sequences' lengths -> (out [Tq, H, dv], log-sum-exp of the scaled logits f32 [Tq, H]).
    causal is aligned to the end: the last query of a sequence sees all its keys. A query that sees none: 0 and -inf.
    """
    real = torch.promote_types(q.dtype, torch.float32)
    visible = visible_keys(cu_seqlens_q, cu_seqlens_k, q.shape[0], k_nope.shape[0], causal)
    logits = _logits(q.to(real), k_nope.to(real), k_rope.to(real), scale, visible)
    lse = torch.logsumexp(logits, -1, keepdim=True)  # [H, Tq, 1]
    out = torch.einsum("hqk,khd->qhd", _probabilities(logits, lse), v.to(real))
    return out.to(q.dtype).contiguous(), lse[..., 0].T.contiguous()


def _attention_backward_cost(*args: Any) -> tuple[int, int]:
    q, k_nope, k_rope, v = args[2:6]
    flops, moved = _attention_cost(q, k_nope, k_rope, v, args[11], args[13])
    D, dv = q.shape[2], v.shape[2]
    return flops * (3 * D + 2 * dv) // (D + dv), 2 * moved


# A sequence's first query sees one key: its gradient is a difference of equal numbers, a row of rounding errors.
@op(
    shapes={**ATTENTION, "grad_out": "Tq H dv", "grad_lse": "Tq H", "out": "Tq H dv", "lse": "Tq H"},
    tolerance=Near(1e-4, 1e-2),
    cost=_attention_backward_cost,
)
def mla_attention_backward(
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
    """Gradients of q, k_nope, k_rope (summed over heads) and v; the probabilities are computed again.

    grad_out [Tq, H, dv], grad_lse f32 [Tq, H] or None for zeros; out, lse: mla_attention's; the rest: its arguments.
    lse and out may also be those of a larger softmax that these keys are a part of (context parallelism).
    """
    real, n = torch.promote_types(q.dtype, torch.float32), k_nope.shape[2]
    q_, k_nope_, k_rope_, v_, grad, out_ = (x.to(real) for x in (q, k_nope, k_rope, v, grad_out, out))
    visible = visible_keys(cu_seqlens_q, cu_seqlens_k, q.shape[0], k_nope.shape[0], causal)
    p = _probabilities(_logits(q_, k_nope_, k_rope_, scale, visible), lse.to(real).T[..., None])
    delta = (grad * out_).sum(-1)  # [Tq, H]
    if grad_lse is not None:
        delta = delta - grad_lse.to(real)
    of_logits = p * (torch.einsum("qhd,khd->hqk", grad, v_) - delta.T[..., None]) * scale
    of_q = torch.cat(
        [torch.einsum("hqk,khn->qhn", of_logits, k_nope_), torch.einsum("hqk,kr->qhr", of_logits, k_rope_)], -1
    )
    of_k_nope = torch.einsum("hqk,qhn->khn", of_logits, q_[..., :n])
    of_k_rope = torch.einsum("hqk,qhr->kr", of_logits, q_[..., n:])
    of_v = torch.einsum("hqk,qhd->khd", p, grad)
    return (
        of_q.to(q.dtype).contiguous(),
        of_k_nope.to(k_nope.dtype).contiguous(),
        of_k_rope.to(k_rope.dtype).contiguous(),
        of_v.to(v.dtype).contiguous(),
    )


def _keep_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output, *inputs[4:6])
    ctx.rest = inputs[6:]
    ctx.set_materialize_grads(False)  # the gradient of lse is rare: without it kernels have less to do


@mla_attention.backward(_keep_attention)
def _(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, cu_q, cu_k = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(tensors[4])
    return *mla_attention_backward(grad_out, grad_lse, *tensors, cu_q, cu_k, *ctx.rest), *[None] * 6


def _merge_weights(lse_a: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(weight of a, weight of b, joint log-sum-exp); weights are 0 where both sides saw nothing."""
    lse = torch.logaddexp(lse_a, lse_b)
    finite = lse.masked_fill(lse == float("-inf"), 0.0)
    return torch.exp(lse_a - finite), torch.exp(lse_b - finite), lse


@op(
    shapes={"out_a": "T H dv", "lse_a": "T H", "out_b": "T H dv", "lse_b": "T H"},
    tolerance=(1e-6, 1e-6),
    cost=lambda out_a, lse_a, out_b, lse_b: (3 * out_a.numel(), 3 * out_a.nbytes + 3 * lse_a.nbytes),
)
def merge_lse(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, from the attention over each.

    out [T, H, dv], lse f32 [T, H] -> (out, lse) of the union. A side that saw no key has lse -inf; both may.
    """
    of_a, of_b, lse = _merge_weights(lse_a, lse_b)
    return (of_a[..., None] * out_a + of_b[..., None] * out_b).to(out_a.dtype), lse


@op(
    shapes={
        "grad_out": "T H dv",
        "grad_lse": "T H",
        "out_a": "T H dv",
        "lse_a": "T H",
        "out_b": "T H dv",
        "lse_b": "T H",
    },
    tolerance=Near(1e-5, 1e-2),
    cost=lambda grad_out, *rest: (8 * grad_out.numel(), 5 * grad_out.nbytes),
)
def merge_lse_backward(
    grad_out: Tensor, grad_lse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of out_a, lse_a, out_b, lse_b; grad_out [T, H, dv], grad_lse [T, H], the rest as in merge_lse."""
    of_a, of_b, _ = _merge_weights(lse_a, lse_b)
    grad = grad_out.to(of_a.dtype)
    shift = of_a * of_b * (grad * (out_a.to(of_a.dtype) - out_b)).sum(-1)  # what moving weight from b to a is worth
    return (
        (of_a[..., None] * grad).to(out_a.dtype),
        of_a * grad_lse + shift,
        (of_b[..., None] * grad).to(out_b.dtype),
        of_b * grad_lse - shift,
    )


@merge_lse.backward(lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
def _(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, ...]:
    return merge_lse_backward(grad_out, grad_lse, *ctx.saved_tensors)
