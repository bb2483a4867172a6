"""Carries out plans: on this process's model, or wherever another `Runner` has it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import torch
from torch import Tensor

from ..core.model import DeepseekV3
from .batch import build, reported
from .compute import Computer, ComputeSettings
from .messages import TopLogprobs
from .request import Request
from .rows import Rows
from .scheduler import Plan, Work
from .step import StepOutput


class Sampled(msgspec.Struct):
    """What a step gave one of its works. tokens: empty where nothing was to be sampled. prompt_logprobs, prompt_top: of
    the tokens behind the work's ones, as far as the prompt goes."""

    tokens: list[int] = []
    logprobs: list[float] = []
    top: list[TopLogprobs] = []
    prompt_logprobs: list[float] = []
    prompt_top: list[TopLogprobs] = []
    draft: list[int] = []


class Runner(Protocol):
    """page_size, num_blocks: of each of `shards` parts of the cache. ahead: may a step be launched before the last one
    is resolved?"""

    page_size: int
    shards: int
    ahead: bool

    @property
    def num_blocks(self) -> int: ...

    def beat(self) -> None:
        """Called often, also while there is nothing to compute."""

    def close(self) -> None:
        """No step will follow."""

    def launch(self, plan: Plan) -> Any: ...

    def resolve(self, launched: Any) -> list[tuple[Work, Sampled]]:
        """What a step brought, once the device has it."""


@dataclass(frozen=True)
class RunnerSettings:
    """num_blocks: pages of the cache. requests: that may run at a time. speculative_tokens: drafted per step.

    per_token: for backends whose kernels are batch-invariant: every token is computed as if it were alone.
    captured: replay decoding steps (graphs).
    """

    num_blocks: int
    requests: int = 256
    cache_dtype: torch.dtype | None = None
    speculative_tokens: int = 0
    per_token: bool = False
    captured: bool = False

    @property
    def rows(self) -> int:
        """Of requests that run, or whose last step is under way."""
        return 2 * self.requests


class ModelRunner:
    """Runs the model of this process. ahead: by default where there is a device to wait for, and nothing is drafted
    (how many tokens a step with drafts gives is not known before)."""

    shards = 1

    def __init__(self, model: DeepseekV3, settings: RunnerSettings, ahead: bool | None = None) -> None:
        self.settings, self.config = settings, model.config
        device = model.model.norm.weight.device.type
        self.ahead = device != "cpu" and not settings.speculative_tokens if ahead is None else ahead
        computing = ComputeSettings(
            settings.num_blocks, settings.rows, settings.cache_dtype, settings.speculative_tokens, self.ahead,
            settings.per_token, settings.captured,
        )  # fmt: skip
        self.computer = Computer(model, computing)
        self.page_size = self.computer.cache.page_size
        pages = self.computer.cache.pages_for(self.config.max_position_embeddings)
        self.rows = Rows(settings.rows, pages, self.page_size)

    @property
    def num_blocks(self) -> int:
        return self.computer.num_blocks

    def launch(self, plan: Plan) -> tuple[list[Work], StepOutput]:
        copies = [(source, target) for _, source, target in plan.copies]
        step, works = build(plan.works, copies, self.rows, self.config, self.settings.per_token)
        return works, self.computer.run(step)

    def resolve(self, launched: tuple[list[Work], StepOutput]) -> list[tuple[Work, Sampled]]:
        return results(*launched)

    def warm(self) -> None:
        """Capture the steps that will be replayed, before the first request."""
        graphs, drafts = self.computer.graphs, self.settings.speculative_tokens
        if graphs is not None:
            with torch.inference_mode():
                graphs.warm((1, 1 + drafts) if drafts else (1,), self.settings.requests)

    def beat(self) -> None:
        """Nobody waits for a sign of life."""

    def close(self) -> None:
        """Nobody waits for the end either."""

    def grow(self, num_blocks: int) -> None:
        self.computer.grow(num_blocks)

    def weights_changed(self) -> None:
        if self.computer.graphs is not None:
            self.computer.graphs.weights_changed()

    def experts(self, request: Request, count: int) -> Tensor | None:
        """i32 [count, layers with experts, k], what the gates chose for the first `count` tokens of a request that
        holds its blocks still; None in a model without experts."""
        log = self.computer.expert_log
        if log is None:
            return None
        place = torch.arange(count)
        blocks = torch.tensor(request.blocks)[place // self.page_size]
        return log[(blocks * self.page_size + place % self.page_size).to(log.device)].int()


def results(works: Sequence[Work], output: StepOutput) -> list[tuple[Work, Sampled]]:
    """A step's tensors, told apart by works."""
    tokens, logprobs, drafts, report = (
        [] if values is None else values.tolist()
        for values in (output.tokens, output.logprobs, output.drafts, output.report)
    )
    accepted = None if output.accepted is None else output.accepted.tolist()
    pairs = []
    number = place = 0
    for work in works:
        sampled, params = Sampled(), work.request.params
        if params.prompt_logprobs and (wanted := reported(work)):
            end = place + wanted
            sampled.prompt_logprobs = report[place:end]
            if params.top_logprobs:
                assert output.report_ids is not None and output.report_logprobs is not None
                sampled.prompt_top = _pairs(
                    output.report_ids[place:end], output.report_logprobs[place:end], params.top_logprobs
                )
            place = end
        if work.sample:
            count = 1 if accepted is None else accepted[number] + 1
            sampled.tokens, sampled.logprobs = tokens[number][:count], logprobs[number][:count]
            if params.top_logprobs:
                assert output.top_ids is not None and output.top_logprobs is not None
                sampled.top = _pairs(
                    output.top_ids[number, :count], output.top_logprobs[number, :count], params.top_logprobs
                )
            if drafts and not params.penalized:  # what is drafted is judged without knowing what comes between
                sampled.draft = [token for token in drafts[number] if token >= 0]
            number += 1
        pairs.append((work, sampled))
    return pairs


def _pairs(ids: Tensor, values: Tensor, count: int) -> list[TopLogprobs]:
    """ids, values [S, top] -> of each of S places the `count` likeliest."""
    rows = zip(ids[:, :count].tolist(), values[:, :count].tolist(), strict=True)
    return [list(zip(*row, strict=True)) for row in rows]
