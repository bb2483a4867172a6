"""From a plan to the tensors of a step. Built with numpy from what is kept row by row: a step of 256 requests must not
cost a loop over all their pages."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.cache import MixedStep, PagedCache, PagedStep, Part
from .request import Request
from .scheduler import Plan, Work

ABSORBED = 4  # new tokens of a sequence up to which attention in latent space is cheaper than expanding keys and values

Array = NDArray[np.int64]


@dataclass
class Group:
    """Sequences of a step that attend in one form. count: new tokens of each, where absorbed; else 0, any number.

    table i32 [B, W]; lens i32 [B], new tokens included; new i64 [B].
    """

    count: int
    table: Tensor
    lens: Tensor
    new: Tensor


@dataclass
class StepInput:
    """What every process computes in a step; all on the host.

    tokens, positions, slots: i64 [T], group by group; UNRESOLVED where a token was sampled in the step before and is
        known on the device only. rows: i64 [T], whose token it is (see Rows).
    following: i64 [T], the token behind each, 0 where this step is to sample it.
    sampled: i64 [B, K + 1], the places in [T] that logits are wanted of: of each request that samples, the last known
        token and its draft; -1 behind. draft: i64 [B, K], -1 behind. sampled_rows: i64 [B]. next_positions: i64 [B],
        where the first token that is sampled will stand in its sequence.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    rows: Tensor
    following: Tensor
    groups: list[Group]
    sampled: Tensor
    draft: Tensor
    sampled_rows: Tensor
    next_positions: Tensor

    def bind(self, cache: PagedCache, device: torch.device) -> "tuple[MixedStep, Tensor, int]":
        """The cache as the step sees it, cu_seqlens i32 [B + 1] of its new tokens, and the most of one sequence."""
        slots, parts, start = self.slots.to(device, non_blocking=True), [], 0
        for group in self.groups:
            size = int(group.new.sum())
            bounds = torch.nn.functional.pad(group.new.cumsum(0), (1, 0)).to(torch.int32).to(device, non_blocking=True)
            rows = slice(start, start + size)
            view = PagedStep(
                cache, slots[rows], group.table.to(device, non_blocking=True), group.lens.to(device, non_blocking=True),
                group.lens, int(group.lens.sum()), int(group.lens.max()), bool(group.count),
            )  # fmt: skip
            parts.append(Part(rows, view, bounds, int(group.new.max())))
            start += size
        every = torch.cat([group.new for group in self.groups])
        cu_seqlens = torch.nn.functional.pad(every.cumsum(0), (1, 0)).to(torch.int32).to(device, non_blocking=True)
        return MixedStep(cache, slots, parts), cu_seqlens, int(every.max())


class Rows:
    """What is kept per running request: its pages and its sampling settings, in arrays of `count` rows."""

    def __init__(self, count: int, blocks: int) -> None:
        self.table = np.zeros((count, blocks), np.int32)
        self.temperature = np.zeros(count, np.float32)
        self.top_k = np.zeros(count, np.int32)
        self.top_p = np.ones(count, np.float32)
        self.min_p = np.zeros(count, np.float32)
        self.seed = np.zeros(count, np.int64)

    def update(self, request: Request) -> None:
        """Take over what the scheduler has given a request since the last step."""
        row, known, held = request.row, request.synced, len(request.blocks)
        if held == known:
            return
        if not known:
            params = request.params
            self.temperature[row], self.top_p[row], self.min_p[row] = params.temperature, params.top_p, params.min_p
            self.top_k[row], self.seed[row] = min(params.top_k, 2**31 - 1), request.seed
        self.table[row, known:held] = request.blocks[known:]
        request.synced = held

    def settings(self, rows: NDArray[np.int64], device: torch.device) -> list[Tensor]:
        """temperature, top_k, top_p, min_p and seed, as `sample` takes them."""
        columns = (self.temperature, self.top_k, self.top_p, self.min_p, self.seed)
        return [torch.from_numpy(column[rows]).to(device, non_blocking=True) for column in columns]


def build(plan: Plan, rows: Rows, page: int, per_token: bool) -> tuple[StepInput, list[Work]]:
    """The tensors of a plan, and its works in their order, which is by groups.

    per_token: every new token poses as a sequence of its own, so that its numbers cannot depend on the others'.
    """
    for work in plan.works:
        rows.update(work.request)
    works = sorted(plan.works, key=lambda work: work.count if work.count <= ABSORBED else ABSORBED + 1)
    counts = np.array([work.count for work in works], np.int64)
    starts = np.array([work.start for work in works], np.int64)
    owners = np.array([work.request.row for work in works], np.int64)
    first = counts.cumsum() - counts
    total = int(counts.sum())
    sequence = np.repeat(np.arange(len(works)), counts)
    positions = np.arange(total) - np.repeat(first - starts, counts)
    row = owners[sequence]
    slots = rows.table[row, positions // page].astype(np.int64) * page + positions % page
    tokens, following = _tokens(works)
    if per_token:
        width = int(positions.max()) // page + 1
        groups = [_group(1, rows.table[row, :width], positions + 1, np.ones(total, np.int64))]
    else:
        groups = _groups(works, counts, starts + counts, owners, rows, page)
    sampling = [(place, work) for place, work in enumerate(works) if work.sample]
    width = max((1 + len(work.request.draft) for _, work in sampling), default=1)
    sampled = np.full((len(sampling), width), -1, np.int64)
    draft = np.full((len(sampling), width - 1), -1, np.int64)
    for number, (place, work) in enumerate(sampling):
        count = len(work.request.draft)
        end = first[place] + work.count
        sampled[number, : count + 1] = np.arange(end - count - 1, end)
        draft[number, :count] = work.request.draft
    ends = np.array([work.start + work.count - len(work.request.draft) for _, work in sampling], np.int64)
    sampled_rows = owners[np.array([place for place, _ in sampling], np.int64)]
    tensor = torch.from_numpy
    step = StepInput(
        tensor(tokens), tensor(positions), tensor(slots), tensor(row), tensor(following), groups, tensor(sampled),
        tensor(draft), tensor(sampled_rows), tensor(ends),
    )  # fmt: skip
    return step, works


def _tokens(works: Sequence[Work]) -> tuple[Array, Array]:
    """The tokens of a step, and of each the one behind it, as far as it is known."""
    tokens: list[int] = []
    following: list[int] = []
    for work in works:
        request, end = work.request, work.start + work.count
        mine = request.tokens[work.start : end] + (request.draft if work.sample else [])
        tokens += mine
        following += mine[1:]
        following.append(request.tokens[end] if end < len(request.tokens) else 0)
    return np.array(tokens, np.int64), np.array(following, np.int64)


def _groups(works: Sequence[Work], counts: Array, lens: Array, owners: Array, rows: Rows, page: int) -> list[Group]:
    groups, start = [], 0
    while start < len(works):
        count = int(counts[start]) if counts[start] <= ABSORBED else 0
        end = start
        while end < len(works) and (counts[end] == count if count else True):
            end += 1
        longest = int(lens[start:end].max())
        table = rows.table[owners[start:end], : -(-longest // page)]
        groups.append(_group(count, table, lens[start:end], counts[start:end]))
        start = end
    return groups


def _group(count: int, table: NDArray[np.int32], lens: Array, new: Array) -> Group:
    return Group(count, torch.from_numpy(table), torch.from_numpy(lens.astype(np.int32)), torch.from_numpy(new))
