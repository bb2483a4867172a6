"""A runner without a model: the next token is a hash of the text so far, and the cache is checked instead of computed.

Each slot remembers the hash of the text up to its token. A step that reads a slot of its request which holds anything
else fails: blocks shared wrongly, overwritten, or freed too early are seen at once.
"""

from dataclasses import dataclass

from dsv3.serving.request import UNRESOLVED
from dsv3.serving.runner import Sampled
from dsv3.serving.scheduler import Plan, Work

VOCABULARY = 50


def digest(tokens: list[int]) -> int:
    return hash(tuple(tokens)) & 0xFFFFFFFF


def next_token(tokens: list[int], seed: int = 0) -> int:
    return digest([seed, *tokens]) % VOCABULARY


def text(prompt: list[int], seed: int, count: int) -> list[int]:
    """What a request alone would get."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, seed))
    return tokens[len(prompt) :]


@dataclass
class Flight:
    results: list[tuple[Work, Sampled]]


class FakeRunner:
    """speculative: tokens drafted, of which every third is wrong. ahead: results are handed out a step late."""

    def __init__(
        self, num_blocks: int, page_size: int, speculative: int = 0, ahead: bool = False, shards: int = 1
    ) -> None:
        self.num_blocks, self.page_size, self.shards = num_blocks, page_size, shards
        self.speculative, self.ahead = speculative, ahead
        self.slots = [[[0] * page_size for _ in range(num_blocks)] for _ in range(shards)]
        self.last: dict[int, list[int]] = {}  # request -> its text, as the device knows it
        self.steps: list[list[tuple[int, int]]] = []
        self.fail_next = False

    def beat(self) -> None:
        pass

    def close(self) -> None:
        pass

    def launch(self, plan: Plan) -> Flight:
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("the device fell over")
        for shard, source, target in plan.copies:
            self.slots[shard][target] = list(self.slots[shard][source])
        self.steps.append([(work.start, work.count) for work in plan.works])
        return Flight([(work, self._compute(work)) for work in plan.works])

    def _compute(self, work: Work) -> Sampled:
        request, end = work.request, work.start + work.count
        draft = request.draft if work.sample else []
        tokens = [t for t in request.tokens if t != UNRESOLVED]
        if self.ahead:
            device = self.last.get(request.id, [])
            tokens = device if len(device) > len(tokens) else tokens
        known = tokens + draft
        assert len(known) >= end
        slots = self.slots[request.shard]
        for place in range(work.start):
            block, offset = request.blocks[place // self.page_size], place % self.page_size
            assert slots[block][offset] == digest(known[: place + 1]), f"slot {place} of request {request.id}"
        for place in range(work.start, end):
            slots[request.blocks[place // self.page_size]][place % self.page_size] = digest(known[: place + 1])
        if not work.sample:
            return Sampled()
        fresh = []
        for place in range(len(draft) + 1):
            fresh.append(next_token(tokens + fresh, request.seed))
            if place < len(draft) and draft[place] != fresh[-1]:
                break
        self.last[request.id] = tokens + fresh
        return Sampled(fresh, [-0.5] * len(fresh), draft=self._draft(tokens + fresh, request.seed))

    def _draft(self, tokens: list[int], seed: int) -> list[int]:
        drafts: list[int] = []
        for _ in range(self.speculative):
            token = next_token(tokens + drafts, seed)
            drafts.append(token if (len(tokens) + len(drafts)) % 3 else (token + 1) % VOCABULARY)
        return drafts

    def resolve(self, launched: Flight) -> list[tuple[Work, Sampled]]:
        return launched.results
