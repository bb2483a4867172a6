"""Dispatchers of experts that are spread over processes (`core.moe.Dispatcher`).

Where every rank has all tokens (tp alone), each computes what its experts add, and the sums are added up: no token
moves. Where ranks have tokens of their own (data-parallel attention), tokens travel to their experts and answers back:
with counts of the step (any number of tokens; waits for the device once a layer), or within static bounds (decoding:
the same shapes in every step, so that it can be captured). All ranks must choose alike, and all must take part, also
those without a token.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.moe import Experts
from ..ops.collectives import (
    all_gather,
    ep_combine,
    ep_combine_masked,
    ep_dispatch,
    ep_dispatch_masked,
    ep_splits,
)
from ..ops.moe import permute, unpermute
from .mesh import Mesh


class PartialDispatcher:
    """Every rank has all tokens and some of the experts -> what these add to each token; the sum is the caller's.

    Choices of other ranks' experts are rows of one more segment, which the experts leave out: shapes do not depend on
    who goes where.
    """

    def __init__(self, experts: range, align: int = 1):
        self.experts, self.align = experts, align

    def __call__(self, x: Tensor, experts: Tensor, weights: Tensor, compute: Experts) -> Tensor:
        count = len(self.experts)
        local = experts - self.experts.start
        local = torch.where((local >= 0) & (local < count), local, count)
        rows, row_map, offsets = permute(x, local, count + 1, self.align)
        return unpermute(compute(rows, offsets[:-1]), row_map, weights)


class ExchangeDispatcher:
    """Every tensor-parallel group has tokens of its own; its ranks send a part of them each, and share the results.

    capacity: None counts in each step; else a bound of the tokens of any group, known to all ranks.
    """

    def __init__(self, num_experts: int, mesh: Mesh, align: int = 1):
        self.num_experts, self.mesh, self.align = num_experts, mesh, align
        self.capacity: int | None = None

    def __call__(self, x: Tensor, experts: Tensor, weights: Tensor, compute: Experts) -> Tensor:
        tokens, mesh = x.shape[0], self.mesh
        if mesh.tp == 1:
            return self._exchange(x, experts, weights, compute)
        each = -(-tokens // mesh.tp)
        mine = slice(mesh.tp_rank * each, (mesh.tp_rank + 1) * each)
        y = self._exchange(x[mine], experts[mine], weights[mine], compute)
        if tokens == 0:
            return y
        return all_gather(pad(y, (0, 0, 0, each - y.shape[0])), mesh.tp_group)[:tokens]

    def _exchange(self, x: Tensor, experts: Tensor, weights: Tensor, compute: Experts) -> Tensor:
        if self.capacity is None:
            answers = self._counted(x, experts, compute)
        else:
            answers = self._bounded(x, experts, compute, -(-self.capacity // self.mesh.tp))
        if x.shape[0] == 0:
            return x
        places = torch.arange(experts.numel(), dtype=torch.int32, device=x.device).view(experts.shape)
        return unpermute(answers, places, weights)

    def _counted(self, x: Tensor, experts: Tensor, compute: Experts) -> Tensor:
        """x [T, D] -> [T * k, D], the answer to each choice."""
        group = self.mesh.world_group
        splits = ep_splits(experts, self.num_experts, group)
        received, expert, handle = ep_dispatch(x, experts, self.num_experts, *splits, group)
        if received.shape[0]:
            local = self.num_experts // self.mesh.size
            rows, row_map, offsets = permute(received, expert[:, None], local, self.align)
            received = unpermute(compute(rows, offsets), row_map, None)
        return ep_combine(received, handle, *splits, group)

    def _bounded(self, x: Tensor, experts: Tensor, compute: Experts, capacity: int) -> Tensor:
        """As `_counted`."""
        group = self.mesh.world_group
        received, counts, handle = ep_dispatch_masked(x, experts, self.num_experts, capacity, group)
        return ep_combine_masked(compute.masked(received, counts), handle, group)
