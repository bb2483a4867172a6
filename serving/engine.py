"""The engine: requests in, steps, tokens out. One thread, no clock but the one it is given, no text but stop strings.

A step plans (`scheduler`), computes (`runner`) and tells what came of it. Where the runner works ahead, the next step
is launched before the last one's tokens are known here; a request that turns out to have ended then costs one row.
"""

import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from math import inf
from typing import Any, Protocol

from ..core.generate import tail
from ..core.sampling_params import Guide, SamplingParams
from ..errors import UserError
from .blocks import BlockPool
from .cost import CostModel
from .messages import Add, Output, RequestRefused, Stats
from .request import Request
from .runner import Runner, Sampled
from .scheduler import Limits, Plan, Scheduler, Work

Decode = Callable[[list[int]], str]


class Guides(Protocol):
    """See guides.Guides."""

    def compile(self, guide: Guide) -> Future[Any]:
        """A future with a `start() -> GuideState`."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class EngineSettings:
    """context: tokens of the longest text. capacity: of a shard of the cache, in tokens, once it has grown to its full
    size. ends: ids that end a text. prefix_caching: share computed beginnings."""

    context: int
    vocab_size: int
    capacity: int
    ends: frozenset[int] = frozenset()
    prefix_caching: bool = True
    limits: Limits = field(default_factory=Limits)
    cost: CostModel = field(default_factory=CostModel)


class Engine:
    """decode: text of token ids, for stop strings. guides: for requests that have one."""

    def __init__(
        self,
        runner: Runner,
        settings: EngineSettings,
        decode: Decode | None = None,
        guides: Guides | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runner, self.settings, self.decode, self.guides, self.clock = runner, settings, decode, guides, clock
        pools = [BlockPool(runner.num_blocks, runner.page_size, settings.prefix_caching) for _ in range(runner.shards)]
        self.scheduler = Scheduler(pools, settings.limits, settings.cost)
        self.requests: dict[int, Request] = {}
        self.compiling: dict[int, tuple[Request, Future[Any]]] = {}
        self.under_way: Any = None
        self.earliest = inf  # no deadline is before
        self.counted = Stats()
        self.on_finish: Callable[[Request], None] | None = None  # while it still holds its blocks

    @property
    def idle(self) -> bool:
        return not self.requests and self.under_way is None

    def add(self, message: Add, record_experts: bool = False) -> Request:
        """Raises RequestRefused for what can never run."""
        params, prompt = message.params, message.prompt
        limit = self._limit(prompt, params)
        ends = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            ends |= self.settings.ends
        now = self.clock()
        request = Request(
            message.id, prompt, params, limit, secrets.randbits(62) if params.seed is None else params.seed, ends,
            message.salt, now, None if message.timeout is None else now + message.timeout, record_experts,
        )  # fmt: skip
        self.requests[message.id] = request
        if request.deadline is not None:
            self.earliest = min(self.earliest, request.deadline)
        if params.guide is None:
            self.scheduler.add(request)
        else:
            self.compiling[message.id] = (request, self._compile(params.guide))
        return request

    def _limit(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """Tokens that the request may have in all."""
        settings, largest = self.settings, self.settings.capacity
        if not prompt:
            raise RequestRefused("a prompt must hold at least one token (the beginning-of-sentence token will do)")
        if min(prompt) < 0 or max(prompt) >= settings.vocab_size:
            raise RequestRefused(f"a prompt holds token ids outside the model's vocabulary of {settings.vocab_size}")
        if any(not 0 <= token < settings.vocab_size for token in params.logit_bias):
            raise RequestRefused(f"logit_bias names token ids outside the model's vocabulary of {settings.vocab_size}")
        if len(prompt) >= settings.context:
            raise RequestRefused(
                f"a prompt of {len(prompt)} tokens leaves no room in the context of {settings.context}; shorten it"
            )
        if len(prompt) >= largest:
            raise RequestRefused(
                f"a prompt of {len(prompt)} tokens is more than the cache of {largest} tokens can hold"
            )
        if params.stop and self.decode is None:
            raise RequestRefused("stop strings need a tokenizer, and this engine has none")
        room = min(settings.context, largest) - len(prompt)
        return len(prompt) + (room if params.max_tokens is None else min(room, params.max_tokens))

    def _compile(self, guide: Guide) -> Future[Any]:
        if self.guides is None:
            raise RequestRefused("guided decoding needs a tokenizer, and this engine has none")
        return self.guides.compile(guide)

    def abort(self, id: int) -> None:
        """What the request holds is free at once, or when the step that is under way has ended."""
        if id in self.requests:
            self._end(self.requests[id], "abort")

    def _end(self, request: Request, finish: str) -> None:
        del self.requests[request.id]
        self.compiling.pop(request.id, None)
        if self.on_finish is not None and request.running:
            self.on_finish(request)
        self.scheduler.remove(request, finish)

    # A step -----------------------------------------------------------------------------------------------------------

    def step(self) -> list[Output]:
        """Compute something, if there is something to compute; what can be told now."""
        outputs = [*self._compiled(), *self._overdue()]
        plan = self.scheduler.step()
        launched = None
        if plan is not None:
            self.counted.steps += 1
            self._count_waits(plan)
            launched = self.runner.launch(plan)
            if self.runner.ahead:
                self.scheduler.launched(plan)
                launched, self.under_way = self.under_way, launched
        elif self.under_way is not None:
            launched, self.under_way = self.under_way, None
        if launched is not None:
            for work, sampled in self.runner.resolve(launched):
                if (output := self._take(work, sampled)) is not None:
                    outputs.append(output)
        return outputs

    def _count_waits(self, plan: Plan) -> None:
        """Of those who run for the first time."""
        for request in [work.request for work in plan.works if work.request.queued is None]:
            request.queued = self.clock() - request.arrival

    def _compiled(self) -> list[Output]:
        """Requests whose guides are ready begin to wait; those whose guides are wrong end."""
        outputs = []
        for request, future in [pair for pair in self.compiling.values() if pair[1].done()]:
            error = future.exception()
            if error is None:
                del self.compiling[request.id]
                request.guide = future.result().start()
                self.scheduler.add(request)
            else:
                self._end(request, "error")
                text = str(error) if isinstance(error, UserError) else "the guide could not be compiled"
                outputs.append(Output(request.id, finish="refused", error=text))
        return outputs

    def _overdue(self) -> list[Output]:
        if self.earliest == inf or (now := self.clock()) < self.earliest:
            return []
        outputs, self.earliest = [], inf
        for request in list(self.requests.values()):
            if request.deadline is not None and now >= request.deadline:
                self._end(request, "timeout")
                outputs.append(self._last_words(request, "timeout"))
            elif request.deadline is not None:
                self.earliest = min(self.earliest, request.deadline)
        return outputs

    def _last_words(self, request: Request, finish: str, error: str | None = None) -> Output:
        return Output(request.id, finish=finish, error=error, cached=request.cached or 0, seed=request.seed)

    def _take(self, work: Work, sampled: Sampled) -> Output | None:
        """One work's result into its request, and what to say about it."""
        request, tokens = work.request, sampled.tokens
        before, draft = len(request.tokens) - request.unresolved, request.draft
        self.scheduler.computed(work, tokens)
        if not request.running:
            return None  # it ended while this was under way
        if draft:
            self.counted.drafts += 1
            self.counted.draft_tokens += len(draft)
            self.counted.accepted_tokens += len(tokens) - 1
        if request.simple and work.sample and work.start >= request.prompt_length:
            count = len(tokens)
            if before + count < request.limit and request.ends.isdisjoint(tokens):  # most steps of most requests
                if sampled.draft:
                    request.draft = sampled.draft[: request.limit - before - count - 1]
                self.counted.generation_tokens += count
                return Output(request.id, tokens, sampled.logprobs, sampled.top, seed=request.seed)
        first = before == request.prompt_length
        self.counted.prompt_tokens += max(min(work.start + work.count, request.prompt_length) - work.start, 0)
        told = max(request.told - work.start, 0)  # computed before, and given up in a preemption
        prompt_logprobs, prompt_top = sampled.prompt_logprobs[told:], sampled.prompt_top[told:]
        request.told += len(prompt_logprobs)
        if not tokens and not prompt_logprobs:
            return None
        request.draft = sampled.draft[: max(request.limit - len(request.tokens) - 1, 0)]
        count, finish, error = self._accept(request, tokens, before)
        if count < len(tokens):
            del request.tokens[before + count :]
        output = Output(
            request.id, tokens[:count], sampled.logprobs[:count], sampled.top[:count], finish,
            request.stop_reason, error, (request.cached or 0) if first else 0, request.seed,
            prompt_logprobs, prompt_top, (request.queued or 0.0) if first else 0.0,
        )  # fmt: skip
        self.counted.generation_tokens += count
        if finish is not None:
            self._end(request, finish)
        return output

    def _accept(self, request: Request, tokens: Sequence[int], before: int) -> tuple[int, str | None, str | None]:
        """How many of the sampled tokens belong to the text, why it ends with them, and what went wrong."""
        for place, token in enumerate(tokens):
            if request.guide is not None and token not in request.ends and not request.guide.accept(token):
                return place, "error", request.guide.error or "the guide broke off"
            finish = self._finish(request, token, before + place + 1)
            if finish is not None:
                return place + 1, finish, None
        return len(tokens), None, None

    def _finish(self, request: Request, token: int, length: int) -> str | None:
        if token in request.ends:
            request.stop_reason = token if token in request.params.stop_token_ids else None
            return "stop"
        if request.params.stop and self.decode is not None:
            text = tail(self.decode, request.tokens[request.prompt_length : length], max(map(len, request.params.stop)))
            for stop in request.params.stop:
                if stop in text:
                    request.stop_reason = stop
                    return "stop"
        return "length" if length >= request.limit else None

    # Between steps ----------------------------------------------------------------------------------------------------

    def fail(self, error: str) -> list[Output]:
        """A step has failed: everything that ran ends with `error`; what waits goes on. What the step was to copy or
        compute may be missing in any block, so that none counts as known."""
        self.under_way = None
        self.scheduler.lost()
        outputs = []
        for request in list(self.scheduler.running):
            self._end(request, "error")
            outputs.append(self._last_words(request, "error", error))
        self.scheduler.forget_prefixes()
        return outputs

    def stats(self) -> Stats:
        scheduler, counted = self.scheduler, self.counted
        pools = scheduler.pools
        total = sum(pool.num_blocks for pool in pools)
        counted.running = len(scheduler.running)
        counted.waiting = len(self.requests) - counted.running
        counted.blocks_total, counted.blocks_used = total, total - sum(pool.available for pool in pools)
        counted.prefix_queries, counted.prefix_hits = scheduler.prefix_queries, scheduler.prefix_hits
        counted.preemptions = scheduler.preemptions
        return counted

    def close(self) -> None:
        """Let go of helpers: guides have threads and processes, a runner of many processes has those."""
        if self.guides is not None:
            self.guides.close()
        self.runner.close()

    def forget_prefixes(self) -> None:
        """The weights have changed. Raises RuntimeError while requests run."""
        if not self.idle:
            raise RuntimeError("weights change between requests, and some are running")
        self.scheduler.forget_prefixes()
