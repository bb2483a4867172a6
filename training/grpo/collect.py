"""The batch of a step: prompts in the run's order, their rollouts, and rewards; over all processes.

Each process writes and judges whole groups, so a group is never spread; what all of them need to know of each other's
groups, rewards and lengths, is gathered as `Record`s, and every process takes the same decisions from them.
"""

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...core.generate import SamplingParams
from ...parallel.data import DataParallel
from ..rewards.registry import Rewards
from .advantages import is_dead
from .config import GrpoConfig
from .prompts import PromptSet
from .rollouts import Rollouts
from .sample import Group
from .tally import gather

ENVIRONMENT = "environment"  # the name under which an environment's own reward is logged


@dataclass(frozen=True)
class Record:
    """What is known of a group everywhere: rewards and sizes of its samples, in their order."""

    index: int
    rewards: list[float | None]
    by_name: dict[str, list[float | None]]
    written: list[int]  # tokens
    truncated: list[bool]
    turns: list[int]

    @classmethod
    def of(cls, group: Group) -> "Record":
        samples = group.samples
        names = sorted({name for sample in samples for name in sample.rewards})
        return cls(
            group.index,
            [sample.reward for sample in samples],
            {name: [sample.rewards.get(name) for sample in samples] for name in names},
            [sample.written_tokens for sample in samples],
            [sample.truncated for sample in samples],
            [sample.turns for sample in samples],
        )


@dataclass
class Batch:
    """groups: of this process. records: of all that are trained on, in the run's order. seen: of all that were drawn.

    problems: what reward functions complained of, on this process. seconds: it took, here.
    """

    groups: list[Group] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    seen: list[Record] = field(default_factory=list)
    problems: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: {"rollout": 0.0, "reward": 0.0})


class Collector:
    """index: of the next prompt of the run."""

    def __init__(
        self, rollouts: Rollouts, rewards: Rewards, prompts: PromptSet, config: GrpoConfig, parallel: DataParallel
    ):
        self.rollouts, self.rewards, self.prompts = rollouts, rewards, prompts
        self.config, self.parallel, self.index = config, parallel, 0

    def collect(self, max_tokens: int) -> Batch:
        """The batch of the next step. With dynamic sampling, dead groups are left out and others asked for."""
        config, dynamic = self.config, self.config.dynamic_sampling
        rollout = config.rollout
        params = SamplingParams(
            temperature=rollout.temperature, top_p=rollout.top_p, max_tokens=max_tokens, tempered_logprobs=True
        )
        batch = Batch()
        for _ in range(max(dynamic.rounds, 1)):
            missing = config.prompts_per_step - len(batch.records)
            wanted = math.ceil(missing * dynamic.over_sampling) if dynamic.rounds else missing
            records = self.draw(range(self.index, self.index + wanted), params, batch)
            self.index += wanted
            batch.seen += records
            live = [record for record in records if not dynamic.rounds or not is_dead(record.rewards)]
            batch.records = (batch.records + live)[: config.prompts_per_step]
            if len(batch.records) == config.prompts_per_step:
                break
        kept = {record.index for record in batch.records}
        batch.groups = [group for group in batch.groups if group.index in kept]
        return batch

    def draw(self, indices: Sequence[int], params: SamplingParams, batch: Batch) -> list[Record]:
        """Groups for these prompts of the run, added to `batch` where they are this process's; all records."""
        mine = [indices[place] for place in self.parallel.share(len(indices))]
        rows = [(index, self.prompts.rows[self.prompts.at(index, self.config.seed)]) for index in mine]
        began = time.perf_counter()
        groups = self.rollouts.groups(rows, self.config.group_size, params, self.config.seed)
        written = time.perf_counter()
        batch.problems += judge(groups, self.rewards)
        batch.seconds["rollout"] += written - began
        batch.seconds["reward"] += time.perf_counter() - written
        batch.groups += groups
        return [record for part in gather(self.parallel, [Record.of(group) for group in groups]) for record in part]


def judge(groups: Sequence[Group], rewards: Rewards) -> Counter[str]:
    """Score all samples; returns the problems that the reward functions had.

    A sample that no function could judge has the reward None. An environment's own reward is added to theirs.
    """
    pairs = [(group, sample) for group in groups for sample in group.samples]
    if not pairs:
        return Counter()
    names = {name for group in groups for name in group.row if name != "prompt"}
    columns: dict[str, list[Any]] = {name: [group.row.get(name) for group, _ in pairs] for name in sorted(names)}
    columns["completion_ids"] = [sample.completion_ids for _, sample in pairs]
    columns["finish_reasons"] = [sample.finish_reason for _, sample in pairs]
    scores = rewards.score([list(group.messages) for group, _ in pairs], [sample.text for _, sample in pairs], columns)
    for place, (_, sample) in enumerate(pairs):
        sample.rewards = {name: values[place] for name, values in scores.by_name.items()}
        total = scores.total[place]
        if sample.environment_reward is not None:
            sample.rewards[ENVIRONMENT] = sample.environment_reward
            total += sample.environment_reward
        judged = any(reward is not None for reward in sample.rewards.values())
        sample.reward = total if judged else None
    return scores.problems


def statistics(records: Sequence[Record]) -> dict[str, float]:
    """What the log says about groups: rewards, lengths, and how many of them are dead."""
    values: dict[str, float] = {}

    def describe(name: str, numbers: Sequence[float | None], mean: str = "/mean", std: str = "/std") -> None:
        known = torch.tensor([number for number in numbers if number is not None], dtype=torch.float64)
        if len(known):
            values[name + mean] = float(known.mean())
            values[name + std] = float(known.std()) if len(known) > 1 else 0.0

    describe("reward", [reward for record in records for reward in record.rewards], "", "_std")
    for name in sorted({name for record in records for name in record.by_name}):
        describe(f"rewards/{name}", [reward for record in records for reward in record.by_name.get(name, [])])
    values["frac_reward_zero_std"] = sum(is_dead(record.rewards) for record in records) / len(records)
    lengths = [length for record in records for length in record.written]
    truncated = [cut for record in records for cut in record.truncated]
    turns = [count for record in records for count in record.turns]
    ended = [length for length, cut in zip(lengths, truncated, strict=True) if not cut] or [0]
    return values | {
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/mean_terminated_length": sum(ended) / len(ended),
        "completions/min_terminated_length": min(ended),
        "completions/max_terminated_length": max(ended),
        "completions/clipped_ratio": sum(truncated) / len(truncated),
        "completions/mean_turns": sum(turns) / len(turns),
    }
