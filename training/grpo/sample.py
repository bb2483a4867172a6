"""What a rollout leaves: samples, in groups that answer one prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Sample:
    """A completion of a prompt, with everything that learning from it asks for.

    token_ids: prompt, what the model wrote, and what its environment answered. Of every token behind the prompt:
    logprobs, its log-probability at the rollout's temperature as the rollout had it (0 where the model did not write
    it), and written, whether the model did. experts i32 [len(token_ids) - 1, layers with experts, k], what the gates
    chose for every token but the last, where recorded. text: what the model wrote, a thought that the prompt opened
    included, without end tokens. finish_reason: "stop", "length" (the limit of tokens) or "turns" (that of replies).
    """

    token_ids: list[int]
    prompt_length: int
    logprobs: list[float]
    written: list[bool]
    text: str
    weight_version: int
    finish_reason: str
    experts: Tensor | None = None
    turns: int = 1
    environment_reward: float | None = None
    rewards: dict[str, float | None] = field(default_factory=dict)
    reward: float | None = None
    advantage: float = 0.0
    # Filled by the passes before the first update; f32, one for each token that the model wrote.
    old_logp: Tensor | None = None
    reference_logp: Tensor | None = None

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    @property
    def written_tokens(self) -> int:
        return sum(self.written)

    @property
    def completion_ids(self) -> list[int]:
        return self.token_ids[self.prompt_length :]

    @property
    def written_logprobs(self) -> list[float]:
        return [logprob for logprob, own in zip(self.logprobs, self.written, strict=True) if own]


@dataclass
class Group:
    """The samples of one prompt. index: its place in the run's order of prompts. row: its data. messages: how the
    conversation began."""

    index: int
    row: Mapping[str, Any]
    messages: Sequence[Mapping[str, Any]]
    samples: list[Sample]
