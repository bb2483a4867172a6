"""An engine without a model: it says what a test tells it to, token by token, and remembers what it was asked."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

from dsv3.core.sampling_params import SamplingParams
from dsv3.core.special_tokens import Special
from dsv3.core.tokenizer import Tokenizer
from dsv3.serving.messages import EngineInfo, Output, Stats

PAGE = 4


@dataclass
class Script:
    """What becomes of one request.

    tokens: its text, without an end token. cut: tokens per output. finish: how it ends behind them; "stop" adds the end
    of sentence. pause: seconds before every output. fail: raised in place of output number `fail_at`.
    gate: waited for before output number `gate_at`.
    """

    tokens: list[int]
    cut: int = 1
    finish: str = "stop"
    error: str | None = None
    pause: float = 0.0
    fail: Exception | None = None
    fail_at: int = 0
    gate: asyncio.Event | None = None
    gate_at: int = 0
    stop_reason: str | int | None = None


@dataclass
class Asked:
    """A request as the engine got it. aborted: the server let go of it before its end."""

    prompt: list[int]
    params: SamplingParams
    salt: bytes
    timeout: float | None
    aborted: bool = False
    ended: bool = False
    sent: int = 0


@dataclass
class FakeEngine:
    """An `EngineClient`. say: from prompt and params to a script; or one script for all."""

    tokenizer: Tokenizer
    say: Script | Callable[[list[int], SamplingParams], Script]
    context: int = 1024
    capacity: int = 4096
    alive: bool = True
    asked: list[Asked] = field(default_factory=list)

    def __post_init__(self) -> None:
        size = self.tokenizer.vocab_size
        self.info = EngineInfo("tiny", self.context, size, PAGE, self.capacity, "fake")
        self.stats = Stats(blocks_total=self.capacity // PAGE)
        self._known: dict[bytes, list[list[int]]] = {}
        self._seeds = 1000

    @property
    def running(self) -> int:
        return sum(not asked.ended for asked in self.asked)

    async def stream(
        self,
        prompt: list[int],
        params: SamplingParams,
        salt: bytes = b"",
        timeout: float | None = None,
        whole: bool = False,
    ) -> AsyncGenerator[Output, None]:
        asked = Asked(prompt, params, salt, timeout)
        self.asked.append(asked)
        script = self.say(prompt, params) if callable(self.say) else self.say
        try:
            async for output in self._outputs(asked, script):
                asked.sent += 1
                yield output
                if output.finish is not None:
                    return
        except GeneratorExit:
            asked.aborted = True
            raise
        except asyncio.CancelledError:
            asked.aborted = True
            raise
        finally:
            asked.ended = True

    async def _outputs(self, asked: Asked, script: Script) -> AsyncGenerator[Output, None]:
        params, cached, seed = asked.params, self._cached(asked), self._seed(asked.params)
        tokens, finish, reason = self._ending(script, params)
        pieces = [tokens[i : i + script.cut] for i in range(0, len(tokens), script.cut)] or [[]]
        for number, piece in enumerate(pieces):
            await asyncio.sleep(script.pause)
            if script.gate is not None and number == script.gate_at:
                await script.gate.wait()
            if script.fail is not None and number == script.fail_at:
                raise script.fail
            output = Output(0, piece, [logprob(token) for token in piece], cached=cached, seed=seed)
            output.top = [self._top(token, params.top_logprobs) for token in piece] if params.top_logprobs else []
            if number == 0 and params.prompt_logprobs:  # piece by piece, as a prompt is computed
                for place in range(1, len(asked.prompt), PAGE):
                    part = asked.prompt[place : place + PAGE]
                    before = Output(0, cached=cached, seed=seed, prompt_logprobs=[logprob(token) for token in part])
                    before.prompt_top = [self._top(token, params.top_logprobs) for token in part]
                    yield before
            if number == len(pieces) - 1:
                output.finish, output.stop_reason, output.error = finish, reason, script.error
            yield output

    def _ending(self, script: Script, params: SamplingParams) -> tuple[list[int], str, Any]:
        tokens, finish, reason = list(script.tokens), script.finish, script.stop_reason
        if finish == "stop" and reason is None:
            tokens.append(self.tokenizer.eos_id)
        for length in range(1, len(tokens) + 1) if params.stop else ():
            text = self.tokenizer.decode(tokens[:length], skip_special=True)
            found = next((stop for stop in params.stop if stop in text), None)
            if found is not None:
                return tokens[:length], "stop", found
        if params.max_tokens is not None and len(tokens) > params.max_tokens:
            return tokens[: params.max_tokens], "length", None
        return tokens, finish, reason

    def _top(self, token: int, count: int) -> list[tuple[int, float]]:
        others = [(token + step) % self.info.vocab_size for step in range(1, count)]
        return [(token, logprob(token)), *((other, logprob(token) - 1 - i) for i, other in enumerate(others))][:count]

    def _cached(self, asked: Asked) -> int:
        """Whole pages that an earlier prompt of the same salt began with; the last token is always computed."""
        known, best = self._known.setdefault(asked.salt, []), 0
        for other in known:
            same = next((i for i, (a, b) in enumerate(zip(asked.prompt, other, strict=False)) if a != b), None)
            length = min(len(asked.prompt), len(other)) if same is None else same
            best = max(best, min(length, len(asked.prompt) - 1) // PAGE * PAGE)
        known.append(asked.prompt)
        return best

    def _seed(self, params: SamplingParams) -> int:
        self._seeds += 1
        return self._seeds if params.seed is None else params.seed


def logprob(token: int) -> float:
    return -0.5 - token % 8 / 16


def spell(tokenizer: Tokenizer, *segments: str) -> list[int]:
    """Tokens of a text in which control tokens are spelt out."""
    return [
        token
        for segment in segments
        for piece in tokenizer.segments(segment)
        for token in ([tokenizer.special_id(piece.name)] if isinstance(piece, Special) else tokenizer.encode(piece))
    ]
