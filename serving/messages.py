"""What the server and the engine tell each other. They are two processes: msgpack between them, nothing pickled.

The engine deals in token ids; text, chat formats and HTTP are the server's.
"""

from collections.abc import AsyncGenerator
from typing import Protocol

import msgspec

from ..core.sampling_params import SamplingParams

TopLogprobs = list[tuple[int, float]]  # (token id, log-probability), likeliest first


class Add(msgspec.Struct, tag="add", array_like=True):
    """A request. id: of the sender's choice, not in use. salt: prefixes are shared between requests of equal salt only.

    timeout: seconds it may take, waiting included; then it ends with finish "timeout".
    whole: nobody reads the text as it grows, so outputs behind the first tokens may come late, many in one.
    """

    id: int
    prompt: list[int]
    params: SamplingParams
    salt: bytes = b""
    timeout: float | None = None
    whole: bool = False


class Abort(msgspec.Struct, tag="abort", array_like=True):
    """Forget a request; what it holds is free within one step. Of an unknown id: nothing happens."""

    id: int


class Close(msgspec.Struct, tag="close", array_like=True):
    """End the engine's process: at once, or when no request is left."""

    drain: bool


class Output(msgspec.Struct, tag="output", array_like=True):
    """New tokens of a request, those of the end included.

    logprobs: of `tokens`, under the model itself. top: for each token, if they were asked for.
    finish: None while it goes on; "stop", "length", or why it got no further: "abort", "timeout", "error".
    stop_reason: the stop string or stop token id (not the end of sentence) that ended it. error: for people, in a line.
    cached: tokens of the prompt that were not computed anew. seed: given or drawn.
    prompt_logprobs, prompt_top: of prompt[1:], if they were asked for; piece by piece, as the prompt is computed.
    queued: seconds from its arrival to its first step.
    """

    id: int
    tokens: list[int] = []
    logprobs: list[float] = []
    top: list[TopLogprobs] = []
    finish: str | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    cached: int = 0
    seed: int = 0
    prompt_logprobs: list[float] = []
    prompt_top: list[TopLogprobs] = []
    queued: float = 0.0

    def add(self, later: "Output") -> None:
        """Put the next output of the same request behind this one."""
        self.tokens += later.tokens
        self.logprobs += later.logprobs
        self.top += later.top
        self.finish, self.stop_reason, self.error = later.finish, later.stop_reason, later.error
        self.cached = self.cached or later.cached
        self.seed = later.seed
        self.prompt_logprobs += later.prompt_logprobs
        self.prompt_top += later.prompt_top


class Stats(msgspec.Struct, tag="stats", array_like=True):
    """The engine at work: sent after steps, a few times a second at the most, and while it is idle as a sign of life.

    running, waiting: requests. blocks_used: held by requests; blocks that only the prefix cache holds count as free.
    The rest counts up from the start: looked-up and found prompt tokens of the prefix cache, preemptions, computed
    prompt tokens, generated tokens, drafts (one per request and step), drafted and accepted tokens, steps.
    """

    running: int = 0
    waiting: int = 0
    blocks_used: int = 0
    blocks_total: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    steps: int = 0


class EngineInfo(msgspec.Struct, tag="info", array_like=True):
    """What the engine says of itself when it is ready. capacity: tokens that its whole cache holds."""

    model: str
    context: int
    vocab_size: int
    page_size: int
    capacity: int
    backend: str
    speculative_tokens: int = 0


class Refused(msgspec.Struct, tag="refused", array_like=True):
    """A request that can never run (larger than the whole cache, a guide that does not compile): the sender's fault."""

    id: int
    error: str


ToEngine = Add | Abort | Close
FromEngine = Output | Stats | EngineInfo | Refused


class RequestRefused(Exception):
    """Of `EngineClient.stream`: the engine will not run this request; the text says why, in one line."""


class EngineDied(Exception):
    """Of `EngineClient.stream`: the engine's process is gone."""


class EngineClient(Protocol):
    """The engine as the server sees it."""

    info: EngineInfo
    stats: Stats  # the latest

    @property
    def alive(self) -> bool:
        """Does its process run, and did it show a sign of life lately?"""

    def stream(
        self,
        prompt: list[int],
        params: SamplingParams,
        salt: bytes = b"",
        timeout: float | None = None,
        whole: bool = False,
    ) -> AsyncGenerator[Output, None]:
        """The outputs of one request, the last with a finish; closing the generator aborts the request. See Add.

        Raises RequestRefused or EngineDied, at the first step if the request never ran.
        """
