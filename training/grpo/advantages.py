"""Advantages: how much better a completion is than the others of its group (DeepSeekMath, section 4.1.2).

A reward that is None, of a completion that no reward function could judge, is in no mean, and its advantage is 0.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

EPSILON = 1e-4  # keeps groups with nearly equal rewards finite; the value of TRL
Rewards = Sequence[float | None]


def is_dead(rewards: Rewards) -> bool:
    """Are all rewards equal? Then the group says nothing about which completion is better."""
    known = [reward for reward in rewards if reward is not None]
    return not known or max(known) - min(known) <= 1e-8


def advantages(groups: Sequence[Rewards], scale: str) -> list[list[float]]:
    """Rewards of all groups of a step -> advantages.

    scale: "group" divides by the standard deviation (n - 1) of the group's rewards, "batch" by that of all groups'
    together, "none" by nothing (Dr. GRPO: so that easy and hard prompts do not count more than others).
    """
    whole = _deviation(_known([reward for rewards in groups for reward in rewards]))
    result = []
    for rewards in groups:
        known = _known(rewards)
        mean = known.mean() if len(known) else 0.0
        divisor = {"group": _deviation(known) + EPSILON, "batch": whole + EPSILON, "none": 1.0}[scale]
        result.append([0.0 if r is None else float((r - mean) / divisor) for r in rewards])
    return result


def _known(rewards: Rewards) -> Tensor:
    return torch.tensor([reward for reward in rewards if reward is not None], dtype=torch.float64)


def _deviation(values: Tensor) -> float:
    return float(values.std()) if len(values) > 1 else 0.0
