"""Mixture of experts: routing, the two ways of keeping experts busy, and moving tokens to experts and back.

Shapes: T tokens, D hidden size, E experts, k chosen experts per token, R rows of the permuted tokens, B sequences.
A row is one (token, choice) pair. Sources: report sections 2.1.2 (equations 12-20) and 3.2.2; V2 report section 2.2 for
softmax gating with group maxima.
"""

from typing import Any

import torch
from torch import Tensor

from .formats import round_up
from .fp8 import quantize_tiles
from .op import EXACT, op

EPSILON = 1e-20  # keeps the renormalised weights finite when every chosen sigmoid underflows


def affinities(logits: Tensor, score_func: str) -> Tensor:
    """Affinities [T, E] in float32 at least."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.softmax(-1) if score_func == "softmax" else wide.sigmoid()


def _scores_backward(grad: Tensor, scores: Tensor, score_func: str) -> Tensor:
    if score_func == "softmax":
        return scores * (grad - (grad * scores).sum(-1, keepdim=True))
    return grad * scores * (1 - scores)


def _largest(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of each row, in descending order; of equal values the lowest index comes first.

    By a stable sort: the order of ties in `topk` is unspecified and differs between devices.
    """
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def group_scores(choice: Tensor, groups: int, group_score: str) -> Tensor:
    """choice [T, E] -> [T, groups]: the sum of a group's two largest (V3), or its largest (V2)."""
    grouped = choice.unflatten(-1, (groups, choice.shape[-1] // groups))
    if group_score == "max" or grouped.shape[-1] == 1:
        return grouped.amax(-1)
    return grouped.topk(2, -1).values.sum(-1)


def gate_weights(scores: Tensor, idx: Tensor, renormalize: bool, scale: float) -> Tensor:
    """Gate values f32 [T, k] of the selection idx [T, k], from affinities without bias."""
    chosen = scores.gather(1, idx.long())
    if renormalize:
        chosen = chosen / (chosen.sum(-1, keepdim=True) + EPSILON)
    return chosen * scale


def _route_cost(logits: Tensor, bias: Tensor | None, k: int, *rest: Any) -> tuple[int, int]:
    return 4 * logits.numel(), logits.nbytes + 8 * logits.shape[0] * k


@op(shapes={"logits": "T E", "bias": "E", "forced_idx": "T k"}, tolerance=(0.0, 1e-6), cost=_route_cost)
def route(
    logits: Tensor,
    bias: Tensor | None,
    k: int,
    groups: int,
    topk_groups: int,
    score_func: str,
    group_score: str,
    renormalize: bool,
    scale: float,
    forced_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose k experts for each token, of at most `topk_groups` groups of consecutive experts.

    logits f32 [T, E]; bias f32 [E] enters the choice and never the weight (loss-free balancing);
    score_func "sigmoid" (V3) or "softmax" (V2); group_score "top2" (V3) or "max" (V2).
    forced_idx i32 [T, k] replays a selection, whatever the scores say now; its weights stay live.
    -> idx i32 [T, k] in descending order of score + bias, ties to the lowest index;
       w f32 [T, k]: scores of the chosen, divided by (their sum + 1e-20) if `renormalize`, times `scale`.
    Experts of dropped groups count as -inf, not 0: biases may make a kept expert negative. Needs
    k <= topk_groups * E / groups.
    """
    scores = affinities(logits, score_func)
    if forced_idx is not None:
        return forced_idx.clone(), gate_weights(scores, forced_idx, renormalize, scale)
    choice = scores if bias is None else scores + bias
    if topk_groups < groups:
        best = _largest(group_scores(choice, groups, group_score), topk_groups)
        kept = torch.zeros(choice.shape[0], groups, dtype=torch.bool, device=choice.device).scatter(1, best, True)
        choice = choice.masked_fill(~kept.repeat_interleave(choice.shape[1] // groups, 1), float("-inf"))
    idx = _largest(choice, k)
    return idx.int(), gate_weights(scores, idx, renormalize, scale)


@op(
    shapes={"grad": "T k", "logits": "T E", "idx": "T k"},
    tolerance=1e-5,
    cost=lambda grad, logits, *rest: (8 * grad.numel() + 4 * logits.numel(), 2 * logits.nbytes),
)
def route_backward(
    grad: Tensor, logits: Tensor, idx: Tensor, score_func: str, renormalize: bool, scale: float
) -> Tensor:
    """grad f32 [T, k] of the weights, logits f32 [T, E], idx i32 [T, k] -> gradient of the logits [T, E].

    The selection is a constant: unchosen experts get a gradient through softmax only.
    """
    scores = affinities(logits, score_func)
    index = idx.long()
    of_chosen = grad.to(scores.dtype) * scale
    if renormalize:
        chosen = scores.gather(1, index)
        total = chosen.sum(-1, keepdim=True) + EPSILON
        of_chosen = (of_chosen - (of_chosen * chosen).sum(-1, keepdim=True) / total) / total
    of_scores = torch.zeros_like(scores).scatter_add(1, index, of_chosen)
    return _scores_backward(of_scores, scores, score_func).to(logits.dtype)


def _route_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[0])
    ctx.score_func, ctx.renormalize, ctx.scale = inputs[5], inputs[7], inputs[8]


@route.backward(_route_setup)
def _route_gradient(ctx: Any, grad_idx: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
    logits, idx = ctx.saved_tensors
    return route_backward(grad, logits, idx, ctx.score_func, ctx.renormalize, ctx.scale), *[None] * 9


@op(shapes={"idx": "T k"}, tolerance=EXACT, cost=lambda idx, num_experts: (idx.numel(), idx.nbytes + 4 * num_experts))
def expert_count(idx: Tensor, num_experts: int) -> Tensor:
    """idx i32 [T, k] -> how many rows chose each expert, i32 [E]."""
    flat = idx.reshape(-1).long()
    return idx.new_zeros(num_experts, dtype=torch.int32).scatter_add(0, flat, torch.ones_like(flat, dtype=torch.int32))


# ---------------------------------------------------------------------------------------------------- balance


def _load(logits: Tensor, idx: Tensor, cu_seqlens: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """-> member [B, T] (1 where the token belongs to the sequence), length [B, 1] (at least 1), load f [B, E]."""
    T, E = logits.shape
    token = torch.arange(T, device=logits.device)
    member = ((token >= cu_seqlens[:-1, None]) & (token < cu_seqlens[1:, None])).to(dtype)
    length = member.sum(1, keepdim=True).clamp(min=1)
    index = idx.long()
    ones = torch.ones_like(index, dtype=dtype)
    chosen = torch.zeros(T, E, dtype=dtype, device=logits.device).scatter_add(1, index, ones)
    return member, length, member @ chosen * (E / idx.shape[1]) / length


def _balance_cost(logits: Tensor, idx: Tensor, cu_seqlens: Tensor, score_func: str) -> tuple[int, int]:
    return 4 * cu_seqlens.numel() * logits.numel(), logits.nbytes + idx.nbytes


@op(tolerance=1e-5, cost=_balance_cost)
def sequence_balance_loss(logits: Tensor, idx: Tensor, cu_seqlens: Tensor, score_func: str) -> Tensor:
    """The sequence-wise balance loss (report, equations 17-20) without its factor alpha, averaged over sequences.

    logits f32 [T, E]; idx i32 [T, k]; cu_seqlens i32 [B + 1], boundaries of the packed sequences; tokens outside of
    them and empty sequences do not count -> scalar f32, sum_i f_i P_i: 1 when perfectly balanced, at most E / k.

    f_i counts the actual selection, bias and group limit included, as implementations do; equation 18 would select by
    affinity alone. There is no gradient through f_i.
    """
    scores = affinities(logits, score_func)
    member, length, load = _load(logits, idx, cu_seqlens, scores.dtype)
    mean = member @ (scores / scores.sum(-1, keepdim=True)) / length  # P [B, E]
    return (load * mean).sum() / (member.sum(1) > 0).sum().clamp(min=1)


@op(tolerance=1e-5, cost=lambda grad, *args: _balance_cost(*args))
def sequence_balance_loss_backward(
    grad: Tensor, logits: Tensor, idx: Tensor, cu_seqlens: Tensor, score_func: str
) -> Tensor:
    """grad f32 scalar, the rest as in the loss -> gradient of the logits [T, E]."""
    scores = affinities(logits, score_func)
    member, length, load = _load(logits, idx, cu_seqlens, scores.dtype)
    sequences = (member.sum(1) > 0).sum().clamp(min=1)
    of_share = member.T @ (load / length) * (grad / sequences)  # [T, E]
    total = scores.sum(-1, keepdim=True)
    of_scores = (of_share - (of_share * scores).sum(-1, keepdim=True) / total) / total
    return _scores_backward(of_scores, scores, score_func).to(logits.dtype)


def _balance_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.score_func = inputs[3]


@sequence_balance_loss.backward(_balance_setup)
def _balance_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return sequence_balance_loss_backward(grad, *ctx.saved_tensors, ctx.score_func), None, None, None


# ---------------------------------------------------------------------------------------------------- permutation


def permuted_rows(rows: int, num_experts: int, align: int) -> int:
    """Rows that hold `rows` (token, choice) pairs however they spread, when each expert's segment is aligned."""
    return rows if align == 1 else round_up(rows + num_experts * (align - 1), align)


def destinations(idx: Tensor, num_experts: int, align: int) -> tuple[Tensor, Tensor, Tensor]:
    """-> order i64 [T * k]: pairs sorted by expert, stably; target i64 [T * k]: their rows; offsets i32 [E + 1]."""
    flat = idx.reshape(-1).long()
    counts = expert_count.spec(idx, num_experts).long()
    padded = (counts + (align - 1)) // align * align
    ends = padded.cumsum(0)
    order = flat.argsort(stable=True)
    # Rows of expert e move from where they would start without alignment to where its segment starts.
    shift = (ends - padded) - (counts.cumsum(0) - counts)
    target = torch.arange(flat.shape[0], device=idx.device) + shift[flat[order]]
    return order, target, torch.cat([ends.new_zeros(1), ends]).int()


def _permute_cost(x: Tensor, idx: Tensor, num_experts: int, align: int) -> tuple[int, int]:
    rows = permuted_rows(idx.numel(), num_experts, align)
    return 0, x.nbytes + rows * x.shape[1] * x.element_size() + 2 * idx.nbytes


@op(shapes={"x": "T D", "idx": "T k"}, tolerance=EXACT, cost=_permute_cost)
def permute(x: Tensor, idx: Tensor, num_experts: int, align: int) -> tuple[Tensor, Tensor, Tensor]:
    """Copy each token once for every expert that it chose, sorted by expert and, within one, by token.

    x [T, D]; idx i32 [T, k] in [0, E); align: every expert's segment starts at a multiple of it (128 for FP8 wgrad)
    -> xp [R, D], where R = T * k for align 1, else round_up(T * k + E * (align - 1), align), a bound that holds for
         every idx; rows that hold no token are 0;
       row_map i32 [T, k]: the row of each (token, choice);
       offsets i32 [E + 1]: where segments begin; offsets[E] <= R ends the last one.
    """
    T, k = idx.shape
    order, target, offsets = destinations(idx, num_experts, align)
    permuted = x.new_zeros(permuted_rows(T * k, num_experts, align), x.shape[1])
    permuted = permuted.index_copy(0, target, x.index_select(0, order // k))
    row_map = torch.empty_like(target).scatter(0, order, target)
    return permuted, row_map.view(T, k).int(), offsets


def _unpermute_cost(y: Tensor, row_map: Tensor, w: Tensor | None) -> tuple[int, int]:
    pairs, tokens = row_map.numel(), row_map.shape[0]
    moved = (pairs + tokens) * y.shape[1] * y.element_size()
    return 2 * pairs * y.shape[1], moved + 4 * pairs * (1 if w is None else 2)


@op(shapes={"y": "R D", "row_map": "T k", "w": "T k"}, tolerance=1e-6, cost=_unpermute_cost)
def unpermute(y: Tensor, row_map: Tensor, w: Tensor | None) -> Tensor:
    """Sum the rows of each token: sum_j w[t, j] * y[row_map[t, j]].

    y [R, D]; row_map i32 [T, k]; w f32 [T, k], or None for ones -> [T, D] of y's dtype. Summed in float32 in the order
    j = 0 .. k - 1, so that the result does not depend on how rows were laid out.
    """
    real = torch.promote_types(y.dtype, torch.float32)
    total = torch.zeros(row_map.shape[0], y.shape[1], dtype=real, device=y.device)
    for j in range(row_map.shape[1]):
        rows = y.index_select(0, row_map[:, j].long()).to(real)
        total = total + (rows if w is None else rows * w[:, j, None])
    return total.to(y.dtype)


def _unpermute_backward_cost(grad: Tensor, row_map: Tensor, w: Tensor | None, rows: int) -> tuple[int, int]:
    return row_map.numel() * grad.shape[1], grad.nbytes + rows * grad.shape[1] * grad.element_size()


@op(shapes={"grad": "T D", "row_map": "T k", "w": "T k"}, tolerance=1e-6, cost=_unpermute_backward_cost)
def unpermute_backward(grad: Tensor, row_map: Tensor, w: Tensor | None, rows: int) -> Tensor:
    """grad [T, D], row_map i32 [T, k], w f32 [T, k] or None -> gradient of y [rows, D]; unmapped rows get 0."""
    T, k = row_map.shape
    spread = grad[:, None].expand(T, k, grad.shape[1])
    if w is not None:
        spread = (spread.to(torch.promote_types(grad.dtype, torch.float32)) * w[..., None]).to(grad.dtype)
    return grad.new_zeros(rows, grad.shape[1]).index_copy(0, row_map.reshape(-1).long(), spread.flatten(0, 1))


@op(
    shapes={"grad": "T D", "y": "R D", "row_map": "T k"},
    tolerance=1e-5,
    cost=lambda grad, y, row_map: (2 * row_map.numel() * grad.shape[1], grad.nbytes + y.nbytes),
)
def unpermute_backward_w(grad: Tensor, y: Tensor, row_map: Tensor) -> Tensor:
    """grad [T, D], y [R, D], row_map i32 [T, k] -> gradient of w [T, k] f32: grad[t] . y[row_map[t, j]]."""
    real = torch.promote_types(y.dtype, torch.float32)
    columns = row_map.long().unbind(1)
    return torch.stack([(grad.to(real) * y.index_select(0, rows).to(real)).sum(-1) for rows in columns], 1)


def _permute_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1])


@permute.backward(_permute_setup)
def _permute_gradient(ctx: Any, grad: Tensor, *of_integers: Tensor) -> tuple[Tensor | None, ...]:
    return unpermute(grad, ctx.saved_tensors[0], None), None, None, None


def _unpermute_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, row_map, w = inputs
    ctx.rows = y.shape[0]
    # y is as large as everything the experts wrote; it is kept only where the weights' gradient needs it.
    ctx.save_for_backward(row_map, w, None if w is None else y)


@unpermute.backward(_unpermute_setup)
def _unpermute_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    row_map, w, y = ctx.saved_tensors
    of_w = None if y is None else unpermute_backward_w(grad, y, row_map)
    return unpermute_backward(grad, row_map, w, ctx.rows), None, of_w


def _permute_quantize_cost(x: Tensor, idx: Tensor, num_experts: int, align: int, *rest: Any) -> tuple[int, int]:
    values = permuted_rows(idx.numel(), num_experts, align) * x.shape[1]
    return 2 * x.numel(), x.nbytes + values + values // 32 + 2 * idx.nbytes


@op(shapes={"x": "T D", "idx": "T k"}, tolerance=EXACT, cost=_permute_quantize_cost, quantized=True)
def permute_quantize(
    x: Tensor, idx: Tensor, num_experts: int, align: int, dtype: torch.dtype, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`permute`, then `quantize_tiles`, reading each token once: the input of FP8 experts.

    x [T, D]; idx i32 [T, k]; dtype: the FP8 format -> q [R, D], scales f32 [R, ceil(D / 128)] as `quantize_tiles` lays
    them out, row_map i32 [T, k], offsets i32 [E + 1]. Rows that hold no token are quantised zeros.
    """
    permuted, row_map, offsets = permute.spec(x, idx, num_experts, align)
    values, scales = quantize_tiles.spec(permuted, dtype, power_of_two)
    return values, scales, row_map, offsets
