"""Decoding steps captured once per shape and replayed (`ops.capture`): a CUDA graph on a GPU, else a recorded program.

A step is captured when every sequence brings the same number of tokens. Batches are filled up to the next captured size
with sequences that live in a page of their own, which no request holds.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.cache import PagedCache, PagedStep
from ..core.model import DeepseekV3
from ..ops.capture import Captured, capture
from .step import Group, StepInput

Shape = tuple[int, int]  # sequences, and tokens of each

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # sequences of a captured step


class DecodeGraphs:
    """Of one model and its cache. spare: a page of the cache that nobody else uses."""

    def __init__(self, model: DeepseekV3, cache: PagedCache, spare: int) -> None:
        self.model, self.cache, self.spare = model, cache, spare
        self.context = model.config.max_position_embeddings
        self.width = cache.pages_for(self.context)
        self.replays = 0
        self._main: dict[Shape, Captured] = {}
        self._module: dict[Shape, Captured] = {}

    def warm(self, counts: Sequence[int], most: int) -> None:
        """Capture every size up to `most` sequences of so many tokens each, before somebody waits for it."""
        sizes = SIZES[: bisect_left(SIZES, min(most, SIZES[-1])) + 1]
        for count in counts:
            for size in sizes:
                lens, bounds = torch.tensor([count], dtype=torch.int32), torch.tensor([0, count], dtype=torch.int32)
                table = torch.full((1, 1), self.spare, dtype=torch.int32)
                alone = Group(count, count, count, count, count, table, lens, bounds)
                inputs = self._inputs(
                    torch.arange(count), self.spare * self.cache.page_size + torch.arange(count), alone, size
                )
                tokens = torch.zeros(size * count, dtype=torch.int64, device=self.cache.device)
                hidden, _ = self._replayed(self._main, self._pass, (size, count), tokens, *inputs)
                if self.model.config.num_nextn_predict_layers and len(counts) > 1:
                    self._replayed(self._module, self._module_pass, (size, count), hidden, tokens, *inputs)

    def fits(self, step: StepInput) -> bool:
        """Is it one group of a size that is captured, that wants logits of all its tokens, with nothing to record?"""
        one = len(step.groups) == 1 and len(step.groups[0].lens) <= SIZES[-1]
        return one and step.all_sampled and not step.record

    def main(self, step: StepInput, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens i64 [T] on the device -> hidden states [T, D] behind the final norm, and logits [T, V]."""
        group, size = step.groups[0], self._size(step)
        filled = self._filled(tokens, size * group.count, 0)
        inputs = self._inputs(step.positions, step.slots, group, size)
        hidden, logits = self._replayed(self._main, self._pass, (size, group.count), filled, *inputs)
        return hidden[: len(tokens)], logits[: len(tokens)]

    def module(self, step: StepInput, hidden: Tensor, following: Tensor) -> Tensor:
        """The MTP module over the same tokens -> [T, D]."""
        group, size = step.groups[0], self._size(step)
        rows = size * group.count
        filled = pad(hidden, (0, 0, 0, rows - len(hidden))), self._filled(following, rows, 0)
        inputs = self._inputs(step.positions, step.slots, group, size)
        return self._replayed(self._module, self._module_pass, (size, group.count), *filled, *inputs)[: len(hidden)]

    def _replayed(
        self,
        known: dict[Shape, Captured],
        make: Callable[[int, int], Callable[..., Any]],
        shape: Shape,
        *inputs: Tensor,
    ) -> Any:
        if shape not in known:
            known[shape] = capture(make(*shape), *inputs)
        self.replays += 1
        return known[shape].replay(*inputs)

    def _size(self, step: StepInput) -> int:
        return SIZES[bisect_left(SIZES, len(step.groups[0].lens))]

    def _filled(self, values: Tensor, length: int, value: int) -> Tensor:
        return pad(values, (0, length - len(values)), value=value)

    def _inputs(self, positions: Tensor, slots: Tensor, group: Group, size: int) -> tuple[Tensor, ...]:
        """positions, slots, table and lens on the device, and lens on the host, filled up to `size` sequences."""
        device, count, missing = self.cache.device, group.count, size - len(group.lens)
        places = torch.arange(missing * count) % count + self.spare * self.cache.page_size
        table = torch.full((size, self.width), self.spare, dtype=torch.int32)
        table[: len(group.lens), : group.table.shape[1]] = group.table
        lens = self._filled(group.lens, size, count)
        filled = (self._filled(positions, size * count, 0), torch.cat([slots, places]), table, lens)
        return *(tensor.to(device, non_blocking=True) for tensor in filled), lens

    def _bound(self, slots: Tensor, table: Tensor, lens: Tensor, lens_cpu: Tensor) -> PagedStep:
        total = len(lens) * self.context
        return PagedStep(self.cache, slots, table, lens, lens_cpu, total, self.context, True)

    def _pass(self, size: int, count: int) -> Callable[..., tuple[Tensor, Tensor]]:
        model = self.model
        bounds = torch.arange(size + 1, dtype=torch.int32, device=self.cache.device) * count

        def run(tokens: Tensor, positions: Tensor, *cache: Tensor) -> tuple[Tensor, Tensor]:
            step = model.step(positions, bounds, count, self._bound(*cache), None, self.context)
            hidden = model.model.norm(model.blocks(model.embed(tokens), step))
            return hidden, model.head(hidden)

        return run

    def _module_pass(self, size: int, count: int) -> Callable[..., Tensor]:
        model = self.model
        bounds = torch.arange(size + 1, dtype=torch.int32, device=self.cache.device) * count

        def run(hidden: Tensor, following: Tensor, positions: Tensor, *cache: Tensor) -> Tensor:
            step = model.step(positions, bounds, count, self._bound(*cache), None, self.context)
            return model.mtp(0, hidden, following, step)

        return run
