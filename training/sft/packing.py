"""Which samples a step learns from, which process takes them, and what goes through the model in one pass.

All of it follows from the lengths of the samples, the settings and the number of the step. Samples are units of a batch
as they are, or packed into rows: best fit, longest first, which leaves fewer tokens of a row unused than any order that
takes samples as they come (Ding et al. 2024, "Fewer Truncations Improve Language Modeling"). No unit is ever cut.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import UserError
from ..data.order import permutation, stream_key
from .config import SftBatchSection
from .samples import Samples

Indices = NDArray[np.int64]
EPOCHS_KEPT = 2


def best_fit(lengths: Sequence[int] | Indices, capacity: int) -> list[list[int]]:
    """Bins of items, by index, that hold at most `capacity`: each item, the longest first and equal ones in their
    order, goes where it leaves the least room. UserError for an item that is longer than that."""
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left -> bins
    rooms = 0  # bit r is set where some bin has room r
    for item in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[item])
        if length > capacity:
            raise UserError(f"a sample of {length} tokens does not fit into a row of {capacity}")
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            place = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, place = capacity, len(bins)
            bins.append([])
        bins[place].append(item)
        by_room.setdefault(room - length, []).append(place)
        rooms |= 1 << (room - length)
    return bins


class Plan:
    """The units (samples, or rows of them) of every step of a run, in an order that is new in every epoch.

    lengths: of all samples. Every step has the same number of units; the last ones of an epoch that do not fill a step
    begin one together with the first ones of the next epoch.
    """

    def __init__(self, lengths: Indices, batch: SftBatchSection, seq_len: int, epochs: float, steps: int, seed: int):
        self.lengths, self.seed = lengths, seed
        self.row = seq_len if batch.tokens else 0
        self.units_per_step = batch.tokens // seq_len if batch.tokens else batch.samples
        self._kept: OrderedDict[int, tuple[Indices, Indices]] = OrderedDict()
        self._ends: list[int] = []  # units up to the end of each epoch
        self.total_steps = steps or max(1, round(self._units_in(epochs) / self.units_per_step))

    def step(self, step: int) -> list[Indices]:
        """The units of a step, samples by index."""
        first = step * self.units_per_step
        return [self._unit(place) for place in range(first, first + self.units_per_step)]

    def epoch(self, step: int) -> float:
        """Passes over the samples that the steps before this one make, with the part of the last one."""
        place = step * self.units_per_step
        self._know(place)
        epoch = int(np.searchsorted(self._ends, place, side="right"))
        start = self._ends[epoch - 1] if epoch else 0
        return epoch + (place - start) / (self._ends[epoch] - start)

    def _units_in(self, epochs: float) -> float:
        whole, part = int(epochs), epochs % 1
        while len(self._ends) < whole + bool(part):
            self._add_epoch()
        before = self._ends[whole - 1] if whole else 0
        return before + (part * (self._ends[whole] - before) if part else 0)

    def _unit(self, place: int) -> Indices:
        self._know(place)
        epoch = int(np.searchsorted(self._ends, place, side="right"))
        order, borders = self._units(epoch)
        number = place - (self._ends[epoch - 1] if epoch else 0)
        return order[borders[number] : borders[number + 1]]

    def _know(self, place: int) -> None:
        while not self._ends or self._ends[-1] <= place:
            self._add_epoch()

    def _add_epoch(self) -> None:
        _, borders = self._units(len(self._ends))
        self._ends.append(len(borders) - 1 + (self._ends[-1] if self._ends else 0))

    def _units(self, epoch: int) -> tuple[Indices, Indices]:
        """(samples in their order, where each unit begins and the last one ends)."""
        if epoch not in self._kept:
            order = permutation(len(self.lengths), stream_key(self.seed, "sft", epoch, "order"))
            borders = np.arange(len(order) + 1)
            if self.row:
                packed = best_fit(self.lengths[order], self.row)
                rows = [packed[row] for row in permutation(len(packed), stream_key(self.seed, "sft", epoch, "rows"))]
                borders = np.cumsum([0, *map(len, rows)])
                order = order[np.concatenate(rows)]
            self._kept[epoch] = order, borders
            if len(self._kept) > EPOCHS_KEPT:
                self._kept.popitem(last=False)
        return self._kept[epoch]


def share(weights: Sequence[int], rank: int, world_size: int) -> list[int]:
    """The items of process `rank`, in their order, when the heaviest goes first and each to whoever has least so far.
    No process is left without one where there are as many items as processes."""
    loads = [0] * world_size
    mine = []
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        process = loads.index(min(loads))
        loads[process] += max(1, weights[item])
        if process == rank:
            mine.append(item)
    return sorted(mine)


def passes(samples: Indices, lengths: Indices, budget: int) -> list[Indices]:
    """`samples` by length, cut where a pass would hold more than `budget` tokens. Samples of one length are neighbours,
    which attention then takes together."""
    ordered = samples[np.argsort(-lengths[samples], kind="stable")]
    cuts, used = [], 0
    for place, sample in enumerate(ordered.tolist()):
        length = int(lengths[sample])
        if used and used + length > budget:
            cuts.append(place)
            used = 0
        used += length
    return np.split(ordered, cuts) if len(ordered) else []


@dataclass(frozen=True)
class Packed:
    """Samples of one pass, end to end, each without its last token, which has nothing to predict.

    tokens, positions i64 [T]; cu_seqlens i32 [B+1]; max_len: of a sample. scored i64 [S]: places whose next token is
    learnt; targets i64 [S]: that token; weights f32 [S]: of its loss.
    """

    tokens: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    max_len: int
    scored: Tensor
    targets: Tensor
    weights: Tensor

    @property
    def samples(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    def to(self, device: torch.device) -> "Packed":
        if device.type == "cpu":
            return self
        names = ("tokens", "positions", "cu_seqlens", "scored", "targets", "weights")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def collate(samples: Samples, chosen: Indices, weights: NDArray[np.float64]) -> Packed:
    """weights: of each learnt token of each chosen sample."""
    ids, masks = zip(*(samples[int(index)] for index in chosen), strict=True)
    inputs = np.array([len(tokens) - 1 for tokens in ids])
    learnt = [mask[1:] for mask in masks]
    cu_seqlens = np.concatenate(([0], np.cumsum(inputs)))
    return Packed(
        tokens=torch.from_numpy(np.concatenate([tokens[:-1] for tokens in ids])),
        positions=torch.from_numpy(np.concatenate([np.arange(count) for count in inputs])),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        max_len=int(inputs.max()),
        scored=torch.from_numpy(np.flatnonzero(np.concatenate(learnt))),
        targets=torch.from_numpy(np.concatenate([tokens[1:][mask] for tokens, mask in zip(ids, learnt, strict=True)])),
        weights=torch.from_numpy(np.repeat(weights, [mask.sum() for mask in learnt]).astype(np.float32)),
    )


def token_weights(losses: Indices, chosen: Indices, everyone: Sequence[Indices], normalise: str) -> NDArray[np.float64]:
    """Weight of each learnt token of the samples `chosen` out of the global batch `everyone`.

    losses: learnt tokens of every sample. normalise: "tokens": 1 / learnt tokens of the batch; "samples":
    1 / (samples of the batch * learnt tokens of this sample).
    """
    batch = np.concatenate(list(everyone))
    if normalise == "tokens":
        return np.full(len(chosen), 1 / losses[batch].sum())
    return 1 / (len(batch) * losses[chosen])
