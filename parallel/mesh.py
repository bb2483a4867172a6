"""Which process does what: a mesh of dp x tp ranks over a torch.distributed world.

Rank r is number r % tp of tensor-parallel group r // tp. The ranks of such a group see the same tokens and share out
heads, feed-forward width and vocabulary. Groups have tokens of their own, with the cache of those (data-parallel
attention). The routed experts are spread over all ranks, whatever tp is.

    world of 4:       tp = 4               tp = 2, dp = 2            dp = 4
    groups            0 1 2 3              0 1 | 2 3                 0 | 1 | 2 | 3
    experts of 8      01 23 45 67          01 23 | 45 67             01 | 23 | 45 | 67
"""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from ..errors import UserError


@dataclass(frozen=True)
class Mesh:
    """This process's place. Without group names it describes a rank (for planning) but cannot compute as one.

    tp_group, world_group: names of the process groups, as the ops take them; "" where there is one rank only.
    """

    tp: int = 1
    dp: int = 1
    rank: int = 0
    tp_group: str = ""
    world_group: str = ""

    def __post_init__(self) -> None:
        if self.tp < 1 or self.dp < 1:
            raise UserError(f"tp and dp must be at least 1, got tp = {self.tp}, dp = {self.dp}")
        if not 0 <= self.rank < self.size:
            raise UserError(f"rank {self.rank} is not one of the {self.size} of tp = {self.tp}, dp = {self.dp}")

    @classmethod
    def over_world(cls, tp: int | None = None, dp: int = 1, timeout: timedelta | None = None) -> "Mesh":
        """The mesh of the initialised world (or of this process alone). Every rank must call it, with the same numbers.

        tp: by default the world's ranks divided by dp. timeout: of the groups that this makes; None is PyTorch's.
        """
        there = dist.is_initialized()
        world, rank = (dist.get_world_size(), dist.get_rank()) if there else (1, 0)
        tp = max(world // max(dp, 1), 1) if tp is None else tp
        if tp * dp != world:
            raise UserError(f"tp = {tp}, dp = {dp} need {tp * dp} processes, and there are {world}")
        if world == 1:
            return cls()
        everyone = dist.group.WORLD
        assert everyone is not None
        mine = everyone
        if 1 < tp < world:
            for first in range(0, world, tp):  # every rank takes part in making every group
                group = dist.new_group(list(range(first, first + tp)), timeout=timeout)
                if first <= rank < first + tp:
                    mine = group
        return cls(tp, dp, rank, mine.group_name if tp > 1 else "", everyone.group_name)

    @property
    def size(self) -> int:
        """Ranks of the world."""
        return self.tp * self.dp

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def dp_rank(self) -> int:
        return self.rank // self.tp

    @property
    def leaders(self) -> list[int]:
        """The first rank of every tensor-parallel group: whose logits and samples count."""
        return list(range(0, self.size, self.tp))
