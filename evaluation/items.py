"""What a benchmark is: its items, how they are put to a model, and how an answer is read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def plural(count: int, what: str) -> str:
    """1 question, 2,000 questions."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


class Kind(StrEnum):
    """How answers to a task are judged."""

    CHOICE = "choice"  # a letter
    MATH = "math"  # a mathematical expression
    CODE = "code"  # a program, by its tests
    RULES = "rules"  # a text, by instructions that a program can check
    TEXT = "text"  # a text, equal to the gold one but for case, spaces and the form of numbers
    FIND = "find"  # a text that contains the gold one
    STATED = "stated"  # a text behind "the answer is", equal to the gold one
    SPANS = "spans"  # a number, a date or names, by the words that they share with one of several gold answers


@dataclass(frozen=True)
class Item:
    """One question.

    id: unique within its task, the same in every run. question: as the data set has it. gold: the right answer, a
    letter for multiple choice. choices: in the order of their letters. group: subject, level, or whatever the results
    are shown by. extra: what the task needs besides (tests, rules, a worked solution). where: file and line.
    """

    id: str
    question: str
    gold: str
    choices: tuple[str, ...] = ()
    group: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""

    @property
    def letters(self) -> str:
        return LETTERS[: len(self.choices)]


@dataclass(frozen=True)
class Data:
    """What was read of a data set.

    shots: items with answers to show before a question, by group, or under "" for all groups. drawn: the shots of a
    task are drawn from them by the seed, because they are a whole training split; otherwise the first ones are taken,
    in the data set's order.
    notes: what a reader of the results should know about this copy of the data.
    """

    items: Sequence[Item]
    shots: Mapping[str, Sequence[Item]] = field(default_factory=dict)
    drawn: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A benchmark.

    strict: an item whose gold answer cannot be understood is an error, not a note: the user's own data.
    files: one line about the files that `read` takes, for errors and for people who look for the data.
    read: path -> Data. UserError, with file and line, where the files are not as expected.
    shots: how many the published few-shot protocol shows. size: items of the published test set, where known.
    metric: what the result is, with one sample of each item. macro: the mean over groups, not over items.

    Base models see `header(item)`, then each shot as `ask(item) + tell(item)` with an empty line behind, then
    `ask(item)`. They are asked for the likelihood of `lead` + letter where kind is CHOICE, and otherwise to go on, for
    at most `tokens` tokens or until one of `stop`. Chat models see `chat(item)`.
    """

    name: str
    title: str
    kind: Kind
    files: str
    read: Callable[[Path], Data]
    ask: Callable[[Item], str]
    tell: Callable[[Item], str]
    chat: Callable[[Item], str]
    header: Callable[[Item], str] = lambda item: ""
    shots: int = 0
    lead: str = " "
    stop: tuple[str, ...] = ()
    tokens: int = 512
    metric: str = "accuracy"
    macro: bool = False
    strict: bool = False
    size: int | None = None
