"""What a report is made of, whatever it is written as. Texts are plain: whoever writes them escapes them."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Code:
    """Lines to be shown as they are."""

    text: str


@dataclass(frozen=True)
class Points:
    """A list with a mark before each of its texts."""

    texts: Sequence[str]


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """file: beside the report. text: what it shows."""

    file: str
    text: str


@dataclass(frozen=True)
class Folded:
    """What only some readers open."""

    title: str
    blocks: Sequence["Block"]


Block = Heading | Text | Code | Points | Table | Picture | Folded
