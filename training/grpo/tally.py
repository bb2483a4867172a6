"""Numbers about a step, gathered piece by piece: over micro-batches, over updates, over processes."""

from collections.abc import Iterable
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from ...parallel.data import DataParallel

T = TypeVar("T")


class Tally:
    """Means, smallest and largest values, by name. A mean of nothing, and an extreme of nothing, has no value."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}  # name -> (sum, how many)
        self.extremes: dict[str, tuple[float, bool]] = {}  # name -> (value, is it the largest?)

    def mean(self, name: str, values: Tensor) -> None:
        """Take in values of any shape."""
        self._add(name, float(values.double().sum()), values.numel())

    def least(self, name: str, values: Tensor) -> None:
        if values.numel():
            self._extreme(name, float(values.min()), False)

    def most(self, name: str, values: Tensor) -> None:
        if values.numel():
            self._extreme(name, float(values.max()), True)

    def merge(self, others: Iterable["Tally"]) -> "Tally":
        """Take in what others have seen; returns itself."""
        for other in others:
            for name, (total, count) in other.sums.items():
                self._add(name, total, count)
            for name, (value, largest) in other.extremes.items():
                self._extreme(name, value, largest)
        return self

    def values(self) -> dict[str, float]:
        means = {name: total / count for name, (total, count) in self.sums.items() if count}
        return means | {name: value for name, (value, _) in self.extremes.items()}

    def _add(self, name: str, total: float, count: float) -> None:
        before = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = before[0] + total, before[1] + count

    def _extreme(self, name: str, value: float, largest: bool) -> None:
        if name in self.extremes:
            value = (max if largest else min)(self.extremes[name][0], value)
        self.extremes[name] = value, largest


def gather(parallel: DataParallel, value: T) -> list[T]:
    """What every process has, in the order of ranks, on every process; the values must pickle."""
    if parallel.world_size == 1:
        return [value]
    box: list[T] = [value] * parallel.world_size
    dist.all_gather_object(box, value)
    return box
