"""Who computes what in the next step. Pure Python without torch, so that its bookkeeping can be tested by millions.

Every step: those who decode go first, all of them; what is left of the time that a step may take goes to prompts, in
chunks (`cost`), half of it to the oldest; then waiting requests are admitted, if their whole text fits. When the cache
runs out, the youngest is preempted: it gives its blocks back and waits, first in line, to be computed again.

Requests that begin alike do the work once: one whose next block is being computed by another waits for that block, and
one with the very prompt of another takes over its blocks, with a copy of the last one.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

import msgspec

from .blocks import BlockPool
from .cost import CostModel
from .request import UNRESOLVED, Request

LEAST_CHUNK = 16  # tokens of a prompt per step, whatever decoding leaves: prompts must come to an end
ALONE = 5.0  # seconds that a step of prompts may take where nobody decodes: an abort waits for its end
WATERMARK = 16  # of the cache, the part that admission leaves free at the most, one block per running request


class Work(msgspec.Struct, gc=False):
    """`count` tokens of a request from `start` on, its draft included. sample: they reach the last that is known.

    A struct, because hundreds are made in a step: in a quarter of a dataclass's time. No request knows its works, so
    the garbage collector need not.
    """

    request: Request
    start: int
    count: int
    sample: bool


@dataclass
class Plan:
    """A step. copies: (shard, from block, to block), before anything is computed."""

    works: list[Work]
    copies: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(work.count for work in self.works)


@dataclass
class Limits:
    """running: requests at a time. tokens: of a step. seconds: that a step with decoding requests may take (`cost`)."""

    running: int = 256
    tokens: int = 4096
    seconds: float = 0.05


class Scheduler:
    """pools: one per shard of the cache (data-parallel attention); a request lives in one shard."""

    def __init__(self, pools: Sequence[BlockPool], limits: Limits, cost: CostModel) -> None:
        self.pools, self.limits, self.cost = list(pools), limits, cost
        self.page = pools[0].page_size
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in the order of admission
        self.leaving: set[Request] = set()  # have ended, and a step under way still writes into their blocks
        self.rows = list(range(2 * limits.running))[::-1]  # of requests that run, or whose last step is under way
        self.computing: dict[bytes, Request] = {}  # key of a block, or of a prompt, that somebody is at
        self.prefix_queries = self.prefix_hits = self.preemptions = 0

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.running)

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    @property
    def starved(self) -> bool:
        """Would a larger cache let more be done in the next step?"""
        if any(pool.available <= len(self.running) for pool in self.pools):
            return True
        first = len(self.waiting[0].tokens) // self.page + 1 if self.waiting else 0
        return max(pool.available for pool in self.pools) < first + len(self.running)

    # Planning ---------------------------------------------------------------------------------------------------------

    def step(self) -> Plan | None:
        """The next step, or None where nothing can be done before an earlier one is resolved."""
        works, preemptions = [], self.preemptions
        for request in list(self.running):  # one pass: with hundreds of requests, it is what a step costs here
            start = request.computed
            if not start + 1 == len(request.tokens) < request.limit or (request.unresolved and request.sequential):
                continue
            count = 1 + len(request.draft) if request.draft else 1
            if request.capacity < start + count:
                if not self._grow(request):
                    continue
                count = 1 + len(request.draft)  # perhaps it had to do without
            works.append(Work(request, start, count, True))
        if self.preemptions != preemptions:
            works = [work for work in works if work.request.running]
        plan = Plan(works)
        if self.waiting or len(works) < len(self.running):
            seconds = self.limits.seconds - self.cost.step - self._decoding(works)
            room = self.limits.tokens - plan.tokens
            self._prefill(plan, seconds if works else max(self.limits.seconds, ALONE), room)
        return plan if plan.works else None

    def _decoding(self, works: list[Work]) -> float:
        """Seconds of the works; shards compute side by side."""
        shares = [works]
        if len(self.pools) > 1:
            shares = [[work for work in works if work.request.shard == shard] for shard in range(len(self.pools))]
        context = max(sum(work.start for work in share) for share in shares)
        tokens = max(sum(work.count for work in share) for share in shares)
        return tokens * self.cost.token + context * self.cost.context

    def _prefill(self, plan: Plan, seconds: float, room: int) -> None:
        """Chunks of prompts within `seconds` and `room` tokens, at least a small one.

        The oldest prompt gets half of both; the rest goes to the others, those first that are nearly done: a question
        of a line need not wait for a book to be read, nor the book for ever new questions.
        """
        least = LEAST_CHUNK if room > 0 else 0
        prompts = []
        if len(plan.works) < len(self.running):
            prompts = [r for r in self.running if len(r.tokens) - r.computed > 1]
        if prompts:
            oldest, *others = prompts
            alone = not (others or self.waiting)
            share, part = (seconds, room) if alone else (seconds / 2, -(-room // 2))
            left, rest, least = self._chunk(plan, oldest, share, part, least)
            seconds, room = seconds - share + left if seconds < inf else seconds, room - part + rest
            for request in sorted(others, key=lambda r: len(r.tokens) - r.computed):
                seconds, room, least = self._chunk(plan, request, seconds, room, least)
        while self.waiting and room > 0 and (seconds > 0 or least) and len(self.running) < self.limits.running:
            admitted = self._admit(plan)
            if admitted is None:
                return
            seconds, room, least = self._chunk(plan, admitted, seconds, room, least)

    def _chunk(self, plan: Plan, request: Request, seconds: float, room: int, least: int) -> tuple[float, int, int]:
        start, rest = request.computed, len(request.tokens) - request.computed
        count = min(rest, room, max(self.cost.tokens_within(seconds, start), least))
        if count < 1:
            return seconds, room, least
        plan.works.append(Work(request, start, count, count == rest))
        return seconds - self.cost.of_chunk(start, count), room - count, max(least - count, 0)

    def _grow(self, request: Request) -> bool:
        """Give a decoding request room for its next tokens; without its draft, or by preempting the youngest. Has it
        room now?"""
        pool = self.pools[request.shard]
        while request.running:
            wanted = pool.blocks_for(len(request.tokens) + len(request.draft)) - len(request.blocks)
            if wanted <= pool.available:
                self._hold(request, pool.take(wanted))
                return True
            if request.draft:
                request.draft = []
                continue
            youngest = next((r for r in reversed(self.running) if r.shard == request.shard and not r.in_flight), None)
            if youngest is None:
                return False  # everyone's last step is under way: its end frees blocks, or lets somebody be preempted
            self._preempt(youngest)
        return False

    def _hold(self, request: Request, blocks: list[int]) -> None:
        request.blocks += blocks
        request.capacity = len(request.blocks) * self.page

    # Admission --------------------------------------------------------------------------------------------------------

    def _admit(self, plan: Plan) -> Request | None:
        """Let the first waiting request run that may, its blocks found or taken for its whole text; None if none may.

        Those who wait for another's blocks are passed over; nobody passes one whom the cache has no room for.
        """
        for place, request in enumerate(self.waiting):
            if self._waits_for_another(request):
                continue
            shard, found = self._best_shard(request)
            pool = self.pools[shard]
            wanted = pool.blocks_for(len(request.tokens)) - len(found)
            spare = min(sum(r.shard == shard for r in self.running), pool.num_blocks // WATERMARK)
            if wanted + spare > pool.available - pool.free_among(found):
                return None
            del self.waiting[place]
            pool.share(found)
            request.shard, request.computed, request.named = shard, len(found) * self.page, len(found)
            self._hold(request, [*found, *pool.take(wanted)])
            self._fork(plan, request)
            self._begin(plan, request)
            if request.reads_cache:
                self.prefix_queries += len(request.tokens)
                self.prefix_hits += request.computed
            if request.cached is None:
                request.cached = min(request.computed, request.prompt_length)
            request.running, request.row = True, self.rows.pop()
            self.running.append(request)
            self._claim(request)
            return request
        return None

    def _best_shard(self, request: Request) -> tuple[int, list[int]]:
        """Where most of it is known; of equals, where most room is. The last token must be computed anyway."""
        if not request.reads_cache:
            return max(range(len(self.pools)), key=lambda shard: self.pools[shard].available), []
        keys = request.keys_up_to((len(request.tokens) - 1) // self.page, self.page)
        found = [pool.find(keys) for pool in self.pools]
        best = max(range(len(found)), key=lambda shard: (len(found[shard]), self.pools[shard].available))
        return best, found[best]

    def _waits_for_another(self, request: Request) -> bool:
        if not (request.reads_cache and self.computing):
            return False
        full = (len(request.tokens) - 1) // self.page
        keys = request.keys_up_to(full, self.page)
        known = max(len(pool.find(keys)) for pool in self.pools)
        leader = self.computing.get(keys[known] if known < full else request.prompt_tail(self.page))
        return leader is not None and leader.computed < leader.prompt_length and not request.output

    def _fork(self, plan: Plan, request: Request) -> None:
        """Where a running request has just computed this very prompt: all but the last token is known, by a copy."""
        page, length = self.page, request.prompt_length
        if (
            not request.reads_cache
            or request.output
            or not (length - 1) // page * page <= request.computed < length - 1
        ):
            return
        leader = self.computing.get(request.prompt_tail(page))
        if (
            leader is None
            or leader.shard != request.shard
            or leader.computed < length
            or request.computed >= length - 1
        ):
            return
        place = (length - 1) // page
        plan.copies.append((request.shard, leader.blocks[place], request.blocks[place]))
        request.computed = length - 1

    def _begin(self, plan: Plan, request: Request) -> None:
        """Of the first block that is not known as a whole, what it has in common with one that is: by a copy."""
        place, rest = divmod(request.computed, self.page)
        if rest or not request.reads_cache:
            return
        pool, end = self.pools[request.shard], min(request.computed + self.page, len(request.tokens) - 1)
        block, common = pool.begin(request.key_before(place), request.tokens[request.computed : end])
        if common:
            plan.copies.append((request.shard, block, request.blocks[place]))
            request.computed += common

    def _claim(self, request: Request) -> None:
        """Say which blocks of its prompt, and which prompt, it is going to compute."""
        if request.reads_cache and request.computed < request.prompt_length:
            full = request.prompt_length // self.page
            for key in (*request.keys_up_to(full, self.page)[request.named : full], request.prompt_tail(self.page)):
                self.computing.setdefault(key, request)

    def _disclaim(self, request: Request) -> None:
        for key in (*request.keys, request.tail_key):
            if self.computing.get(key) is request:
                del self.computing[key]

    # What becomes of a step -------------------------------------------------------------------------------------------

    def launched(self, plan: Plan) -> None:
        """The step is under way and its tokens are not known yet: plan the next one as if they were."""
        for work in plan.works:
            request = work.request
            request.in_flight += 1
            request.computed = work.start + work.count
            if work.sample:
                request.tokens.append(UNRESOLVED)
                request.unresolved += 1

    def computed(self, work: Work, tokens: Sequence[int]) -> None:
        """The step is done for one of its works, and `tokens` are what it sampled: as many of the draft as were right,
        and one more."""
        request = work.request
        if request.in_flight:
            request.in_flight -= 1
            if not request.running:  # it ended meanwhile
                if not request.in_flight:
                    self.leaving.discard(request)
                    self._release(request)
                return
            if work.sample:
                request.tokens[len(request.tokens) - request.unresolved] = tokens[0]
                request.unresolved -= 1
            computed = request.computed
        else:
            computed = work.start + work.count
            if work.sample:
                request.tokens += tokens
                if request.draft:
                    computed += len(tokens) - len(request.draft) - 1
                    request.draft = []
            request.computed = computed
        if computed // self.page > request.named:
            self._name_blocks(request)

    def _name_blocks(self, request: Request) -> None:
        full = min(request.computed, len(request.tokens) - request.unresolved) // self.page
        if request.named < full:
            pool, keys = self.pools[request.shard], request.keys_up_to(full, self.page)
            for place in range(request.named, full):
                tokens = request.tokens[place * self.page : (place + 1) * self.page]
                pool.name(request.blocks[place], keys[place], request.key_before(place), tokens)
                if self.computing.get(keys[place]) is request:
                    del self.computing[keys[place]]
            request.named = full

    def remove(self, request: Request, finish: str) -> None:
        """It has ended or is given up. What it holds is free; where a step under way still writes, when that ends."""
        request.finish = finish
        if request.running:
            self.running.remove(request)
            request.running = False
            self._disclaim(request)
            if request.unresolved:
                del request.tokens[-request.unresolved :]
            if request.in_flight:
                self.leaving.add(request)
            else:
                self._release(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def lost(self) -> None:
        """Steps under way bring nothing any more: nobody waits for their end."""
        for request in (*self.running, *self.leaving):
            request.in_flight = 0
        for request in self.leaving:
            self._release(request)
        self.leaving.clear()

    def _release(self, request: Request) -> None:
        pool, place = self.pools[request.shard], request.computed // self.page
        if request.computed % self.page and place == request.named:
            request.keys_up_to(place, self.page)
            part = request.tokens[place * self.page : request.computed]
            pool.name_part(request.blocks[place], request.key_before(place), part)
        pool.release(request.blocks)
        self.rows.append(request.row)
        request.forget_blocks()

    def _preempt(self, request: Request) -> None:
        self.preemptions += 1
        self.running.remove(request)
        request.running = False
        self._disclaim(request)
        self._release(request)
        self.waiting.appendleft(request)

    def forget_prefixes(self) -> None:
        """Nothing computed before is of use. No request may be running."""
        for pool in self.pools:
            pool.forget()
