"""Decoding steps captured once per shape and replayed (`ops.capture`): a CUDA graph on a GPU, on the CPU a program of
calls in C++.

A step is captured when every sequence brings the same number of tokens, and where a replay gains something. Batches are
filled up to the next captured size with sequences that live in a page of their own, which no request holds.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.cache import PagedCache, PagedStep
from ..core.model import DeepseekV3
from ..ops.capture import Captured, capture_for_speed
from .step import StepInput

Shape = tuple[int, int, int]  # sequences, tokens of each, and pages that a sequence may have

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # sequences of a captured step


class DecodeGraphs:
    """Of one model and its cache. spare: a page of the cache that nobody else uses."""

    def __init__(self, model: DeepseekV3, cache: PagedCache, spare: int) -> None:
        self.model, self.cache, self.spare = model, cache, spare
        self.context = model.config.max_position_embeddings
        self.width = cache.pages_for(self.context)
        self.on_host = cache.device.type == "cpu"
        self.replays = 0
        self._addresses: list[int] = []
        self._made: tuple[StepInput | None, tuple[Tensor, ...]] = None, ()
        self._main: dict[Shape, Captured | None] = {}
        self._module: dict[Shape, Captured | None] = {}

    def warm(self, counts: Sequence[int], most: int) -> None:
        """Capture every size up to `most` sequences of so many tokens each, before somebody waits for it."""
        sizes = SIZES[: bisect_left(SIZES, min(most, SIZES[-1])) + 1]
        for count in counts:
            for size in sizes:
                table = torch.full((1, 1), self.spare, dtype=torch.int32)
                places, lens = torch.arange(count), torch.full((1,), count, dtype=torch.int32)
                shape = size, count, self._pages(1)
                inputs = self._inputs(places, self.spare * self.cache.page_size + places, table, lens, shape)
                tokens = torch.zeros(size * count, dtype=torch.int64, device=self.cache.device)
                main = self._known(self._main, self._pass, shape, tokens, *inputs)
                if main is None:  # nor will a larger one be
                    break
                if self.model.config.num_nextn_predict_layers and len(counts) > 1:
                    hidden, _ = main.replay(tokens, *inputs)
                    self._known(self._module, self._module_pass, shape, hidden, tokens, *inputs)

    def weights_changed(self) -> None:
        """What was captured stands as long as weights, and what is derived from them, lie where they did."""
        addresses = self.model.addresses()
        if addresses != self._addresses:
            self._main.clear()
            self._module.clear()
            self._addresses = addresses

    def fits(self, step: StepInput) -> bool:
        """Is it one group of a size that can be captured, all of whose logits are wanted, with nothing to record?"""
        group = step.groups[0]
        if len(step.groups) > 1 or len(group.lens) > SIZES[-1] or step.record or not step.all_sampled:
            return False
        shape = self._shape(step)
        if shape not in self._main:
            inputs = self._of(step, shape)
            tokens = torch.zeros(shape[0] * shape[1], dtype=torch.int64, device=self.cache.device)
            self._known(self._main, self._pass, shape, tokens, *inputs)
        return self._main[shape] is not None

    def main(self, step: StepInput, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Of a step that fits: tokens i64 [T] on the device -> hidden states [T, D] behind the final norm, and logits
        [T, V]."""
        shape = self._shape(step)
        captured = self._main[shape]
        assert captured is not None
        self.replays += 1
        hidden, logits = captured.replay(self._filled(tokens, shape[0] * shape[1], 0), *self._of(step, shape))
        return hidden[: len(tokens)], logits[: len(tokens)]

    def module(self, step: StepInput, hidden: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
        """The MTP module over the same tokens -> [T, D], and logits [T, V]."""
        shape = self._shape(step)
        return self._predicted(shape, hidden, following, self._of(step, shape))

    def takes(self, sequences: int) -> bool:
        return sequences <= SIZES[-1]

    def again(
        self, hidden: Tensor, token: Tensor, positions: Tensor, slots: Tensor, table: Tensor, lens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same over a token of each sequence. hidden [B, D], token i64 [B]: on the device; the rest on the host."""
        shape = SIZES[bisect_left(SIZES, len(table))], 1, self._pages(table.shape[1])
        return self._predicted(shape, hidden, token, self._inputs(positions, slots, table, lens, shape))

    def _predicted(
        self, shape: Shape, hidden: Tensor, following: Tensor, bound: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        rows, count = shape[0] * shape[1], len(hidden)
        inputs = self._filled(hidden, rows, 0), self._filled(following, rows, 0), *bound
        captured = self._known(self._module, self._module_pass, shape, *inputs)
        run = self._module_pass(shape) if captured is None else captured.replay
        self.replays += captured is not None
        predicted, logits = run(*inputs)
        return predicted[:count], logits[:count]

    def _known(
        self,
        known: dict[Shape, Captured | None],
        make: Callable[[Shape], Callable[..., Any]],
        shape: Shape,
        *inputs: Tensor,
    ) -> Captured | None:
        if shape not in known:
            captured = capture_for_speed(make(shape), *inputs)
            self.weights_changed()  # or what was derived from them is somewhere else by now
            known[shape] = captured
        return known[shape]

    def _shape(self, step: StepInput) -> Shape:
        group = step.groups[0]
        return SIZES[bisect_left(SIZES, len(group.lens))], group.count, self._pages(group.table.shape[1])

    def _pages(self, wanted: int) -> int:
        """A graph of a device reads lengths there, and is captured for the whole context; kernels of the CPU are chosen
        by what the table could hold, and capturing takes them milliseconds: for that, powers of two."""
        return min(1 << (wanted - 1).bit_length(), self.width) if self.on_host else self.width

    def _filled(self, values: Tensor, length: int, value: int) -> Tensor:
        missing = length - len(values)
        return pad(values, (*(0, 0) * (values.dim() - 1), 0, missing), value=value) if missing else values

    def _of(self, step: StepInput, shape: Shape) -> tuple[Tensor, ...]:
        """Made once for the pass and the module."""
        made, inputs = self._made
        if made is not step:
            group = step.groups[0]
            inputs = self._inputs(step.positions, step.slots, group.table, group.lens, shape)
            self._made = step, inputs
        return inputs

    def _inputs(
        self, positions: Tensor, slots: Tensor, table: Tensor, lens: Tensor, shape: Shape
    ) -> tuple[Tensor, ...]:
        """positions, slots, table and lens on the device, and lens on the host, filled up to `shape`."""
        size, count, pages = shape
        missing, page = size - len(lens), self.cache.page_size
        if missing:
            slots = torch.cat([slots, torch.arange(missing * count) % count + self.spare * page])
            positions = self._filled(positions, size * count, 0)
            lens = self._filled(lens, size, count)
        wide = table
        if table.shape != (size, pages):
            wide = torch.full((size, pages), self.spare, dtype=torch.int32)
            wide[: len(table), : table.shape[1]] = table
        if self.on_host:
            return positions, slots, wide, lens, lens
        there = [tensor.to(self.cache.device, non_blocking=True) for tensor in (positions, slots, wide, lens)]
        return *there, lens

    def _bound(self, slots: Tensor, table: Tensor, lens: Tensor, lens_cpu: Tensor) -> PagedStep:
        total = len(lens) * self.context
        return PagedStep(self.cache, slots, table, lens, lens_cpu, total, self.context, True)

    def _pass(self, shape: Shape) -> Callable[..., tuple[Tensor, Tensor]]:
        model, (size, count, _) = self.model, shape
        bounds = torch.arange(size + 1, dtype=torch.int32, device=self.cache.device) * count

        def run(tokens: Tensor, positions: Tensor, *cache: Tensor) -> tuple[Tensor, Tensor]:
            step = model.step(positions, bounds, count, self._bound(*cache), None, self.context)
            hidden = model.model.norm(model.blocks(model.embed(tokens), step))
            return hidden, model.head(hidden)

        return run

    def _module_pass(self, shape: Shape) -> Callable[..., tuple[Tensor, Tensor]]:
        model, (size, count, _) = self.model, shape
        bounds = torch.arange(size + 1, dtype=torch.int32, device=self.cache.device) * count

        def run(hidden: Tensor, following: Tensor, positions: Tensor, *cache: Tensor) -> tuple[Tensor, Tensor]:
            step = model.step(positions, bounds, count, self._bound(*cache), None, self.context)
            predicted = model.mtp(0, hidden, following, step)
            return predicted, model.head(predicted)

        return run
