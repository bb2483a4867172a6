"""Subjects that answer by rule, and what else the tests of evaluation share."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dsv3.core.completer import Reply, split_reply
from dsv3.core.generate import SamplingParams
from dsv3.errors import UserError
from dsv3.evaluation.items import Data, Item, Task
from dsv3.evaluation.protocols import Protocol, Samples
from dsv3.evaluation.results import Result
from dsv3.evaluation.runner import Options, Runner
from dsv3.evaluation.scoring import Graders

Answer = Callable[[str, SamplingParams], str]  # the last message and how it is sampled -> all of the reply


class Silent:
    """Progress that is kept instead of shown."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.said: list[str] = []

    def show(self, line: str, final: bool = False) -> None:
        self.shown.append(line)

    def say(self, text: str) -> None:
        self.said.append(text)


class Scripted:
    """A completer that answers by rule, and a subject that wraps it. dies_after: replies until it fails for good."""

    likelihood = None
    can_continue = True
    devices = 1

    def __init__(self, answer: Answer, context: int | None = None, dies_after: int | None = None, thinks: bool = False):
        self.answer, self.context, self.dies_after, self.thinks = answer, context, dies_after, thinks
        self.name, self.digest = "scripted", "0" * 16
        self.asked: list[tuple[Any, SamplingParams]] = []

    def complete(self, conversations, params, on_reply=None) -> list[Reply]:
        replies = []
        for i, (conversation, chosen) in enumerate(zip(conversations, params, strict=True)):
            if self.dies_after is not None and len(self.asked) >= self.dies_after:
                raise UserError("the server has gone")
            self.asked.append((conversation, chosen))
            text = self.answer(conversation[-1]["content"], chosen)
            replies.append(Reply(text, *split_reply(text), "stop", len(text.split())))
            if on_reply is not None:
                on_reply(i, replies[-1])
        return replies

    def chat(self, thinks: bool) -> "Scripted":
        return self

    def describe(self, thinks: bool) -> str:
        return "scripted"

    def forces_thought(self) -> bool:
        return self.thinks

    def continue_texts(
        self, texts: Sequence[str], params: Sequence[SamplingParams], on_reply: Callable[[int, Reply], None]
    ) -> None:
        raise UserError("no texts")

    def tokens(self, text: str) -> list[int] | None:
        return None if self.context is None else list(range(len(text.split())))

    def document(self, text: str) -> list[int]:
        return self.tokens(text) or []

    def chat_tokens(self, conversation: Any, thinks: bool) -> int | None:
        return None if self.context is None else len(conversation[-1]["content"].split())


GREEDY = Protocol("greedy", True, 8192, Samples(1), Samples(1), "")


def measured(
    subject: Any, task: Task, items: Sequence[Item], out: Path, protocol: Protocol = GREEDY, **options: Any
) -> Result:
    with Graders(unsafe=True) as graders:
        return Runner(subject, graders, Options(out, **options), Silent()).run(task, Data(items), protocol)
