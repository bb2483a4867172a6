"""What a model talks to: an environment answers its replies until the episode is over.

`SingleTurn` answers nothing; `ToolEnvironment` (tools.py) runs the functions that the model calls. One of your own has
two methods:

    class Guess:
        reward = None                                     # or a number, once the episode is over

        def reset(self, row):                             # a row of the data
            self.secret = row["answer"]
            return Opening([{"role": "user", "content": row["prompt"]}])

        def step(self, reply):
            if reply.content.strip() == self.secret:
                self.reward = 1.0
                return None                               # the end
            return [{"role": "user", "content": "No, guess again."}]
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from ...core.messages import Call
from ...errors import UserError
from .prompts import messages_of

Message = Mapping[str, Any]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Opening:
    """What the model is told first: messages in OpenAI's form, and the tools that it may call, in that form too."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class MalformedCall:
    """Something between the marks of a tool call that is none. reason: one line, for the model."""

    reason: str


@dataclass(frozen=True)
class Reply:
    """What the model wrote in one turn. text: all of it, tags and marks included; content: what stands behind the
    thought and before the tool calls; calls: in their order."""

    text: str
    content: str
    calls: Sequence[Call | MalformedCall] = ()


class Environment(Protocol):
    """One episode at a time. reward: of the episode, added to what the reward functions say; None where it has none."""

    @property
    def reward(self) -> float | None: ...

    def reset(self, row: Mapping[str, Any]) -> Opening:
        """Begin an episode for a row of the data."""

    def step(self, reply: Reply) -> Sequence[Message] | None:
        """Messages that answer the reply, of role "tool" (one for each call) or "user"; None ends the episode."""


@dataclass
class SingleTurn:
    """A question and an answer."""

    reward: float | None = field(default=None, init=False)

    def reset(self, row: Mapping[str, Any]) -> Opening:
        return Opening(messages_of(row))

    def step(self, reply: Reply) -> None:
        return None


class TookTooLong(Exception):
    """A function of the user's was not waited for any longer."""


class OwnEnvironment:
    """An environment of the user's: what it raises, and a call that takes longer than `timeout` seconds, is a UserError
    of one line that names it. name: of the setting's value."""

    def __init__(self, factory: Callable[[], Environment], name: str, timeout: float):
        self.name, self.timeout = name, timeout
        self.own = self._guarded("making it", factory)

    @property
    def reward(self) -> float | None:
        return self.own.reward

    def reset(self, row: Mapping[str, Any]) -> Opening:
        return self._guarded("reset", self.own.reset, row)

    def step(self, reply: Reply) -> Sequence[Message] | None:
        return self._guarded("step", self.own.step, reply)

    def _guarded(self, what: str, function: Callable[..., Result], *arguments: Any) -> Result:
        try:
            return within(self.timeout, function, *arguments)
        except UserError:
            raise
        except TookTooLong:
            raise UserError(
                f"environment.factory {self.name}: {what} took longer than {self.timeout:g} s; mend it, or raise "
                "environment.timeout"
            ) from None
        except Exception as error:
            raise UserError(
                f"environment.factory {self.name}: {what} raised {type(error).__name__}: {error}"
            ) from error


def within(seconds: float, function: Callable[..., Result], *arguments: Any, **named: Any) -> Result:
    """The result of a function of the user's, or what it raises; TookTooLong after `seconds`. One that hangs keeps its
    thread until the process ends, but does not keep the process from ending."""
    outcome: list[Result] = []
    raised: list[Exception] = []

    def run() -> None:
        try:
            outcome.append(function(*arguments, **named))
        except SystemExit:  # it would end the thread without a word
            raised.append(RuntimeError("it called exit"))
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not outcome:
        raise TookTooLong
    return outcome[0]
