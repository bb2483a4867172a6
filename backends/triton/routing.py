"""Routing: scores, group-limited choice of experts and their weights in one pass over the logits; its gradient; counts.

A token's logits lie in the registers of one warp. Scores are compared as integers of the same order, so that ties and
NaN go where the specification's stable sort puts them: of equal ones the lowest index, NaN before everything.

The sequence-wise balance loss has no kernel: its specification makes two dozen passes over [T, E], which is less than a
hundredth of the time of the layer that it belongs to.
"""

import torch
import triton.language as tl
from torch import Tensor

from ...ops.moe import EPSILON, expert_count, route, route_backward
from .operands import by_rows
from .runtime import device_function, gpu_kernel, kernel, launch, power_of_two
from .tables import tile

MOST_EXPERTS = 1024  # in the registers of a warp
TAKEN = tl.constexpr(-(2**31))  # below every number
LOWEST = tl.constexpr(-2139095041)  # what `sortable` makes of -inf
HIGHEST = tl.constexpr(2**31 - 1)
FLOOR = tl.constexpr(EPSILON)


@device_function
def sortable(x):
    """float32 -> int32 of the same order, NaN above all numbers. (-0.0 would come below 0.0, but no score is -0.0.)"""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), HIGHEST)


@device_function
def number(key):
    """What `sortable` made an integer of."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@device_function
def take_largest(keys, index, AXIS: tl.constexpr):
    """-> index of the largest key along AXIS (size 1 there), of equal ones the lowest; keys with that one TAKEN."""
    largest = tl.max(keys, AXIS, keep_dims=True)
    best = tl.min(tl.where(keys == largest, index, HIGHEST), AXIS, keep_dims=True)
    return best, tl.where(index == best, TAKEN, keys)


@device_function
def divided(a, b):
    """a / b to the last bit, as torch divides; b may have size 1 where a has not."""
    return tl.div_rn(a, tl.broadcast_to(b, a.shape))


@device_function
def affinity(x, largest, total, SOFTMAX: tl.constexpr):
    """Scores of logits; largest and total: of the whole row, for softmax."""
    if SOFTMAX:
        return divided(tl.exp(x - largest), total)
    return divided(tl.full(x.shape, 1.0, tl.float32), 1.0 + tl.exp(-x))


@device_function
def softmax_parts(x):
    """x [ROWS, n], -inf behind the last expert -> largest and sum of exp(x - largest), both [ROWS, 1]."""
    largest = tl.max(x, 1, keep_dims=True)
    return largest, tl.sum(tl.exp(x - largest), 1, keep_dims=True)


@device_function
def limited(keys, GROUPS: tl.constexpr, KEPT: tl.constexpr, TOP2: tl.constexpr, GP: tl.constexpr, SP: tl.constexpr):
    """keys [ROWS, GP * SP] -> the same, LOWEST in all but the KEPT best of GROUPS groups (what pads stays TAKEN)."""
    ROWS: tl.constexpr = keys.shape[0]
    grouped = tl.reshape(keys, (ROWS, GP, SP))
    group = tl.broadcast_to(tl.arange(0, GP)[None, :], (ROWS, GP))
    score = number(tl.max(grouped, 2))
    if TOP2:
        member = tl.broadcast_to(tl.arange(0, SP)[None, None, :], (ROWS, GP, SP))
        _, rest = take_largest(grouped, member, 2)
        score += number(tl.max(rest, 2))
    remaining = tl.where(group < GROUPS, sortable(score), TAKEN)
    for _ in range(KEPT):
        _, remaining = take_largest(remaining, group, 1)
    kept = tl.expand_dims(remaining, 2) == TAKEN
    return tl.reshape(tl.where(kept, grouped, tl.minimum(grouped, LOWEST)), (ROWS, GP * SP))


@kernel
def route_kernel(
    logits, bias, forced, idx, w, T, logits_row, scale,
    K: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, KEPT: tl.constexpr, SOFTMAX: tl.constexpr,
    TOP2: tl.constexpr, RENORMALIZE: tl.constexpr, GP: tl.constexpr, SP: tl.constexpr, KP: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """logits f32 [T, GROUPS * SIZE], bias f32 [E] or None, forced i32 [T, K] or None -> idx i32 [T, K], w f32 [T, K].

    A row is laid out as GP groups of SP places, powers of two of which the first GROUPS and SIZE are experts.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place, column = tl.arange(0, GP * SP), tl.arange(0, KP)
    # Said twice for the compiler, which sees neighbours in the first form only.
    expert = place if SIZE == SP else place // SP * SIZE + place % SP
    real = (place // SP < GROUPS) & (place % SP < SIZE)
    inside = row < T
    x = tl.load(
        logits + row[:, None] * logits_row + expert[None, :], mask=inside[:, None] & real[None, :], other=float("-inf")
    )
    largest, total = 0.0, 0.0
    if SOFTMAX:
        largest, total = softmax_parts(x)
    wanted = inside[:, None] & (column < K)[None, :]
    if forced is not None:
        chosen = tl.load(forced + row[:, None] * K + column[None, :], mask=wanted, other=0)
    else:
        score = affinity(x, largest, total, SOFTMAX)
        if bias is not None:
            score += tl.load(bias + expert, mask=real, other=0.0)[None, :]
        keys = tl.where(real[None, :], sortable(score), TAKEN)
        if KEPT < GROUPS:
            keys = limited(keys, GROUPS, KEPT, TOP2 and SIZE > 1, GP, SP)
        experts = tl.broadcast_to(expert[None, :], (ROWS, GP * SP))
        chosen = tl.zeros((ROWS, KP), tl.int32)
        for j in range(K):
            best, keys = take_largest(keys, experts, 1)
            chosen = tl.where(column[None, :] == j, best, chosen)
    gate = affinity(
        tl.load(logits + row[:, None] * logits_row + chosen, mask=wanted, other=0.0), largest, total, SOFTMAX
    )
    if RENORMALIZE:
        gate = tl.where(column[None, :] < K, gate, 0.0)
        gate = divided(gate, tl.sum(gate, 1, keep_dims=True) + FLOOR)
    tl.store(idx + row[:, None] * K + column[None, :], chosen, mask=wanted)
    tl.store(w + row[:, None] * K + column[None, :], gate * scale, mask=wanted)


@kernel
def route_backward_kernel(
    grad, logits, idx, out, T, E, logits_row, scale,
    K: tl.constexpr, SOFTMAX: tl.constexpr, RENORMALIZE: tl.constexpr, EP: tl.constexpr, KP: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """grad f32 [T, K], logits f32 [T, E], idx i32 [T, K] -> out f32 [T, E]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert, column = tl.arange(0, EP), tl.arange(0, KP)
    inside = row < T
    mask, wanted = inside[:, None] & (expert < E)[None, :], inside[:, None] & (column < K)[None, :]
    x = tl.load(logits + row[:, None] * logits_row + expert[None, :], mask=mask, other=float("-inf"))
    largest, total = 0.0, 0.0
    if SOFTMAX:
        largest, total = softmax_parts(x)
    # Over the chosen: the sum of the scores, and that of gradient times score.
    norm, dot = tl.full((ROWS, 1), 1.0, tl.float32), tl.zeros((ROWS, 1), tl.float32)
    if RENORMALIZE:
        chosen = tl.load(idx + row[:, None] * K + column[None, :], mask=wanted, other=0)
        score = affinity(
            tl.load(logits + row[:, None] * logits_row + chosen, mask=wanted, other=0.0), largest, total, SOFTMAX
        )
        score = tl.where(wanted, score, 0.0)
        of_chosen = tl.load(grad + row[:, None] * K + column[None, :], mask=wanted, other=0.0) * scale
        norm = tl.sum(score, 1, keep_dims=True) + FLOOR
        dot = tl.sum(of_chosen * score, 1, keep_dims=True) / norm
    of_score = tl.zeros((ROWS, EP), tl.float32)
    for j in range(K):
        one = tl.load(idx + row * K + j, mask=inside, other=0)[:, None]
        of_one = (tl.load(grad + row * K + j, mask=inside, other=0.0)[:, None] * scale - dot) / norm
        of_score += tl.where(expert[None, :] == one, of_one, 0.0)
    scores = affinity(x, largest, total, SOFTMAX)
    if SOFTMAX:
        of_x = scores * (of_score - tl.sum(of_score * scores, 1, keep_dims=True))
    else:
        of_x = of_score * scores * (1.0 - scores)
    tl.store(out + row[:, None] * E + expert[None, :], of_x, mask=mask)


@kernel
def expert_count_kernel(idx, counts, pairs, E, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """idx i32 [pairs] -> counts i32 [E]: a program looks for its EXPERTS experts in all of idx."""
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    found = tl.zeros((EXPERTS, BLOCK), tl.int32)
    for first in range(0, pairs, BLOCK):
        pair = first + tl.arange(0, BLOCK)
        one = tl.load(idx + pair, mask=pair < pairs, other=-1)
        found += (one[None, :] == expert[:, None]).to(tl.int32)
    tl.store(counts + expert, tl.sum(found, 1), mask=expert < E)


# Launchers -----------------------------------------------------------------------------------------------------------


def _routes(logits: Tensor, bias: Tensor | None, k: int, groups: int, *rest: object) -> bool:
    wide = (logits.shape[1] // groups - 1).bit_length() + (groups - 1).bit_length()
    known = logits.dtype == torch.float32 and (bias is None or bias.dtype == torch.float32)
    return known and 1 << wide <= MOST_EXPERTS


@gpu_kernel(route, _routes)
def route_triton(
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
    (T, E), logits = logits.shape, by_rows(logits)
    groups = groups if topk_groups < groups else 1
    idx, w = logits.new_empty(T, k, dtype=torch.int32), logits.new_empty(T, k)
    shape = tile("route", T=T)
    launch(
        route_kernel, (-(-T // shape["ROWS"]),), logits, None if bias is None else bias.contiguous(),
        None if forced_idx is None else forced_idx.contiguous(), idx, w, T, logits.stride(0), float(scale), K=k,
        GROUPS=groups, SIZE=E // groups, KEPT=min(topk_groups, groups), SOFTMAX=score_func == "softmax",
        TOP2=group_score != "max", RENORMALIZE=renormalize, GP=power_of_two(groups), SP=power_of_two(E // groups),
        KP=power_of_two(k), **shape,
    )  # fmt: skip
    return idx, w


@gpu_kernel(
    route_backward,
    lambda grad, logits, *rest: {grad.dtype, logits.dtype} == {torch.float32} and logits.shape[1] <= MOST_EXPERTS,
)
def route_backward_triton(
    grad: Tensor, logits: Tensor, idx: Tensor, score_func: str, renormalize: bool, scale: float
) -> Tensor:
    (T, E), k, logits = logits.shape, idx.shape[1], by_rows(logits)
    out = logits.new_empty(T, E)
    shape = tile("route_backward", T=T)
    launch(
        route_backward_kernel, (-(-T // shape["ROWS"]),), grad.contiguous(), logits, idx.contiguous(), out, T, E,
        logits.stride(0), float(scale), K=k, SOFTMAX=score_func == "softmax", RENORMALIZE=renormalize,
        EP=power_of_two(E), KP=power_of_two(k), enable_fp_fusion=True, **shape,
    )  # fmt: skip
    return out


@gpu_kernel(expert_count, lambda idx, num_experts: idx.dtype == torch.int32)
def expert_count_triton(idx: Tensor, num_experts: int) -> Tensor:
    counts = idx.new_empty(num_experts)
    shape = tile("expert_count", PAIRS=idx.numel())
    launch(
        expert_count_kernel, (-(-num_experts // shape["EXPERTS"]),), idx.contiguous(), counts, idx.numel(),
        num_experts, **shape,
    )  # fmt: skip
    return counts
