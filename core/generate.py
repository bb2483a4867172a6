"""Generation: the Rollout protocol, and the simple implementation of it.

A rollout turns prompts into completions: ragged batches, a seed per request, log-probabilities and, on demand, the
experts that every token took. Training by reinforcement, evaluation and the command line ask for this protocol only;
the serving engine implements it too.

The simple implementation prefills all prompts, each different one once, then decodes all sequences in lockstep and
drops the finished ones. Its noise is a function of (seed, position, token) and of nothing else, so neither a request's
neighbours nor its place among them enter the draw. They do enter the rounding: products of other sizes sum in another
order, so logits and log-probabilities agree with those of the request alone to rounding (about 1e-6 relative in
float32, 1e-2 in bfloat16), and a token that was nearly tied may come out differently.
"""

import secrets
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..errors import UserError
from ..ops.cache_layout import cache_layout
from ..ops.sampling import log_probability, sample
from .cache import PagedCache
from .model import DeepseekV3
from .sampling_params import SamplingParams
from .step import Routing, packed

__all__ = ["Completion", "Rollout", "SamplingParams", "SimpleRollout", "Token", "make_rollout"]

PREFILL_TOKENS = 4096  # per pass; longer prompts are cut into chunks
RESERVE = 256  # tokens that a short sequence may grow by before its pages are moved


@dataclass
class Completion:
    """What one prompt became.

    token_ids: with the end token, or the tokens of the stop string, that ended it.
    logprobs: of each token under the model itself (temperature 1 unless asked otherwise, nothing filtered).
    finish_reason: "stop" (end token or stop string) or "length".
    experts: i32 [prompt + completion - 1, layers with experts, k], what the gates chose for every token that the model
        has read (the last one it has only written); where asked for, and once the completion is finished.
    """

    prompt_ids: list[int]
    seed: int
    weight_version: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    experts: Tensor | None = None


@dataclass(slots=True)  # frozen it would take four times as long to make
class Token:
    """One step of a stream: which prompt it belongs to, and the finish reason if it was the last."""

    index: int
    token_id: int
    logprob: float
    finish_reason: str | None


class Rollout(Protocol):
    """Prompts in, completions out; weights change between calls and are versioned."""

    model: DeepseekV3
    weight_version: int

    def generate(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams | Sequence[SamplingParams],
        on_token: Callable[[Token], None] | None = None,
        record_experts: bool = False,
    ) -> list[Completion]:
        """What `stream` makes of them, when all of it is there; `on_token` hears of each token meanwhile."""
        completions: list[Completion] = []
        for token in self.stream(prompts, params, completions, record_experts):
            if on_token is not None:
                on_token(token)
        return completions

    def stream(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams | Sequence[SamplingParams],
        completions: list[Completion] | None = None,
        record_experts: bool = False,
    ) -> Generator[Token, None, None]:
        """Tokens as they come, of all prompts interleaved. `completions` is filled meanwhile, a step of all of them at
        a time. Closed early, the rest is given up."""

    def weights_changed(self) -> int:
        """Say that the weights were updated; returns the new version, which later completions carry."""


class SimpleRollout(Rollout):
    """See the module's docstring. `decode` turns token ids into text; needed for stop strings only."""

    def __init__(
        self,
        model: DeepseekV3,
        decode: Callable[[list[int]], str] | None = None,
        cache_dtype: torch.dtype | None = None,
    ):
        self.model, self.decode, self.weight_version = model, decode, 0
        self.device = model.model.embed_tokens.weight.device
        self.cache_dtype = cache_dtype or model.model.embed_tokens.weight.dtype

    def weights_changed(self) -> int:
        self.model.refresh()
        self.weight_version += 1
        return self.weight_version

    def stream(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams | Sequence[SamplingParams],
        completions: list[Completion] | None = None,
        record_experts: bool = False,
    ) -> Generator[Token, None, None]:
        chosen = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(chosen) != len(prompts):
            raise UserError(f"sampling: {len(prompts)} prompts with parameters for {len(chosen)}; give one for each")
        batch = _Batch(self, prompts, chosen, record_experts)
        if completions is not None:
            completions.extend(batch.completions)
        for tokens in batch.run():
            yield from tokens
        batch.report_experts()


_maker: Callable[..., Rollout] = SimpleRollout


def make_rollout(model: DeepseekV3, decode: Callable[[list[int]], str] | None = None) -> Rollout:
    """What generates with `model` here: the simple implementation, or what `generate_with` named."""
    return _maker(model, decode)


def generate_with(maker: Callable[..., Rollout]) -> None:
    """Have `make_rollout` call `maker`: the command line puts the serving engine here, which this floor cannot know."""
    global _maker
    _maker = maker


class _Batch:
    """Sequences that are generated together: their tokens, their pages, and who is still running."""

    def __init__(
        self, rollout: SimpleRollout, prompts: Sequence[list[int]], params: list[SamplingParams], record_experts: bool
    ):
        self.rollout, self.model, self.params = rollout, rollout.model, params
        config = self.model.config
        context = config.max_position_embeddings
        self.limits = [_room(prompt, wanted, context) for prompt, wanted in zip(prompts, params, strict=True)]
        for prompt in prompts:
            if min(prompt) < 0 or max(prompt) >= config.vocab_size:
                raise UserError(f"a prompt holds token ids outside the model's vocabulary of {config.vocab_size}")
        for wanted in params:
            if wanted.beyond_plain_sampling:
                raise UserError(f"sampling: {wanted.beyond_plain_sampling} is for the serving engine (dsv3.LLM)")
        if rollout.decode is None and any(wanted.stop for wanted in params):
            raise UserError("stop strings need a tokenizer: pass decode= to SimpleRollout")
        self.completions = [
            # Not torch's generator: that one starts every process with the same number.
            Completion(
                list(prompt), secrets.randbits(62) if wanted.seed is None else wanted.seed, rollout.weight_version
            )
            for prompt, wanted in zip(prompts, params, strict=True)
        ]
        layout = cache_layout(config, rollout.cache_dtype)
        self.cache = PagedCache(config, 0, rollout.cache_dtype, rollout.device, layout)
        self.pages: list[list[int]] = [[] for _ in prompts]
        self.known = [0] * len(prompts)
        self.record_experts = record_experts
        self.expert_log: list[list[Tensor]] = [[] for _ in prompts]
        self.settings = _settings_on(rollout.device, params, [c.seed for c in self.completions])
        divisors = [wanted.temperature or 1.0 if wanted.tempered_logprobs else 1.0 for wanted in params]
        self.divisors = torch.tensor(divisors, device=rollout.device) if set(divisors) - {1.0} else None

    @torch.inference_mode()  # as a decorator: around every step, not around what the reader of the stream does between
    def run(self) -> Generator[list[Token], None, None]:
        """The tokens of a step at a time: entering inference mode for each one would cost a seventh of the whole."""
        running = list(range(len(self.completions)))
        self._reserve(running, [len(completion.prompt_ids) for completion in self.completions])
        logits = self._prefill(running)
        while running:
            yield self._choose(running, logits)
            running = [i for i in running if self.completions[i].finish_reason is None]
            if running:
                self._reserve(running, [self.known[i] + 1 for i in running])
                logits = self._forward([[self.completions[i].token_ids[-1]] for i in running], running)

    def report_experts(self) -> None:
        """Outside of inference mode: autograd takes no tensors that were made in it."""
        for completion, log in zip(self.completions, self.expert_log, strict=True):
            completion.experts = torch.cat(log) if log else None

    def _capacity(self, i: int) -> int:
        """Tokens that the pages of sequence i can hold."""
        return len(self.pages[i]) * self.cache.page_size

    def _reserve(self, running: list[int], tokens: list[int]) -> None:
        """Let every running sequence own pages for so many of its tokens; when they must be moved, drop the others'.

        A sequence that outgrows its pages gets twice as many, so that the copying costs a constant per token, however
        long the completion. The pages of a sequence are neighbours: kernels may then read them in place.
        """
        if all(self._capacity(i) >= count for i, count in zip(running, tokens, strict=True)):
            return
        pages: dict[int, list[int]] = {}
        moves: dict[int, int] = {}
        total = 0
        for i, count in zip(running, tokens, strict=True):
            room = self._capacity(i)
            if room < count:
                room = min(len(self.completions[i].prompt_ids) + self.limits[i], max(2 * room, count + RESERVE))
            size = self.cache.pages_for(room)
            pages[i] = list(range(total, total + size))
            used = self.cache.pages_for(self.known[i])
            moves |= dict(zip(self.pages[i][:used], pages[i], strict=False))
            total += size
        self.cache.rearrange(total, moves)
        self.pages = [pages.get(i, []) for i in range(len(self.pages))]

    def _prefill(self, running: list[int]) -> Tensor:
        """Chunks of at most PREFILL_TOKENS, sequence after sequence -> logits [len(running), V] behind each prompt.

        Of sequences with the same prompt the first is computed, and the others get copies.
        """
        rows: dict[int, Tensor] = {}
        first: dict[tuple[int, ...], int] = {}
        for i in running:
            first.setdefault(tuple(self.completions[i].prompt_ids), i)
        waiting = {i: self.completions[i].prompt_ids for i in first.values()}
        while waiting:
            chunk: dict[int, list[int]] = {}
            room = PREFILL_TOKENS
            for i, rest in waiting.items():
                if room == 0:
                    break
                chunk[i] = rest[:room]
                room -= len(chunk[i])
            logits = self._forward(list(chunk.values()), list(chunk), absorbed=False)
            for row, (i, tokens) in enumerate(chunk.items()):
                rest = waiting.pop(i)[len(tokens) :]
                if rest:
                    waiting = {i: rest} | waiting
                else:
                    rows[i] = logits[row]
        copies = [(first[tuple(self.completions[i].prompt_ids)], i) for i in running if i not in rows]
        moves = [pages for source, i in copies for pages in self._copied_pages(source, i)]
        if moves:
            self.cache.copy(*map(list, zip(*moves, strict=True)))
        for source, i in copies:
            rows[i], self.known[i], self.expert_log[i] = rows[source], self.known[source], [*self.expert_log[source]]
        return torch.stack([rows[i] for i in running]) if running else torch.empty(0)

    def _copied_pages(self, source: int, target: int) -> Iterable[tuple[int, int]]:
        used = self.cache.pages_for(self.known[source])
        return zip(self.pages[source][:used], self.pages[target], strict=False)

    def _forward(self, tokens: list[list[int]], who: list[int], absorbed: bool | None = None) -> Tensor:
        """One pass over new tokens of the sequences `who` -> logits [len(who), V] of each one's last token."""
        known = [self.known[i] for i in who]
        lengths = [len(fresh) for fresh in tokens]
        step = self.cache.step([self.pages[i] for i in who], known, lengths, absorbed)
        flat = torch.tensor([token for fresh in tokens for token in fresh], device=self.rollout.device)
        positions, cu_seqlens, _ = packed(lengths, known, self.rollout.device)
        routing = Routing() if self.record_experts else None
        output = self.model(flat, cu_seqlens, step, routing, positions, logits="last")
        for i, length in zip(who, lengths, strict=True):
            self.known[i] += length
        if routing is not None and routing.experts:
            chosen = torch.stack([routing.experts[layer] for layer in sorted(routing.experts)], 1)  # [T, layers, k]
            for i, part in zip(who, chosen.split(lengths), strict=True):
                self.expert_log[i].append(part)
        return output.logits

    def _choose(self, running: list[int], logits: Tensor) -> list[Token]:
        rows = torch.tensor(running, device=logits.device)
        positions = torch.tensor([self.known[i] for i in running], device=logits.device)
        settings = [values.index_select(0, rows) for values in self.settings]
        tokens, logprobs = sample(logits.float(), *settings, positions)
        if self.divisors is not None:
            logprobs = log_probability(logits.float() / self.divisors[rows, None], tokens)
        chosen = []
        for i, token, logprob in zip(running, tokens.tolist(), logprobs.tolist(), strict=True):
            completion = self.completions[i]
            completion.token_ids.append(token)
            completion.logprobs.append(logprob)
            completion.finish_reason = self._finish(i, token)
            chosen.append(Token(i, token, logprob, completion.finish_reason))
        return chosen

    def _finish(self, i: int, token: int) -> str | None:
        completion, params = self.completions[i], self.params[i]
        if token in params.stop_token_ids or (not params.ignore_eos and token in self.model.config.eos_token_ids):
            return "stop"
        if params.stop and self.rollout.decode is not None:
            text = tail(self.rollout.decode, completion.token_ids, max(map(len, params.stop)))
            if any(stop in text for stop in params.stop):
                return "stop"
        return "length" if len(completion.token_ids) >= self.limits[i] else None


def _room(prompt: list[int], params: SamplingParams, context: int) -> int:
    """How many tokens a prompt may get."""
    if not prompt:
        raise UserError("a prompt must hold at least one token (the beginning-of-sentence token will do)")
    room = context - len(prompt)
    if room < 1:
        raise UserError(f"a prompt of {len(prompt)} tokens leaves no room in the context of {context}; shorten it")
    return room if params.max_tokens is None else min(room, params.max_tokens)


def tail(decode: Callable[[list[int]], str], tokens: list[int], length: int) -> str:
    """The text of the last token behind at least `length` characters: what a stop string of that length may end in.

    Decoding everything at every step would cost the square of the length.
    """
    window = 4 * length + 4  # a character takes up to four tokens of bytes; a control token leaves no text
    while window < len(tokens) and len(decode(tokens[-1 - window : -1])) < length:
        window *= 2
    return decode(tokens[-1 - window :])


def _settings_on(device: torch.device, params: list[SamplingParams], seeds: list[int]) -> list[Tensor]:
    """temperature, top_k, top_p, min_p and seed of every request, as `sample` takes them."""

    def column(values: list[float] | list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return [
        column([p.temperature for p in params], torch.float32),
        column([min(p.top_k, 2**31 - 1) for p in params], torch.int32),
        column([p.top_p for p in params], torch.float32),
        column([p.min_p for p in params], torch.float32),
        column(seeds, torch.int64),
    ]
