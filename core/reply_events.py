"""What a reply is made of, in the order in which it comes, and the reply put together from it."""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Characters of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """Characters of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """Call number `index` (0, 1, ...) names its function. id: where the format has one (Kimi-K2: functions.NAME:0)."""

    index: int
    name: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class CallArguments:
    """Characters of the arguments of a call: JSON, if the model keeps to it."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """A call is over. complete: its markup is whole; if not, the reply broke off in it, or the markup was malformed."""

    index: int
    complete: bool


Event = Reasoning | Content | CallBegin | CallArguments | CallEnd


@dataclass
class ReceivedCall:
    """A call as far as it has come."""

    name: str
    id: str | None
    arguments: str = ""
    complete: bool = False


@dataclass
class ReplyParts:
    """Events put together again: the reply as far as it has come."""

    reasoning: str = ""
    content: str = ""
    calls: list[ReceivedCall] = field(default_factory=list)

    def add(self, events: Iterable[Event]) -> None:
        for event in events:
            match event:
                case Reasoning(text):
                    self.reasoning += text
                case Content(text):
                    self.content += text
                case CallBegin(_, name, id):
                    self.calls.append(ReceivedCall(name, id))
                case CallArguments(index, text):
                    self.calls[index].arguments += text
                case CallEnd(index, complete):
                    self.calls[index].complete = complete
