"""A file of requests through the server's own application, so that every line gets what the server would answer."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
from msgspec import Struct
from starlette.applications import Starlette

from ..errors import UserError
from .api.direct import Answer, post
from .api.responses import Usage
from .batch_file import Line, Results
from .messages import EngineClient

TICK = 0.5  # seconds between two looks at the counters
WINDOW = 20  # ticks over which tokens per second are measured


@dataclass
class Spent:
    """By one run. Tokens read and written; cached: of those read, found in the prefix cache."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0


class _Body(Struct):
    usage: Usage


class BatchRun:
    """Answers `lines`, at most `at_a_time` at a time, over an engine behind `app`. show: takes a line about how far it
    is."""

    def __init__(
        self,
        app: Starlette,
        client: EngineClient,
        lines: Sequence[Line],
        results: Results,
        at_a_time: int,
        show: Callable[[str], None],
    ) -> None:
        self._app, self._client, self._results, self._show = app, client, results, show
        self._total, self._at_a_time = len(lines), at_a_time
        self._waiting = iter([line for line in lines if line.custom_id not in results.answered])
        self.spent = Spent()

    async def run(self) -> None:
        """Raises UserError when the engine dies; what is answered by then stays."""
        begin = time.monotonic()
        tasks = [asyncio.create_task(self._work()) for _ in range(min(self._at_a_time, self._total))]
        watching = asyncio.create_task(self._watch())
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in (watching, *tasks):
                task.cancel()
            await asyncio.gather(watching, *tasks, return_exceptions=True)
            self.spent.seconds = time.monotonic() - begin

    async def _work(self) -> None:
        """One line after the other."""
        for line in self._waiting:
            answer = await post(self._app, line.url, line.body)
            if answer.status >= 500 and not self._client.alive:
                raise UserError("the engine's process has ended; the same command goes on with what is not answered")
            self._results.add(line, answer.status, answer.request_id, answer.body)
            self._count(answer)

    def _count(self, answer: Answer) -> None:
        if answer.status == 200:
            usage = msgspec.json.decode(answer.body, type=_Body).usage
            self.spent.prompt_tokens += usage.prompt_tokens
            self.spent.cached_tokens += usage.prompt_cache_hit_tokens
            self.spent.completion_tokens += usage.completion_tokens

    async def _watch(self) -> None:
        seen: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        while True:
            stats = self._client.stats
            seen.append((time.monotonic(), stats.generation_tokens))
            (begin, before), (now, tokens) = seen[0], seen[-1]
            rate = (tokens - before) / (now - begin) if now > begin else 0.0
            answered, statuses = len(self._results.answered), self._results.statuses
            failed = answered - statuses[200]
            self._show(
                f"{answered:,} of {self._total:,} requests{f', {failed:,} failed' if failed else ''}; "
                f"{stats.running} running; {rate:,.0f} tokens/s"
            )
            await asyncio.sleep(TICK)
