"""Carries out plans: one pass of the model over all tokens of a step, the choice of what comes next, and the drafts.

Speculation (report, section 5.4.3): the MTP module predicts one token further than the model, from its hidden state and
the token that was chosen; the next step verifies it. More than one token is drafted by applying the module again to its
own output.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..core.cache import MixedStep, PagedCache, PagedStep
from ..core.model import DeepseekV3
from ..core.step import Routing, Step
from ..ops.sampling import log_probability, sample
from .batch import Rows, StepInput, build
from .messages import TopLogprobs
from .request import Request
from .sampler import Chosen, MaskApplier, choose, top_logprobs
from .scheduler import Plan, Work

HEAD_ROWS = 256  # positions of a prompt whose logits are looked at at once


@dataclass
class Sampled:
    """What a step gave one of its works. tokens: empty where nothing was to be sampled. prompt: log-probability and, if
    asked for, the likeliest tokens in the place of each token behind the work's ones, as far as the prompt goes."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[TopLogprobs] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_top: list[TopLogprobs] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)


@dataclass
class Launched:
    """A step under way. Its tensors are on the device; `Runner.resolve` waits for them."""

    plan: Plan
    works: list[Work]
    sampling: list[Work]
    chosen: Chosen | None
    drafts: Tensor | None
    prompts: dict[int, tuple[list[float], list[TopLogprobs]]]  # by the number of the work


class Runner(Protocol):
    """Whoever computes. page_size, num_blocks: of a shard of the cache. ahead: may a step be launched before the last
    one is resolved?"""

    page_size: int
    num_blocks: int
    shards: int
    ahead: bool

    def launch(self, plan: Plan) -> Launched: ...

    def resolve(self, launched: Launched) -> list[tuple[Work, Sampled]]: ...


@dataclass(frozen=True)
class RunnerSettings:
    """num_blocks: pages of the cache. requests: that may run at a time. speculative_tokens: drafted per step.

    per_token: for backends whose kernels are batch-invariant: every token is computed as if it were alone.
    """

    num_blocks: int
    requests: int = 256
    cache_dtype: torch.dtype | None = None
    speculative_tokens: int = 0
    per_token: bool = False


def no_guides(logits: Tensor, rows: Sequence[int], masks: object) -> None:
    raise RuntimeError("a request has a guide, and this engine was made without")


class ModelRunner:
    """Runs the model of this process."""

    shards = 1

    def __init__(self, model: DeepseekV3, settings: RunnerSettings, apply_mask: MaskApplier = no_guides) -> None:
        self.model, self.settings, self.apply_mask = model, settings, apply_mask
        self.config, self.device = model.config, model.model.embed_tokens.weight.device
        dtype = settings.cache_dtype or model.model.embed_tokens.weight.dtype
        self.cache = PagedCache(self.config, settings.num_blocks, dtype, self.device)
        self.page_size, self.num_blocks = self.cache.page_size, settings.num_blocks
        pages = self.cache.pages_for(self.config.max_position_embeddings)
        self.rows = Rows(2 * settings.requests, pages)
        self.last = torch.zeros(2 * settings.requests, dtype=torch.int64, device=self.device)
        self.ahead = self.device.type != "cpu" and not settings.speculative_tokens
        self.expert_log: Tensor | None = None  # i16 [slots, layers with experts, k], once somebody wants to know

    # A step -----------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Launched:
        step, works = build(plan, self.rows, self.page_size, self.settings.per_token)
        if plan.copies:
            self.copy_blocks(plan.copies)
        sampling = [work for work in works if work.sample]
        requests = [work.request for work in sampling]
        record = any(work.request.record_experts for work in works)
        bound, cu_seqlens, max_len = step.bind(self.cache, self.device)
        hidden, described = self.forward(step, bound, cu_seqlens, max_len, record)
        prompts = self._prompts(hidden, works, step)
        if not sampling:
            if self.settings.speculative_tokens:
                self._draft_hidden(step, hidden, described, None)
            return Launched(plan, works, [], None, None, prompts)
        places = step.sampled.to(self.device, non_blocking=True)
        logits = self.model.head(hidden[places.clamp(min=0).flatten()]).float().view(*places.shape, -1)
        settings = self.rows.settings(step.sampled_rows.numpy(), self.device)
        positions = step.next_positions.to(self.device, non_blocking=True)
        draft = step.draft.to(self.device, non_blocking=True)
        chosen = choose(logits, requests, draft, settings, positions, self.apply_mask)
        drafts = None
        if self.settings.speculative_tokens:
            drafts = self._draft(step, hidden, described, chosen, places, settings, positions, sampling)
        elif self.ahead:
            self.last[step.sampled_rows.to(self.device, non_blocking=True)] = chosen.tokens[:, 0]
        return Launched(plan, works, sampling, chosen, drafts, prompts)

    def forward(
        self, step: StepInput, bound: MixedStep, cu_seqlens: Tensor, max_len: int, record: bool
    ) -> tuple[Tensor, Step]:
        """Hidden states [T, D] behind the final norm, and the pass as the model describes it."""
        tokens, positions = (x.to(self.device, non_blocking=True) for x in (step.tokens, step.positions))
        if self.ahead:
            tokens = torch.where(tokens < 0, self.last[step.rows.to(self.device, non_blocking=True)], tokens)
        routing = Routing() if record else None
        described = self.model.step(positions, cu_seqlens, max_len, bound, routing, bound.longest)
        hidden = self.model.model.norm(self.model.blocks(self.model.embed(tokens), described))
        if routing is not None and routing.experts:
            self._log_experts(bound.slots, routing)
        described.routing = None  # MTP modules keep no log
        return hidden, described

    def copy_blocks(self, copies: Sequence[tuple[int, int, int]]) -> None:
        sources, targets = [source for _, source, _ in copies], [target for _, _, target in copies]
        self.cache.copy(sources, targets)
        if self.expert_log is not None:
            pages = self.expert_log.view(self.num_blocks, -1)
            pages[torch.tensor(targets, device=self.device)] = pages[torch.tensor(sources, device=self.device)]

    def grow(self, num_blocks: int) -> None:
        """Make the cache larger; what it holds stays where it is."""
        self.cache.rearrange(num_blocks, {block: block for block in range(self.num_blocks)})
        if self.expert_log is not None:
            more = (num_blocks - self.num_blocks) * self.page_size
            self.expert_log = torch.nn.functional.pad(self.expert_log, (0, 0, 0, 0, 0, more))
        self.num_blocks = num_blocks

    # Drafts -----------------------------------------------------------------------------------------------------------

    def _draft_hidden(self, step: StepInput, hidden: Tensor, described: Step, chosen: Chosen | None) -> Tensor:
        """The MTP module over all tokens of the step: its part of the cache must know them all."""
        following = step.following.to(self.device, non_blocking=True)
        if chosen is not None:
            places = step.sampled.to(self.device, non_blocking=True)
            known = places >= 0
            following = following.index_put((places[known],), chosen.tokens[known].clamp(min=0))
        return self.model.mtp(0, hidden, following, described)

    def _draft(
        self, step: StepInput, hidden: Tensor, described: Step, chosen: Chosen, places: Tensor,
        settings: list[Tensor], positions: Tensor, sampling: list[Work],
    ) -> Tensor:  # fmt: skip
        """-> i64 [B, speculative_tokens], -1 where a request's pages end before."""
        predicted = self._draft_hidden(step, hidden, described, chosen)
        accepted = chosen.accepted.long()[:, None]
        hidden = predicted[places.gather(1, accepted).squeeze(1)]  # behind the last known token but the newest
        newest = positions + accepted.squeeze(1)  # where the newest token stands
        token = self._draft_token(hidden, settings, newest + 1)
        drafts = [token]
        for depth in range(1, self.settings.speculative_tokens):
            able = [i for i, work in enumerate(sampling) if work.request.capacity >= work.start + work.count + depth]
            if not able:
                break
            index = torch.tensor(able, device=self.device)
            state = self._apply_again(
                hidden[index], token[index], newest[index] + depth - 1, [sampling[i] for i in able]
            )
            hidden = hidden.index_copy(0, index, state)
            known = [setting[index] for setting in settings]
            drawn = self._draft_token(state, known, newest[index] + depth + 1)
            token = torch.full_like(token, -1).index_copy(0, index, drawn)
            drafts.append(token)
        return torch.stack(drafts, 1)

    def _apply_again(self, hidden: Tensor, token: Tensor, positions: Tensor, works: list[Work]) -> Tensor:
        """The MTP module on its own output: one token per request, at `positions` i64 [B] -> [B, D]."""
        lens = (positions + 1).to(torch.int32)
        lens_cpu = lens.cpu()  # waits for the device: the price of a second draft
        width = self.cache.pages_for(int(lens_cpu.max()))
        table = torch.from_numpy(self.rows.table[[work.request.row for work in works], :width]).to(self.device)
        page = table.gather(1, (positions // self.page_size)[:, None]).squeeze(1)
        slots = page.long() * self.page_size + positions % self.page_size
        step = PagedStep(self.cache, slots, table, lens, lens_cpu, int(lens_cpu.sum()), int(lens_cpu.max()), True)
        bounds = torch.arange(len(works) + 1, dtype=torch.int32, device=self.device)
        return self.model.mtp(0, hidden, token, self.model.step(positions, bounds, 1, step, None, step.longest))

    def _draft_token(self, hidden: Tensor, settings: list[Tensor], positions: Tensor) -> Tensor:
        """With the noise that verification will use, so that a good draft is the very token."""
        return sample(self.model.head(hidden).float(), *settings, positions)[0]

    # Reports ----------------------------------------------------------------------------------------------------------

    def _log_experts(self, slots: Tensor, routing: Routing) -> None:
        chosen = torch.stack([routing.experts[layer] for layer in sorted(routing.experts)], 1)  # [T, layers, k]
        if self.expert_log is None:
            count = self.num_blocks * self.page_size
            self.expert_log = torch.zeros(count, *chosen.shape[1:], dtype=torch.int16, device=self.device)
        self.expert_log[slots] = chosen.to(torch.int16)

    def experts(self, request: Request, count: int) -> Tensor | None:
        """i32 [count, layers with experts, k], what the gates chose for the first `count` tokens of a request that
        holds its blocks still; None in a model without experts."""
        if self.expert_log is None:
            return None
        place = torch.arange(count)
        blocks = torch.tensor(request.blocks)[place // self.page_size]
        return self.expert_log[(blocks * self.page_size + place % self.page_size).to(self.device)].int()

    def _prompts(
        self, hidden: Tensor, works: list[Work], step: StepInput
    ) -> dict[int, tuple[list[float], list[TopLogprobs]]]:
        """Of the works that want it: how likely the model found the tokens behind theirs, as far as the prompt goes."""
        reports = {}
        start = 0
        for number, work in enumerate(works):
            request = work.request
            wanted = min(work.start + work.count, request.prompt_length - 1) - work.start
            if request.params.prompt_logprobs and wanted > 0:
                rows = hidden[start : start + wanted]
                target = step.following[start : start + wanted].to(self.device)
                reports[number] = self._report(rows, target, request.params.top_logprobs)
            start += work.count
        return reports

    def _report(self, hidden: Tensor, target: Tensor, top: int) -> tuple[list[float], list[TopLogprobs]]:
        logprobs: list[float] = []
        likeliest: list[TopLogprobs] = []
        for rows, tokens in zip(hidden.split(HEAD_ROWS), target.split(HEAD_ROWS), strict=True):
            logits = self.model.head(rows).float()
            logprobs += log_probability(logits, tokens).tolist()
            if top:
                likeliest += top_logprobs(logits, top)
        return logprobs, likeliest

    def resolve(self, launched: Launched) -> list[tuple[Work, Sampled]]:
        """What a step brought, once the device has it."""
        results = [(work, Sampled()) for work in launched.works]
        for number, (logprobs, top) in launched.prompts.items():
            results[number][1].prompt_logprobs, results[number][1].prompt_top = logprobs, top
        chosen = launched.chosen
        if chosen is None:
            return results
        tokens, values, accepted = chosen.tokens.tolist(), chosen.logprobs.tolist(), chosen.accepted.tolist()
        drafts = launched.drafts.tolist() if launched.drafts is not None else None
        number = 0
        for work, sampled in results:
            if not work.sample:
                continue
            count = accepted[number] + 1
            sampled.tokens, sampled.logprobs = tokens[number][:count], values[number][:count]
            sampled.top = chosen.top.get(number, [])[:count]
            if drafts is not None and not work.request.params.penalized:
                sampled.draft = [token for token in drafts[number] if token >= 0]
            number += 1
        return results
