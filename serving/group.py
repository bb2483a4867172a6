"""A runner over many processes: rank 0 plans and sends, all ranks compute, the first rank of each group answers.

With tensor parallelism the ranks of a group compute the same step, each with its share of the weights. With
data-parallel attention every group has requests, and a shard of the cache, of its own; a group that has nothing to do
in a step helps the others with its experts. See parallel/inference.py.
"""

import logging
from contextlib import suppress

import torch
from torch import Tensor

from ..core.config import ModelConfig
from ..core.model import DeepseekV3
from ..parallel.channel import Channel, PeerLost
from ..parallel.inference import idle
from ..parallel.mesh import Mesh
from .batch import build
from .compute import Computer, ComputeSettings, module_passes
from .rows import Rows
from .runner import RunnerSettings, Sampled, results
from .scheduler import Plan, Work
from .step import StepInput, StepOutput

logger = logging.getLogger(__name__)

STEP, STOP = "step", "stop"


class Member:
    """A rank: computes its group's part of each step. whole: the configuration of the whole model."""

    def __init__(self, model: DeepseekV3, mesh: Mesh, settings: RunnerSettings, whole: ModelConfig) -> None:
        self.mesh, self.settings, self.whole = mesh, settings, whole
        computing = ComputeSettings(
            settings.num_blocks, settings.rows, settings.cache_dtype, settings.speculative_tokens
        )
        self.model, self.computer = model, Computer(model, computing)

    def run(self, tensors: dict[str, Tensor]) -> StepOutput | None:
        """The step of a message; None where this group has none."""
        mine, drafted = f"{self.mesh.dp_rank}/", self.settings.speculative_tokens
        passes = int(tensors["passes"])
        part = {name.removeprefix(mine): tensor for name, tensor in tensors.items() if name.startswith(mine)}
        output, done = None, 0
        if part:
            step = StepInput.unpacked(part)
            output, done = self.computer.run(step), module_passes(step, drafted)
        elif self.mesh.dp > 1:
            idle(self.model)
        if self.mesh.dp > 1:
            for _ in range(passes - done):
                idle(self.model, 0)
        return output


def follow(member: Member, channel: Channel) -> None:
    """What every rank but the first does until the first one stops. Raises PeerLost when another rank is gone."""
    mesh = member.mesh
    while True:
        kind, tensors = channel.receive()
        if kind == STOP:
            return
        output = member.run(tensors)
        senders = [rank for rank in mesh.leaders if f"{rank // mesh.tp}/tokens" in tensors]
        channel.gather(None if output is None else output.packed(), senders)


class GroupRunner:
    """Rank 0's. num_blocks: of each group's shard."""

    ahead = False

    def __init__(self, member: Member, channel: Channel) -> None:
        self.member, self.channel, self.settings = member, channel, member.settings
        self.shards, self.num_blocks = member.mesh.dp, member.settings.num_blocks
        cache, self.config = member.computer.cache, member.whole
        self.page_size = cache.page_size
        pages = cache.pages_for(self.config.max_position_embeddings)
        self.rows = [Rows(self.settings.rows, pages, self.page_size) for _ in range(self.shards)]

    def beat(self) -> None:
        self.channel.beat()

    def launch(self, plan: Plan) -> tuple[list[list[Work]], StepOutput | None]:
        message: dict[str, Tensor] = {}
        shares: list[list[Work]] = []
        passes = 0
        for shard in range(self.shards):
            works = [work for work in plan.works if work.request.shard == shard]
            if works:
                copies = [(source, target) for place, source, target in plan.copies if place == shard]
                step, works = build(works, copies, self.rows[shard], self.config, False)
                passes = max(passes, module_passes(step, self.settings.speculative_tokens))
                message |= {f"{shard}/{name}": tensor for name, tensor in step.packed().items()}
            shares.append(works)
        message["passes"] = torch.tensor(passes)
        self.channel.send(STEP, message)
        try:
            return shares, self.member.run(message)
        except Exception as error:
            logger.exception("a step failed")
            raise PeerLost("a step failed here, and the other ranks are still in it: there is no going on") from error

    def resolve(self, launched: tuple[list[list[Work]], StepOutput | None]) -> list[tuple[Work, Sampled]]:
        shares, own = launched
        busy = [shard for shard, works in enumerate(shares) if works]
        answers = self.channel.gather(
            None if own is None else own.packed(), [self.member.mesh.leaders[shard] for shard in busy]
        )
        pairs = []
        for shard, tensors in zip(busy, answers, strict=True):
            pairs += results(shares[shard], StepOutput(**tensors))
        return pairs

    def close(self) -> None:
        """Let the other ranks go. Those that are gone already need not be told."""
        with suppress(PeerLost):
            self.channel.send(STOP)
