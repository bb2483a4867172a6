"""Reward functions of the user: "module:function", and the thread that each function runs on."""

import asyncio
import importlib
import inspect
import math
import os
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from ...errors import UserError
from .reward import Message, RewardFunction, Score


def load_function(name: str) -> RewardFunction:
    """The function "module:function"; modules of the working directory are found, too."""
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"cannot import the reward {name!r}: {error}") from None
    if not callable(found):
        raise UserError(f"the reward {name!r} is no function")
    return found


class Runner:
    """Calls a reward function on a thread of its own, one batch at a time.

    A function that hangs cannot be ended, but need not be waited for: the thread is a daemon, and as long as it is in
    one batch it takes no other. A coroutine is cancelled. All calls of one function share one thread and one event
    loop, so that clients which a coroutine keeps open stay usable.
    """

    def __init__(self, function: RewardFunction, name: str) -> None:
        self.function, self.name = function, name
        self._names = _accepted(function)
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._running: Future[Any] | None = None
        self._cancel: Callable[[], object] = lambda: None

    def start(
        self, prompts: list[list[Message]], completions: list[str], columns: dict[str, list[Any]]
    ) -> "Future[list[Score]] | None":
        """The result to come; None where the function is still in an earlier batch."""
        if self._running is not None and not self._running.done():
            return None
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"reward {self.name}", daemon=True)
            self._thread.start()
        given = {
            name: list(column)
            for name, column in columns.items()
            if (self._names is None or name in self._names) and name not in ("prompts", "completions")
        }
        count = len(completions)
        self._running = Future()
        self._calls.put((self._running, lambda: self._scores(list(prompts), list(completions), given, count)))
        return self._running

    def cancel(self) -> None:
        """Nobody waits for the result any more."""
        self._cancel()

    def close(self) -> None:
        """The thread ends when the function returns."""
        self.cancel()
        self._calls.put(None)

    def _work(self) -> None:
        loop = asyncio.new_event_loop()
        self._loop = loop
        while (call := self._calls.get()) is not None:
            future, function = call
            try:
                future.set_result(function())
            except BaseException as error:  # sys.exit() in a reward function must not end the thread unheard
                future.set_exception(error)
        loop.close()

    def _scores(
        self, prompts: list[list[Message]], completions: list[str], columns: dict[str, list[Any]], count: int
    ) -> list[Score]:
        result = self.function(prompts=prompts, completions=completions, **columns)
        if inspect.isawaitable(result):
            result = self._loop.run_until_complete(self._awaited(result))
        if not hasattr(result, "__len__") or isinstance(result, str | dict):
            raise TypeError(f"it returned {type(result).__name__}, not a list of scores")
        if len(result) != count:
            raise ValueError(f"it returned {len(result)} scores for {count} completions")
        return [None if score is None else float(score) for score in result]

    async def _awaited(self, result: Any) -> Sequence[Score]:
        task = asyncio.ensure_future(result)
        self._cancel = lambda: self._loop.call_soon_threadsafe(task.cancel)
        try:
            return await task
        finally:
            self._cancel = lambda: None


def _accepted(function: RewardFunction) -> frozenset[str] | None:
    """Names of the columns that a function takes; None: all of them."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(parameter.name for parameter in parameters)


def without_infinities(scores: Sequence[Score]) -> tuple[list[Score], int]:
    """The scores with None for what is no finite number, and how many those were."""
    kept = [score if score is None or math.isfinite(score) else None for score in scores]
    return kept, sum(new is None and old is not None for old, new in zip(scores, kept, strict=True))
