"""Exchanging tokens between ranks, as one rank sees it that exchanges with itself: the launches around a collective."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...ops.moe import destinations
from .maker import CHOSEN, EXPERTS, HIDDEN, Maker, workload

TRAINING, DECODING, OF_A_RANK = 4096, 64, 32  # tokens; experts


def _alone() -> str:
    """The name of the default group; one of this process alone is made where there is none."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return str(dist.distributed_c10d._get_default_group().group_name)


def _choice(make: Maker, tokens: int, experts: int = EXPERTS) -> Tensor:
    return torch.rand(tokens, experts, device=make.device).topk(CHOSEN).indices.int()


def _pairs() -> list[int]:
    return [TRAINING * CHOSEN]


def _place(make: Maker) -> list[Tensor]:
    idx = _choice(make, TRAINING)
    order, target, _ = destinations(idx, EXPERTS, 1)
    return [torch.empty_like(target).scatter(0, order, target).view(idx.shape).int()]


def _combine(make: Maker) -> tuple[Any, ...]:
    return make.real(TRAINING * CHOSEN, HIDDEN), _place(make), _pairs(), _pairs(), _alone()


@workload("ep_counts", "4096 of 256 experts")
def _(make: Maker) -> tuple[Any, ...]:
    return _choice(make, TRAINING), EXPERTS, _alone()


@workload("ep_dispatch", "4096 x 7168")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(TRAINING, HIDDEN), _choice(make, TRAINING), EXPERTS, _pairs(), _pairs(), _alone()


@workload("ep_dispatch", "4096 x 7168, FP8")
def _(make: Maker) -> tuple[Any, ...]:
    return make.values(TRAINING, HIDDEN), _choice(make, TRAINING), EXPERTS, _pairs(), _pairs(), _alone()


for _op in ("ep_combine", "ep_dispatch_backward", "ep_combine_backward"):
    workload(_op, "4096 x 7168")(_combine)


@workload("ep_dispatch_masked", "64 x 7168 to 32 experts")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(DECODING, HIDDEN), _choice(make, DECODING, OF_A_RANK), OF_A_RANK, DECODING, _alone()


@workload("ep_dispatch_masked", "512 x 7168 to 32 experts")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(512, HIDDEN), _choice(make, 512, OF_A_RANK), OF_A_RANK, 512, _alone()


@workload("ep_combine_masked", "64 x 7168 of 32 experts")
def _(make: Maker) -> tuple[Any, ...]:
    idx = _choice(make, DECODING, OF_A_RANK)
    order, target, offsets = destinations(idx, OF_A_RANK, 1)
    expert = idx.reshape(-1).long()[order]
    target = expert * DECODING + target - offsets.long()[expert]
    place = torch.empty_like(target).scatter(0, order, target).view(idx.shape).int()
    bound = OF_A_RANK * DECODING
    rows = torch.arange(bound, device=make.device)
    slots = torch.where(rows % DECODING < offsets.diff().repeat_interleave(DECODING), rows, bound).int()
    return make.real(OF_A_RANK, DECODING, HIDDEN), [place, slots], _alone()
