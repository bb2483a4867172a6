"""What a runner keeps of the requests that run, each in a row, so that a step need not ask them all again."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .request import Request
from .step import NO_VALUES

Array = NDArray[np.int64]
tensor = torch.from_numpy


@dataclass(frozen=True)
class Standing:
    """Requests that sample, as far as they are the same from step to step; the tensors are StepInput's of these names.

    rows: theirs, and `own` the same as a tensor. top: see StepInput. changing: do edits have to be looked for?
    record: does one of them want to know what the gates choose?
    """

    rows: list[int]
    own: Tensor
    table: Tensor
    room: Tensor
    settings: list[Tensor]
    heat: Tensor
    top: int
    changing: bool
    record: bool


class Rows:
    """Pages, how many, and sampling settings, in arrays of `count` rows. page: tokens of a page; pages: of a row."""

    def __init__(self, count: int, pages: int, page: int) -> None:
        self.page = page
        self.table = np.zeros((count, pages), np.int32)
        self.held = np.zeros(count, np.int64)
        self.temperature = np.zeros(count, np.float32)
        self.top_k = np.zeros(count, np.int32)
        self.top_p = np.ones(count, np.float32)
        self.min_p = np.zeros(count, np.float32)
        self.seed = np.zeros(count, np.int64)
        self.heat = np.ones(count, np.float32)
        self._standing: Standing | None = None  # of the last step, until a row changes

    def update(self, request: Request) -> None:
        """Take over the blocks that the scheduler has given a request since it was last in a step."""
        row, known, held = request.row, request.synced, len(request.blocks)
        if not known:
            params = request.params
            self.temperature[row], self.top_p[row], self.min_p[row] = params.temperature, params.top_p, params.min_p
            self.top_k[row], self.seed[row] = min(params.top_k, 2**31 - 1), request.seed
            self.heat[row] = params.temperature or 1.0 if params.tempered_logprobs else 1.0
        self.table[row, known:held] = request.blocks[known:]
        self.held[row] = request.synced = held
        self._standing = None

    def standing(self, requests: Sequence[Request]) -> Standing:
        """Of requests that are up to date. Mostly they are those of the step before, and nothing has changed."""
        rows = [request.row for request in requests]
        if self._standing is None or self._standing.rows != rows:
            self._standing = self._of(rows, requests)
        return self._standing

    def _of(self, rows: list[int], requests: Sequence[Request]) -> Standing:
        mine = np.array(rows, np.int64)
        held = self.held[mine]
        columns = self.temperature, self.top_k, self.top_p, self.min_p, self.seed  # as `sample` takes them
        special = [request for request in requests if request.special]
        heat = self.heat[mine]
        return Standing(
            rows,
            own=tensor(mine),
            table=tensor(self.table[mine, : held.max(initial=0)]),
            room=tensor(held * self.page),
            settings=[tensor(column[mine]) for column in columns],
            heat=tensor(heat) if (heat != 1).any() else NO_VALUES,
            top=max((request.params.top_logprobs for request in special), default=0),
            changing=any(request.changes_logits for request in special),
            record=any(request.record_experts for request in requests),
        )
