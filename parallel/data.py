"""Data parallelism: every process holds the whole model and takes its share of each global batch.

`DataParallel.start` reads torchrun's environment; without it there is one process and every call here is free.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UserError
from .gradients import Gradients

CPU = torch.device("cpu")


@dataclass(frozen=True)
class DataParallel:
    """One process of a data-parallel group. Use as a context manager; leaving it ends the group if it began it.

    begun: whether this one did; within a run that joined the group already, a further one shares it.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = CPU
    begun: bool = False

    @classmethod
    def start(cls, device: str = "cpu", timeout: timedelta = timedelta(minutes=30)) -> "DataParallel":
        """Join the group that torchrun describes (RANK, WORLD_SIZE, LOCAL_RANK): gloo, on GPUs nccl beside it."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls(device=torch.device(device))
        rank, world_size, local = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        where = torch.device(device)
        if where.type == "cuda":
            if local >= torch.cuda.device_count():
                raise UserError(
                    f"process {local} of this machine has no GPU: it has {torch.cuda.device_count()}; "
                    "lower torchrun --nproc-per-node"
                )
            where = torch.device("cuda", local)
            torch.cuda.set_device(where)
        begun = not dist.is_initialized()
        if begun:
            dist.init_process_group("cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo", timeout=timeout)
        return cls(rank, world_size, where, begun)

    def __enter__(self) -> "DataParallel":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.begun and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Is this the process that writes files and talks?"""
        return self.rank == 0

    def share(self, items: int) -> range:
        """The indices of a global batch that are this process's: contiguous, sizes differ by at most one."""
        return range(items * self.rank // self.world_size, items * (self.rank + 1) // self.world_size)

    def reduce_gradients(self, gradients: Gradients, average: bool = True) -> None:
        """Sum the gradients over all processes, bucket by bucket, in place; the mean where `average`."""
        if self.world_size == 1:
            return
        pending = [dist.all_reduce(flat, async_op=True) for flat in gradients.buckets]
        for flat, work in zip(gradients.buckets, pending, strict=True):
            assert work is not None  # this process belongs to the group
            work.wait()
            if average:
                flat.div_(self.world_size)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, in place. Returns the tensor."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the values of process 0, in place: parameters and buffers at the start of a run."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def broadcast_object(self, value: Any) -> Any:
        """The value of process 0, which must pickle: the checkpoint to resume from, for one."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag: is it set in any process? One small all-reduce, so that all processes decide alike."""
        if self.world_size == 1:
            return flags
        votes = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return tuple(bool(vote) for vote in votes.tolist())

    def barrier(self) -> None:
        """Wait for all processes."""
        self.any(False)
