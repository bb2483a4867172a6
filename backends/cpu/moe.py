"""Mixture of experts on the CPU: selections without a sort, and rows that move once."""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ...ops.formats import round_up
from ...ops.fp8 import SCALE_ROWS, quantize_tiles
from ...ops.moe import (
    affinities,
    destinations,
    gate_weights,
    group_scores,
    permute,
    permute_quantize,
    permuted_rows,
    route,
    unpermute,
    unpermute_backward,
)

FEW_SCORES = 2048  # up to here a stable sort is faster than the way around it


def _largest(values: Tensor, count: int) -> Tensor:
    """As in the specification, by `topk` of distinct integers: a float's bits in sortable order, then its index's
    complement, so that of equal values the lowest index is the largest. A quarter of the time of a stable sort."""
    if values.numel() <= FEW_SCORES:
        return values.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    bits = values.view(torch.int32)  # no -0.0 among them: scores are positive, and 0.0 + -0.0 = 0.0
    keys = (bits ^ (bits >> 31).bitwise_and_(0x7FFFFFFF)).long().bitwise_left_shift_(32)
    keys.bitwise_or_(torch.arange(values.shape[1] - 1, -1, -1))
    return keys.topk(count).indices


@route.kernel("cpu", "torch", supports=lambda logits, *rest: logits.dtype == torch.float32)
def route_torch(
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
    scores = affinities(logits, score_func)
    return choose(scores, bias, k, groups, topk_groups, group_score, renormalize, scale, forced_idx)


def choose(
    scores: Tensor,
    bias: Tensor | None,
    k: int,
    groups: int,
    topk_groups: int,
    group_score: str,
    renormalize: bool,
    scale: float,
    forced_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`route` from the affinities [T, E] on."""
    if forced_idx is not None:
        return forced_idx.clone(), gate_weights(scores, forced_idx, renormalize, scale)
    choice = scores if bias is None else scores + bias
    if topk_groups < groups:
        best = _largest(group_scores(choice, groups, group_score), topk_groups)
        dropped = torch.ones(choice.shape[0], groups, dtype=torch.bool).scatter_(1, best, False)
        choice = choice.unflatten(1, (groups, -1)).masked_fill(dropped[..., None], float("-inf")).flatten(1)
    idx = _largest(choice, k)
    return idx.int(), gate_weights(scores, idx, renormalize, scale)


@permute.kernel("cpu", "torch")
def permute_torch(x: Tensor, idx: Tensor, num_experts: int, align: int) -> tuple[Tensor, Tensor, Tensor]:
    T, k = idx.shape
    if align == 1:  # every row holds a token, in order
        sorted_idx, order = idx.flatten().sort(stable=True)
        offsets = torch.searchsorted(sorted_idx, torch.arange(num_experts + 1, dtype=idx.dtype), out_int32=True)
        row_map = torch.empty(T * k, dtype=torch.int32).scatter_(0, order, torch.arange(T * k, dtype=torch.int32))
        return x.index_select(0, order // k), row_map.view(T, k), offsets
    order, target, offsets = destinations(idx, num_experts, align)
    row_map = torch.empty_like(target).scatter_(0, order, target).view(T, k).int()
    source = order // k
    permuted = x.new_zeros(permuted_rows(T * k, num_experts, align), x.shape[1])
    for first, last, begin in _segments(idx, offsets, num_experts):
        torch.index_select(x, 0, source[first:last], out=permuted[begin : begin + last - first])
    return permuted, row_map, offsets


def _segments(idx: Tensor, offsets: Tensor, num_experts: int) -> list[tuple[int, int, int]]:
    """(first and last sorted pair, row of the first one) of every expert that was chosen."""
    ends = torch.bincount(idx.flatten(), minlength=num_experts).cumsum(0).tolist()
    return [
        (first, last, begin)
        for first, last, begin in zip([0, *ends[:-1]], ends, offsets.tolist()[:-1], strict=True)
        if first < last
    ]


def _is_bag(y: Tensor, row_map: Tensor, w: Tensor | None) -> bool:
    return y.dtype == torch.float32 or (y.dtype == torch.bfloat16 and w is None)


@unpermute.kernel("cpu", "embedding_bag", priority=10, supports=_is_bag)
def unpermute_bag(y: Tensor, row_map: Tensor, w: Tensor | None) -> Tensor:
    """A bag of embeddings, which the CPU sums in float32 and in order: a third of the time of row by row."""
    return embedding_bag(row_map, y, per_sample_weights=w, mode="sum")


@unpermute.kernel("cpu", "torch")
def unpermute_torch(y: Tensor, row_map: Tensor, w: Tensor | None) -> Tensor:
    total = torch.zeros(row_map.shape[0], y.shape[1], dtype=torch.promote_types(y.dtype, torch.float32))
    for j, rows in enumerate(row_map.unbind(1)):
        picked = y.index_select(0, rows)
        if w is None:
            total += picked
        else:
            total.addcmul_(picked.to(total.dtype), w[:, j, None])
    return total.to(y.dtype)


@unpermute_backward.kernel("cpu", "torch")
def unpermute_backward_torch(grad: Tensor, row_map: Tensor, w: Tensor | None, rows: int) -> Tensor:
    out = grad.new_zeros(rows, grad.shape[1])
    for j, places in enumerate(row_map.long().unbind(1)):
        out.index_copy_(0, places, grad if w is None else (grad * w[:, j, None]).to(grad.dtype))
    return out


@permute_quantize.kernel("cpu", "torch")
def permute_quantize_torch(
    x: Tensor, idx: Tensor, num_experts: int, align: int, dtype: torch.dtype, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each token is quantised once, and then copied as bytes."""
    values, scales = quantize_tiles(x, dtype, power_of_two)
    permuted, row_map, offsets = permute_torch(values.view(torch.uint8), idx, num_experts, align)
    rows = permuted.shape[0]
    columns = scales.new_zeros(scales.shape[1], round_up(rows, SCALE_ROWS))  # M-major, as quantize_tiles has them
    columns[:, :rows] = 1.0  # the scale of zeros
    for places in row_map.long().unbind(1):
        columns.index_copy_(1, places, scales.T)
    return permuted.view(dtype), columns.T[:rows], row_map, offsets
