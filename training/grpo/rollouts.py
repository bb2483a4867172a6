"""From prompts to samples: episodes that a rollout writes in and an environment answers, all groups of a step together.

Tokens go in as they came out: a conversation that goes on is the ids that were written, followed by the ids of what the
environment said. Every completion has a seed of its own, which follows from the run's seed, the place of its prompt in
the run and its place in the group; so it does not depend on how prompts are spread over processes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...core.completer import opened_thought
from ...core.generate import Completion, Rollout, SamplingParams
from ..data.order import stream_key
from .environment import Environment, Message, Opening, Reply, SingleTurn
from .prompts import PromptFormat
from .sample import Group, Sample
from .tools import read_reply

ANSWERING_THREADS = 16  # environments that answer at the same time


def completion_seed(seed: int, index: int, member: int) -> int:
    """63 bits for the completion `member` of prompt number `index` of a run with the seed `seed`."""
    return int(stream_key("completion", seed, index, member)) >> 1


@dataclass
class Episode:
    """A conversation in the making."""

    environment: Environment
    opening: Opening
    prompt_ids: list[int]
    params: SamplingParams
    token_ids: list[int]
    messages: list[Message]
    logprobs: list[float] = field(default_factory=list)
    written: list[bool] = field(default_factory=list)
    experts: list[Tensor] = field(default_factory=list)
    reply: Reply = field(default_factory=lambda: Reply("", ""))
    text: str = ""
    turns: int = 0
    weight_version: int = 0
    finish_reason: str | None = None

    @property
    def read(self) -> int:
        """Tokens whose experts are known."""
        return sum(len(part) for part in self.experts)


class Rollouts:
    """Completions of prompts, by `rollout`.

    max_turns: replies of one episode. tokens_at_once: prompts and room for completions that are generated together.
    context: tokens that the model can hold. record_experts: keep what the gates chose.
    """

    def __init__(
        self,
        rollout: Rollout,
        format: PromptFormat,
        context: int,
        tokens_at_once: int,
        environment: Callable[[], Environment] = SingleTurn,
        max_turns: int = 1,
        record_experts: bool = False,
    ):
        self.rollout, self.format, self.tokenizer = rollout, format, format.tokenizer
        self.context, self.tokens_at_once = context, tokens_at_once
        self.environment, self.max_turns, self.record_experts = environment, max_turns, record_experts
        self.ends = {format.end_id, format.tokenizer.eos_id}

    def groups(
        self, prompts: Sequence[tuple[int, Mapping[str, Any]]], size: int, params: SamplingParams, seed: int
    ) -> list[Group]:
        """`size` samples for each prompt, given as (index in the run, row)."""
        episodes = []
        for index, row in prompts:
            for member in range(size):
                episodes.append(self._begin(row, replace(params, seed=completion_seed(seed, index, member))))
        self._play(episodes)
        samples = [self._sample(episode) for episode in episodes]
        return [
            Group(index, row, episodes[i * size].opening.messages, samples[i * size : (i + 1) * size])
            for i, (index, row) in enumerate(prompts)
        ]

    def _begin(self, row: Mapping[str, Any], params: SamplingParams) -> Episode:
        environment = self.environment()
        opening = environment.reset(row)
        ids = self.format.encode(opening.messages, opening.tools)
        params = replace(params, stop_token_ids=(self.format.end_id,))
        return Episode(environment, opening, ids, params, list(ids), list(opening.messages))

    def _play(self, episodes: list[Episode]) -> None:
        """Until all have ended."""
        running = episodes
        with ThreadPoolExecutor(ANSWERING_THREADS) as pool:
            while running:
                for batch in self._batches(running):
                    completions = self.rollout.generate(
                        [episode.token_ids for episode in batch],
                        [self._room(episode) for episode in batch],
                        record_experts=self.record_experts,
                    )
                    for episode, completion in zip(batch, completions, strict=True):
                        self._take(episode, completion)
                running = [episode for episode in running if episode.finish_reason is None]
                if self.max_turns > 1:
                    list(pool.map(self._answer, running))
                else:
                    for episode in running:
                        self._answer(episode)
                running = [episode for episode in running if episode.finish_reason is None]

    def _room(self, episode: Episode) -> SamplingParams:
        """What is left of the tokens that the model may write in this episode."""
        assert episode.params.max_tokens is not None
        return replace(episode.params, max_tokens=episode.params.max_tokens - sum(episode.written))

    def _batches(self, episodes: list[Episode]) -> Iterator[list[Episode]]:
        """Neighbours in length together: they are read at about the same time."""
        batch: list[Episode] = []
        tokens = 0
        for episode in sorted(episodes, key=lambda episode: len(episode.token_ids)):
            size = min(len(episode.token_ids) + (self._room(episode).max_tokens or 0), self.context)
            if batch and tokens + size > self.tokens_at_once:
                yield batch
                batch, tokens = [], 0
            batch.append(episode)
            tokens += size
        if batch:
            yield batch

    def _take(self, episode: Episode, completion: Completion) -> None:
        """Add a turn of the model to its episode."""
        ids = completion.token_ids
        own = ids[:-1] if ids and ids[-1] in self.ends else ids
        opened = opened_thought(self.tokenizer, episode.token_ids)
        episode.reply = read_reply(own, self.tokenizer, self.format.format, opened)
        episode.text += episode.reply.text
        episode.turns += 1
        episode.weight_version = completion.weight_version
        episode.token_ids += ids
        episode.logprobs += completion.logprobs
        episode.written += [True] * len(ids)
        if completion.experts is not None:
            # What the gates chose while earlier turns were written stays.
            episode.experts.append(completion.experts[episode.read :].cpu())
        if completion.finish_reason == "length":
            episode.finish_reason = "length"

    def _answer(self, episode: Episode) -> None:
        """Let the environment answer the last turn, or end the episode."""
        answer = episode.environment.step(episode.reply)
        if not answer or episode.turns == self.max_turns:
            episode.finish_reason = "turns" if answer else "stop"
            return
        episode.messages.append(_as_message(episode.reply))
        ids = self.format.encode_answer(episode.messages, answer, episode.opening.tools)
        episode.messages += answer
        episode.token_ids += ids
        episode.logprobs += [0.0] * len(ids)
        episode.written += [False] * len(ids)
        assert episode.params.max_tokens is not None
        if len(episode.token_ids) >= self.context or sum(episode.written) >= episode.params.max_tokens:
            episode.finish_reason = "length"

    def _sample(self, episode: Episode) -> Sample:
        experts = torch.cat(episode.experts) if episode.experts else None
        return Sample(
            episode.token_ids, len(episode.prompt_ids), episode.logprobs, episode.written, episode.text,
            episode.weight_version, episode.finish_reason or "stop", experts, episode.turns,
            episode.environment.reward,
        )  # fmt: skip


def _as_message(reply: Reply) -> Message:
    """The reply as a message of the conversation: only its place and its number of calls enter what follows it."""
    if not reply.calls:
        return {"role": "assistant", "content": reply.content}
    call = {"type": "function", "function": {"name": "tool", "arguments": "{}"}}
    return {"role": "assistant", "content": reply.content, "tool_calls": [call] * len(reply.calls)}
