"""From a plan to the tensors of a step. Built with numpy from what is kept row by row: a step of 256 requests must not
cost a loop over all their pages."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.config import ModelConfig
from .edits import edits_of
from .request import Request
from .scheduler import Work
from .step import Group, StepInput

Array = NDArray[np.int64]
tensor = torch.from_numpy


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


class Rows:
    """What is kept per running request: its pages and its sampling settings, in arrays of `count` rows."""

    def __init__(self, count: int, blocks: int) -> None:
        self.table = np.zeros((count, blocks), np.int32)
        self.temperature = np.zeros(count, np.float32)
        self.top_k = np.zeros(count, np.int32)
        self.top_p = np.ones(count, np.float32)
        self.min_p = np.zeros(count, np.float32)
        self.seed = np.zeros(count, np.int64)
        self.heat = np.ones(count, np.float32)
        self.top = np.zeros(count, np.int64)

    def update(self, request: Request) -> None:
        """Take over what the scheduler has given a request since the last step."""
        row, known, held = request.row, request.synced, len(request.blocks)
        if held == known:
            return
        if not known:
            params = request.params
            self.temperature[row], self.top_p[row], self.min_p[row] = params.temperature, params.top_p, params.min_p
            self.top_k[row], self.seed[row] = min(params.top_k, 2**31 - 1), request.seed
            self.heat[row] = params.temperature or 1.0 if params.tempered_logprobs else 1.0
            self.top[row] = params.top_logprobs
        self.table[row, known:held] = request.blocks[known:]
        request.synced = held

    def settings(self, rows: Array) -> list[Tensor]:
        """temperature, top_k, top_p, min_p and seed, as `sample` takes them."""
        return [tensor(column[rows]) for column in (self.temperature, self.top_k, self.top_p, self.min_p, self.seed)]


def build(
    works: list[Work], copies: Sequence[tuple[int, int]], rows: Rows, page: int, config: ModelConfig, per_token: bool
) -> tuple[StepInput, list[Work]]:
    """The tensors of works of one shard, and the works in their order, which is by groups.

    per_token: every new token poses as a sequence of its own, so that its numbers cannot depend on the others'.
    """
    for work in works:
        rows.update(work.request)
    form = Form.of(config)
    forms = {id(work): work.count if work.count == 1 or form.absorbs(work.start, work.count) else 0 for work in works}
    works = sorted(works, key=lambda work: (not forms[id(work)], work.count))
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
        absorbed = [forms[id(work)] for work in works]
        groups = _groups(absorbed, counts, starts + counts, owners, rows, page)
    chosen = np.array([place for place, work in enumerate(works) if work.sample], np.int64)
    sampling = [works[place] for place in chosen]
    sampled, draft, ends = _sampled(sampling, first[chosen])
    mine = owners[chosen]
    report, report_top = _reported(works, first)
    width = max((len(work.request.blocks) for work in sampling), default=0)
    step = StepInput(
        tokens=tensor(tokens),
        positions=tensor(positions),
        slots=tensor(slots),
        rows=tensor(row),
        following=tensor(following),
        copies=tensor(np.array(copies, np.int64).reshape(-1, 2).T.copy()),
        sampled=tensor(sampled),
        draft=tensor(draft),
        sampled_rows=tensor(mine),
        next_positions=tensor(ends),
        room=torch.tensor([work.request.capacity for work in sampling], dtype=torch.int64),
        table=tensor(rows.table[mine, :width]),
        settings=rows.settings(mine),
        heat=tensor(rows.heat[mine]),
        top=tensor(rows.top[mine]),
        report=tensor(report),
        report_top=tensor(report_top),
        record=any(work.request.record_experts for work in works),
        edits=edits_of([work.request for work in sampling], sampled.shape[1], config.vocab_size),
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


def _groups(absorbed: Sequence[int], counts: Array, lens: Array, owners: Array, rows: Rows, page: int) -> list[Group]:
    """Neighbours of one form. absorbed: new tokens of each sequence, or 0 where it expands."""
    groups, start = [], 0
    while start < len(absorbed):
        end = start + 1
        while end < len(absorbed) and absorbed[end] == absorbed[start]:
            end += 1
        longest = int(lens[start:end].max())
        table = rows.table[owners[start:end], : -(-longest // page)]
        groups.append(_group(absorbed[start], table, lens[start:end], counts[start:end]))
        start = end
    return groups


def _group(count: int, table: NDArray[np.int32], lens: Array, new: Array) -> Group:
    return Group(count, tensor(table), tensor(lens.astype(np.int32)), tensor(new))


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


def _reported(works: Sequence[Work], first: Array) -> tuple[Array, Array]:
    """StepInput's report and report_top: of prompts that want it, all tokens that another one follows."""
    places: list[Array] = []
    top: list[Array] = []
    for number, work in enumerate(works):
        if wanted := reported(work):
            places.append(first[number] + np.arange(wanted))
            top.append(np.full(wanted, work.request.params.top_logprobs))
    none = np.zeros(0, np.int64)
    return (np.concatenate(places), np.concatenate(top)) if places else (none, none)


def reported(work: Work) -> int:
    """How many tokens of a work are reported on."""
    request = work.request
    if not request.params.prompt_logprobs:
        return 0
    return max(min(work.start + work.count, request.prompt_length - 1) - work.start, 0)
