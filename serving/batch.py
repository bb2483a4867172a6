"""From a plan to the tensors of a step. Built with numpy from what is kept row by row: a step of 256 requests must not
cost a loop over all their pages. Nor must that of one request cost more than a few calls: most steps only decode, and
are built in a way of their own."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.config import ModelConfig
from .edits import edits_of
from .rows import Array, Rows, tensor
from .scheduler import Work
from .step import NO_IDS, Group, StepInput

NO_COPIES = torch.empty(2, 0, dtype=torch.int64)


@dataclass(frozen=True)
class Form:
    """When to attend in latent space, and when to expand keys and values first (core/mla.py), by multiplications.

    To expand costs R (n + v) per head and token that is seen, and then n + r + v per pair of tokens. Latent space costs
    R (n + v) per new token, and 2 R + r per pair. For DeepSeek-V3 that is even at 171 new tokens behind a long context.
    """

    kv_lora_rank: int
    qk_nope_head_dim: int
    v_head_dim: int

    @classmethod
    def of(cls, config: ModelConfig) -> "Form":
        return cls(config.kv_lora_rank, config.qk_nope_head_dim, config.v_head_dim)

    def absorbs(self, start: int, count: int) -> bool:
        """Is latent space cheaper for `count` new tokens behind `start` others?"""
        expanded = self.qk_nope_head_dim + self.v_head_dim
        pairs = count * (start + (count + 1) / 2)
        return pairs * (2 * self.kv_lora_rank - expanded) <= start * self.kv_lora_rank * expanded


def build(
    works: list[Work], copies: Sequence[tuple[int, int]], rows: Rows, config: ModelConfig, per_token: bool
) -> tuple[StepInput, list[Work]]:
    """The tensors of works of one shard, and the works in their order, which is by groups.

    per_token: every new token poses as a sequence of its own, so that its numbers cannot depend on the others'.
    """
    width, alike = works[0].count, True
    for work in works:
        request = work.request
        if len(request.blocks) != request.synced:
            rows.update(request)
        if work.count != width or not work.sample or len(request.draft) != width - 1:
            alike = False
    if alike and (width == 1 or (not per_token and Form.of(config).absorbs(min(w.start for w in works), width))):
        return decoding(works, copies, rows, config.vocab_size), works
    return mixed(works, copies, rows, config, per_token)


def decoding(works: Sequence[Work], copies: Sequence[tuple[int, int]], rows: Rows, vocab_size: int) -> StepInput:
    """Of works that sample behind a known token and as many drafts each: one group, no prompt to report on."""
    requests, page, width = [work.request for work in works], rows.page, works[0].count
    standing, always = rows.standing(requests), _same_always(len(works), width)
    # Loops, because a dozen calls of numpy take longer.
    starts = [work.start for work in works]
    if width == 1:
        places, following, draft = starts, always.following, always.draft
        newest = [work.request.tokens[work.start] for work in works]
        slots = [work.request.blocks[work.start // page] * page + work.start % page for work in works]
    else:
        places = [place for start in starts for place in range(start, start + width)]
        newest = [token for work in works for token in (work.request.tokens[work.start], *work.request.draft)]
        slots = [
            work.request.blocks[place // page] * page + place % page
            for work in works
            for place in range(work.start, work.start + width)
        ]
        draft = tensor(np.array([request.draft for request in requests], np.int64))
        following = tensor(np.array([token for work in works for token in (*work.request.draft, 0)], np.int64))
    lens = [start + width for start in starts]
    group = Group(
        width, len(places), width, sum(lens), max(lens), standing.table[:, : -(-max(lens) // page)],
        tensor(np.array(lens, np.int32)), always.bounds,
    )  # fmt: skip
    return StepInput(
        tokens=tensor(np.array(newest, np.int64)),
        positions=tensor(np.array(places, np.int64)),
        slots=tensor(np.array(slots, np.int64)),
        rows=standing.own if width == 1 else tensor(standing.own.numpy().repeat(width)),
        following=following,
        bounds=always.bounds,
        copies=_copies(copies),
        sampled=always.sampled,
        all_sampled=True,
        draft=draft,
        sampled_rows=standing.own,
        next_positions=tensor(np.array(starts, np.int64) + 1),
        room=standing.room,
        table=standing.table,
        settings=standing.settings,
        heat=standing.heat,
        top=standing.top,
        report=NO_IDS,
        report_top=0,
        record=standing.record,
        edits=edits_of(requests, width, vocab_size) if standing.changing else None,
        groups=[group],
    )


@dataclass(frozen=True)
class _Always:
    """What all steps that decode so many requests, so many tokens each, have in common; see StepInput."""

    bounds: Tensor
    following: Tensor
    sampled: Tensor
    draft: Tensor


@lru_cache(maxsize=1024)
def _same_always(count: int, width: int) -> _Always:
    return _Always(
        torch.arange(count + 1, dtype=torch.int32) * width,
        torch.zeros(count, dtype=torch.int64),
        torch.arange(count * width).view(count, width),
        torch.empty(count, 0, dtype=torch.int64),
    )


def _copies(copies: Sequence[tuple[int, int]]) -> Tensor:
    return torch.tensor(copies).T.contiguous() if copies else NO_COPIES


def mixed(
    works: Sequence[Work], copies: Sequence[tuple[int, int]], rows: Rows, config: ModelConfig, per_token: bool
) -> tuple[StepInput, list[Work]]:
    """Of any works: see build."""
    form, page = Form.of(config), rows.page
    forms = {id(work): work.count if work.count == 1 or form.absorbs(work.start, work.count) else 0 for work in works}
    works = sorted(works, key=lambda work: (not forms[id(work)], work.count))
    counts = np.array([work.count for work in works], np.int64)
    starts = np.array([work.start for work in works], np.int64)
    owners = np.array([work.request.row for work in works], np.int64)
    bounds = np.concatenate([[0], counts.cumsum()])
    first, total = bounds[:-1], int(bounds[-1])
    sequence = np.repeat(np.arange(len(works)), counts)
    positions = np.arange(total) - np.repeat(first - starts, counts)
    row = owners[sequence]
    slots = rows.table[row, positions // page].astype(np.int64) * page + positions % page
    tokens, following = _tokens(works)
    if per_token:
        width = int(positions.max()) // page + 1
        bounds = np.arange(total + 1)
        groups = [_group(1, rows.table[row, :width], positions + 1, bounds)]
    else:
        absorbed = [forms[id(work)] for work in works]
        groups = _groups(absorbed, bounds, starts + counts, owners, rows)
    chosen = np.array([place for place, work in enumerate(works) if work.sample], np.int64)
    sampling = [works[place] for place in chosen]
    sampled, draft, ends = _sampled(sampling, first[chosen])
    requests = [work.request for work in sampling]
    standing = rows.standing(requests)
    report, report_top = _reported(works, first)
    step = StepInput(
        tokens=tensor(tokens),
        positions=tensor(positions),
        slots=tensor(slots),
        rows=tensor(row),
        following=tensor(following),
        bounds=tensor(bounds.astype(np.int32)),
        copies=_copies(copies),
        sampled=tensor(sampled),
        all_sampled=sampled.size == total and bool((sampled >= 0).all()),
        draft=tensor(draft),
        sampled_rows=standing.own,
        next_positions=tensor(ends),
        room=standing.room,
        table=standing.table,
        settings=standing.settings,
        heat=standing.heat,
        top=standing.top,
        report=tensor(report),
        report_top=report_top,
        record=any(work.request.record_experts for work in works),
        edits=edits_of(requests, sampled.shape[1], config.vocab_size) if standing.changing else None,
        groups=groups,
    )
    return step, works


def _tokens(works: Sequence[Work]) -> tuple[Array, Array]:
    """The tokens of a step, and of each the one behind it, as far as it is known."""
    tokens: list[int] = []
    following: list[int] = []
    for work in works:
        request, end = work.request, work.start + work.count
        mine = request.tokens[work.start : end]
        if work.sample and request.draft:
            mine = mine + request.draft
        tokens += mine
        following += mine[1:]
        following.append(request.tokens[end] if end < len(request.tokens) else 0)
    return np.array(tokens, np.int64), np.array(following, np.int64)


def _groups(absorbed: Sequence[int], bounds: Array, lens: Array, owners: Array, rows: Rows) -> list[Group]:
    """Neighbours of one form. absorbed: new tokens of each sequence, or 0 where it expands. bounds: StepInput's."""
    groups, start = [], 0
    while start < len(absorbed):
        end = start + 1
        while end < len(absorbed) and absorbed[end] == absorbed[start]:
            end += 1
        longest = int(lens[start:end].max())
        table = rows.table[owners[start:end], : -(-longest // rows.page)]
        groups.append(_group(absorbed[start], table, lens[start:end], bounds[start : end + 1] - bounds[start]))
        start = end
    return groups


def _group(count: int, table: NDArray[np.int32], lens: Array, bounds: Array) -> Group:
    return Group(
        count, int(bounds[-1]), int(np.diff(bounds).max()), int(lens.sum()), int(lens.max()),
        tensor(table), tensor(lens.astype(np.int32)), tensor(bounds.astype(np.int32)),
    )  # fmt: skip


def _sampled(works: Sequence[Work], first: Array) -> tuple[Array, Array, Array]:
    """StepInput's sampled, draft and next_positions; first: where each work's tokens begin."""
    width = max((1 + len(work.request.draft) for work in works), default=1)
    if width == 1:
        counts = np.array([work.count for work in works], np.int64)
        ends = np.array([work.start for work in works], np.int64) + counts
        return (first + counts - 1)[:, None], np.zeros((len(works), 0), np.int64), ends
    sampled = np.full((len(works), width), -1, np.int64)
    draft = np.full((len(works), width - 1), -1, np.int64)
    ends = np.zeros(len(works), np.int64)
    for number, work in enumerate(works):
        drafted = work.request.draft
        end = first[number] + work.count
        sampled[number, : len(drafted) + 1] = np.arange(end - len(drafted) - 1, end)
        draft[number, : len(drafted)] = drafted
        ends[number] = work.start + work.count - len(drafted)
    return sampled, draft, ends


def _reported(works: Sequence[Work], first: Array) -> tuple[Array, int]:
    """StepInput's report and report_top: of prompts that want it, all tokens that another one follows."""
    places, top = [np.zeros(0, np.int64)], 0
    for number, work in enumerate(works):
        if wanted := reported(work):
            places.append(first[number] + np.arange(wanted))
            top = max(top, work.request.params.top_logprobs)
    return np.concatenate(places), top


def reported(work: Work) -> int:
    """How many tokens of a work are reported on."""
    request = work.request
    if not request.params.prompt_logprobs:
        return 0
    return max(min(work.start + work.count, request.prompt_length - 1) - work.start, 0)
