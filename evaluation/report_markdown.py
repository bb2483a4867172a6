"""A report as Markdown, as GitHub and most editors show it."""

import re
from collections.abc import Iterator, Sequence

from .report_blocks import Block, Code, Folded, Heading, Picture, Points, Table, Text

_SPECIAL = re.compile(r"([\\`*_<>|]|\](?=[(\[]))")  # a bracket alone is no link
_WITHIN = re.compile(r"(?<=[A-Za-z0-9])\\_(?=[A-Za-z0-9])")  # an underscore inside of a word is one anyway


def markdown(blocks: Sequence[Block]) -> str:
    return "\n\n".join(_block(block) for block in blocks) + "\n"


def _escape(text: str) -> str:
    return _WITHIN.sub("_", _SPECIAL.sub(r"\\\1", " ".join(text.split())))


def _block(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_escape(text)}"
        case Text(text):
            return _escape(text)
        case Code(text):
            fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
            return f"{fence}\n{text}\n{fence}"
        case Points(texts):
            return "\n".join(f"- {_escape(text)}" for text in texts)
        case Table(head, rows):
            return "\n".join(_table(head, rows))
        case Picture(file, text):
            return f"![{_escape(text)}]({file})"
        case Folded(title, blocks):
            return f"<details><summary>{_escape(title)}</summary>\n\n{markdown(blocks)}\n</details>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(map(_escape, head))} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(map(_escape, row))} |"
