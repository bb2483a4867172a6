"""A request as the scheduler sees it: the tokens that are known, and how many of them are computed.

Prefill, decoding, speculation and the recomputation after a preemption are one case: there are more tokens known than
computed. A step computes some of them; when it reaches the last, it samples what comes next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..core.sampling_params import SamplingParams
from .blocks import chain, root_key

Masks = NDArray[np.int32]  # [positions, ceil(V / 32)], a bit per token: may it come?


class GuideState(Protocol):
    """Where the text of a request stands in its grammar; see guides."""

    done: bool
    error: str | None

    def fill_along(self, tokens: Sequence[int], masks: Masks) -> None:
        """The tokens that may come next, and behind each of these drafted ones."""

    def accept(self, token: int) -> bool: ...


UNRESOLVED = -1  # stands in `tokens` for one that was sampled on the device and is not known here yet


class Request:
    """tokens: of the prompt, then generated. computed: how many of them have their latents in the cache.
    draft: what speculation expects behind `tokens`. limit: tokens that it may have in all, the prompt's included.

    blocks, capacity: what it holds of shard `shard` of the cache, in blocks and in tokens. keys: see `blocks.chain`, of
    its full blocks, as far as they were asked for; named: how many of its blocks the pool knows by their keys.
    cached: tokens of the prompt that were found in the cache when it first ran (None: it has not run yet).
    told: log-probabilities of its prompt that were reported. queued: seconds until it first ran (None: not yet).
    row, synced: its place among the running ones, and how many of its blocks the runner has heard of.
    changes_logits, special: whether the sampler has more to do for it than to sample. sequential: its last token must
    be known here before the next one can be chosen. simple: only a token or its length ends it. guide: if it has one.
    unresolved: how many of its last tokens are not known yet. in_flight: steps under way that compute for it.
    """

    __slots__ = (
        "arrival",
        "blocks",
        "cached",
        "capacity",
        "changes_logits",
        "computed",
        "deadline",
        "draft",
        "ends",
        "finish",
        "guide",
        "id",
        "in_flight",
        "keys",
        "limit",
        "named",
        "params",
        "prompt_length",
        "queued",
        "reads_cache",
        "record_experts",
        "row",
        "running",
        "salt",
        "seed",
        "sequential",
        "shard",
        "simple",
        "special",
        "stop_reason",
        "synced",
        "tail_key",
        "tokens",
        "told",
        "unresolved",
    )  # fmt: skip

    def __init__(
        self,
        id: int,
        prompt: list[int],
        params: SamplingParams,
        limit: int,
        seed: int,
        ends: frozenset[int] = frozenset(),
        salt: bytes = b"",
        arrival: float = 0.0,
        deadline: float | None = None,
        record_experts: bool = False,
    ) -> None:
        self.id, self.params, self.limit, self.seed, self.ends, self.salt = id, params, limit, seed, ends, salt
        self.arrival, self.deadline, self.record_experts = arrival, deadline, record_experts
        self.tokens, self.prompt_length = list(prompt), len(prompt)
        self.reads_cache = not params.prompt_logprobs  # what is not computed has no log-probabilities
        self.computed = self.named = self.capacity = self.shard = self.unresolved = self.in_flight = self.synced = 0
        self.told = 0
        self.row = -1
        self.blocks: list[int] = []
        self.draft: list[int] = []
        self.keys: list[bytes] = []
        self.tail_key = b""
        self.cached: int | None = None
        self.queued: float | None = None
        self.finish: str | None = None
        self.stop_reason: str | int | None = None
        self.running = False
        self.guide: GuideState | None = None
        self.changes_logits = params.penalized or bool(params.logit_bias) or params.guide is not None
        self.sequential = params.penalized or params.guide is not None
        self.simple = params.guide is None and not params.stop
        self.special = self.changes_logits or params.top_logprobs > 0 or params.tempered_logprobs

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    def keys_up_to(self, count: int, page: int) -> list[bytes]:
        """Keys of the first `count` blocks, all of whose tokens must be known."""
        keys = self.keys
        while len(keys) < count:
            place = len(keys) * page
            keys.append(chain(self.key_before(len(keys)), self.tokens[place : place + page]))
        return keys[:count] if len(keys) > count else keys

    def key_before(self, place: int) -> bytes:
        """Of what stands before its block `place`; the keys of the blocks there have been asked for."""
        return self.keys[place - 1] if place else root_key(self.salt)

    def prompt_tail(self, page: int) -> bytes:
        """A key of the whole prompt, for those who ask the same at the same time."""
        if not self.tail_key:
            full = self.prompt_length // page
            self.keys_up_to(full, page)
            rest = self.tokens[full * page : self.prompt_length]
            self.tail_key = b"tail" + chain(self.key_before(full), rest)
        return self.tail_key

    def forget_blocks(self) -> None:
        """It holds none any more, and has to be computed again."""
        self.blocks, self.draft = [], []
        self.computed = self.named = self.capacity = self.synced = 0
