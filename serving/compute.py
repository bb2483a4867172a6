"""Computes steps: one pass of the model over all tokens of a step, the choice of what comes next, and the drafts.

Speculation (report, section 5.4.3): the MTP module predicts one token further than the model, from its hidden state and
the token that was chosen; the next step verifies it. More than one token is drafted by applying the module again to its
own output.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.cache import MixedStep, PagedCache, PagedStep, Part
from ..core.model import DeepseekV3
from ..core.step import Routing, Step
from ..ops.sampling import log_probability, sample
from .graphs import DecodeGraphs
from .sampler import choose, likeliest
from .step import Group, StepInput, StepOutput

HEAD_ROWS = 256  # positions of a prompt whose logits are looked at at once


@dataclass(frozen=True)
class ComputeSettings:
    """num_blocks: pages of the cache. rows: of requests, see rows.Rows. speculative_tokens: drafted per step.

    ahead: steps come before the tokens of the last one are known to whoever plans them.
    per_token: see batch.build. captured: replay decoding steps, see graphs.
    """

    num_blocks: int
    rows: int
    cache_dtype: torch.dtype | None = None
    speculative_tokens: int = 0
    ahead: bool = False
    per_token: bool = False
    captured: bool = False


def able_to_draft(step: StepInput, depth: int) -> Tensor:
    """bool [B]: whose pages hold one more application of the module, however many drafts of this step are accepted."""
    return step.room >= step.next_positions + step.draft.shape[1] + depth


def module_passes(step: StepInput, speculative_tokens: int) -> int:
    """How often a step applies the MTP module."""
    if not speculative_tokens:
        return 0
    again = range(1, speculative_tokens) if len(step.sampled) else ()
    return 1 + sum(bool(able_to_draft(step, depth).any()) for depth in again)


class Computer:
    """A model, or a rank's part of one, with its cache."""

    def __init__(self, model: DeepseekV3, settings: ComputeSettings) -> None:
        self.model, self.settings, self.config = model, settings, model.config
        weight = next(model.model.norm.parameters())
        self.device = weight.device
        self.on_host = self.device.type == "cpu"
        spare = int(settings.captured)
        dtype = settings.cache_dtype or weight.dtype
        self.cache = PagedCache(self.config, settings.num_blocks + spare, dtype, self.device)
        self.num_blocks = settings.num_blocks
        self.graphs = DecodeGraphs(model, self.cache, settings.num_blocks) if settings.captured else None
        self.last = torch.zeros(settings.rows, dtype=torch.int64, device=self.device)
        self.expert_log: Tensor | None = None  # i16 [slots, layers with experts, k], once somebody wants to know

    def _there(self, tensor: Tensor) -> Tensor:
        return tensor if self.on_host else tensor.to(self.device, non_blocking=True)

    @torch.inference_mode()
    def run(self, step: StepInput) -> StepOutput:
        if step.copies.shape[1]:
            self._copy(step.copies)
        replayed = self.graphs is not None and self.graphs.fits(step)
        hidden, logits, described = self._replayed(step) if replayed else self._forward(step)
        output = StepOutput()
        if len(step.report):
            self._report(step, hidden, output)
        if not len(step.sampled):
            if self.settings.speculative_tokens:
                self._module(step, hidden, self._there(step.following), described)
            return output
        places, positions = self._there(step.sampled), self._there(step.next_positions)
        if logits is None:
            wanted = hidden if step.all_sampled else hidden[places.clamp(min=0).flatten()]
            logits = self.model.head(wanted)
        logits = logits.float()
        settings = [self._there(column) for column in step.settings]
        tokens, output.logprobs, accepted = choose(logits, step, settings, positions, self.settings.per_token)
        output.tokens, output.accepted = tokens, accepted
        if self.settings.speculative_tokens:
            predicted = self._module(step, hidden, self._following(step, places, tokens), described)
            output.drafts = self._draft(step, *predicted, tokens, accepted, places, settings, positions)
        if self.settings.ahead:
            self.last[self._there(step.sampled_rows)] = tokens[:, 0]
        if step.top:
            output.top_ids, output.top_logprobs = likeliest(logits.view(*places.shape, -1), step.top)
        return output

    # The pass ---------------------------------------------------------------------------------------------------------

    def _bind(self, step: StepInput) -> PagedStep | MixedStep:
        """The cache as the step sees it."""
        slots, parts, start = self._there(step.slots), [], 0
        if len(step.groups) == 1:
            return self._bind_group(step.groups[0], slots)
        for group in step.groups:
            rows = slice(start, start + group.new)
            parts.append(Part(rows, self._bind_group(group, slots[rows]), self._there(group.bounds), group.most))
            start += group.new
        return MixedStep(self.cache, slots, parts)

    def _bind_group(self, group: Group, slots: Tensor) -> PagedStep:
        table, lens, absorbed = self._there(group.table), self._there(group.lens), group.count > 0
        return PagedStep(self.cache, slots, table, lens, group.lens, group.total, group.longest, absorbed)

    def _forward(self, step: StepInput) -> tuple[Tensor, None, Step]:
        """Hidden states [T, D] behind the final norm, no logits yet, and the pass as the model describes it."""
        bound, routing = self._bind(step), Routing() if step.record else None
        positions, bounds = self._there(step.positions), self._there(step.bounds)
        most = max([group.most for group in step.groups])
        described = self.model.step(positions, bounds, most, bound, routing, bound.longest)
        hidden = self.model.model.norm(self.model.blocks(self.model.embed(self._tokens(step)), described))
        if routing is not None and routing.experts:
            self._log_experts(bound.slots, routing)
        described.routing = None  # MTP modules keep no log
        return hidden, None, described

    def _replayed(self, step: StepInput) -> tuple[Tensor, Tensor, None]:
        """Hidden states [T, D] and logits [T, V], of which those of [B, K + 1] are the first, in order."""
        assert self.graphs is not None
        hidden, logits = self.graphs.main(step, self._tokens(step))
        return hidden, logits, None

    def _tokens(self, step: StepInput) -> Tensor:
        tokens = self._there(step.tokens)
        if self.settings.ahead:
            tokens = torch.where(tokens < 0, self.last[self._there(step.rows)], tokens)
        return tokens

    def _module(
        self, step: StepInput, hidden: Tensor, following: Tensor, described: Step | None
    ) -> tuple[Tensor, Tensor | None]:
        """The MTP module over all tokens of the step: its part of the cache must know them all. -> [T, D], and what the
        head makes of it, [T, V], where that was captured with it."""
        if described is not None:
            return self.model.mtp(0, hidden, following, described), None
        assert self.graphs is not None
        return self.graphs.module(step, hidden, following)

    def _copy(self, copies: Tensor) -> None:
        sources, targets = copies.tolist()
        self.cache.copy(sources, targets)
        if self.expert_log is not None:
            pages = self.expert_log.view(self.num_blocks, -1)
            pages[self._there(copies[1])] = pages[self._there(copies[0])]

    def grow(self, num_blocks: int) -> None:
        """Make the cache larger; what it holds stays where it is. What was captured knows where it was, and goes."""
        spare = int(self.settings.captured)
        self.cache.rearrange(num_blocks + spare, {block: block for block in range(self.num_blocks)})
        if self.graphs is not None:
            self.graphs = DecodeGraphs(self.model, self.cache, num_blocks)
        if self.expert_log is not None:
            more = (num_blocks - self.num_blocks) * self.cache.page_size
            self.expert_log = pad(self.expert_log, (0, 0, 0, 0, 0, more))
        self.num_blocks = num_blocks

    # Drafts -----------------------------------------------------------------------------------------------------------

    def _following(self, step: StepInput, places: Tensor, tokens: Tensor) -> Tensor:
        """The token behind each of the step, those that were just chosen included."""
        if step.all_sampled:
            return tokens.clamp(min=0).view(-1)
        known = places >= 0
        return self._there(step.following).index_put((places[known],), tokens[known].clamp(min=0))

    def _draft(
        self, step: StepInput, predicted: Tensor, logits: Tensor | None, tokens: Tensor, accepted: Tensor | None,
        places: Tensor, settings: list[Tensor], positions: Tensor,
    ) -> Tensor:  # fmt: skip
        """predicted [T, D], the module's output over the step, and the head's over that [T, V], where it is known ->
        i64 [B, speculative_tokens], -1 behind where a request's pages end."""
        if accepted is None:
            last, newest = places.squeeze(1), positions
        else:
            last, newest = places.gather(1, accepted.long()[:, None]).squeeze(1), positions + accepted
        hidden = predicted[last]  # of the last known token but the newest, which stands at `newest`
        token = self._draft_token(hidden, None if logits is None else logits[last], settings, newest + 1)
        drafts = [token]
        for depth in range(1, self.settings.speculative_tokens):
            able = able_to_draft(step, depth)
            if not able.any():
                break
            index = self._there(able.nonzero()[:, 0])
            state, logits = self._again(hidden[index], token[index], newest[index] + depth - 1, step.table[able])
            hidden = hidden.index_copy(0, index, state)
            drawn = self._draft_token(
                state, logits, [setting[index] for setting in settings], newest[index] + depth + 1
            )
            token = torch.full_like(token, -1).index_copy(0, index, drawn)
            drafts.append(token)
        return torch.stack(drafts, 1)

    def _again(self, hidden: Tensor, token: Tensor, positions: Tensor, table: Tensor) -> tuple[Tensor, Tensor | None]:
        """The MTP module on its own output: one token per request, at `positions` i64 [B]; table on the host -> as
        _module."""
        places = positions.cpu()  # waits for the device: the price of a second draft
        lens, page = (places + 1).to(torch.int32), self.cache.page_size
        slots = table.gather(1, (places // page)[:, None]).squeeze(1).long() * page + places % page
        if self.graphs is not None and self.graphs.takes(len(table)):
            return self.graphs.again(hidden, token, places, slots, table, lens)
        pages, there = self._there(table), self._there(lens)
        bound = PagedStep(self.cache, self._there(slots), pages, there, lens, int(lens.sum()), int(lens.max()), True)
        bounds = torch.arange(len(table) + 1, dtype=torch.int32, device=self.device)
        described = self.model.step(positions, bounds, 1, bound, None, bound.longest)
        return self.model.mtp(0, hidden, token, described), None

    def _draft_token(self, hidden: Tensor, logits: Tensor | None, settings: list[Tensor], positions: Tensor) -> Tensor:
        """With the noise that verification will use, so that a good draft is the very token."""
        logits = self.model.head(hidden) if logits is None else logits
        return sample(logits.float(), *settings, positions)[0]

    # Reports ----------------------------------------------------------------------------------------------------------

    def _report(self, step: StepInput, hidden: Tensor, output: StepOutput) -> None:
        """Of the prompts that want it: log-probability of the following token, and the likeliest, place by place."""
        places, target = self._there(step.report), self._there(step.following[step.report])
        values, ids, best = [], [], []
        for rows, tokens in zip(hidden[places].split(HEAD_ROWS), target.split(HEAD_ROWS), strict=True):
            logits = self.model.head(rows).float()
            values.append(log_probability(logits, tokens))
            of_ids, of_best = likeliest(logits, step.report_top)
            ids.append(of_ids)
            best.append(of_best)
        output.report, output.report_ids, output.report_logprobs = torch.cat(values), torch.cat(ids), torch.cat(best)

    def _log_experts(self, slots: Tensor, routing: Routing) -> None:
        chosen = torch.stack([routing.experts[layer] for layer in sorted(routing.experts)], 1)  # [T, layers, k]
        if self.expert_log is None:
            count = self.num_blocks * self.cache.page_size
            self.expert_log = torch.zeros(count, *chosen.shape[1:], dtype=torch.int16, device=self.device)
        self.expert_log[slots] = chosen.to(torch.int16)
