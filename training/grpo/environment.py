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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ...core.messages import Call
from .prompts import messages_of

Message = Mapping[str, Any]


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

    reward: float | None

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
