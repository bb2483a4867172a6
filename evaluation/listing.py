"""What `dsv3 eval --list` prints: the tasks, the files that they read, and the protocols."""

import textwrap
from collections.abc import Iterator

from . import needle
from .protocols import PROTOCOLS
from .reading import TEXTS
from .tasks import TASKS, custom

WIDTH = 116


def lines() -> Iterator[str]:
    """Plain text, line by line."""
    yield "Tasks, with the files that --data DIR/TASK or --data TASK=PATH names:"
    named = [(task.name, f"{task.title}{_size(task.size)}: {task.files}") for task in TASKS.values()]
    named += [
        ("needle", f"Needle in a haystack: {needle.FILES}"),
        ("pile", f"bits per byte of the Pile's test set: {TEXTS}"),
        ("lm:NAME", "any task of lm-eval's (pip install 'dsv3[eval]'), with the data that it names"),
        ("OTHER", f"data of your own, by --data OTHER=PATH: {custom.FILES}"),
    ]
    width = max(len(name) for name, _ in named)
    for name, text in named:
        yield from _row(name, text, width)
    yield ""
    yield "Protocols:"
    for protocol in PROTOCOLS.values():
        yield from _row(protocol.name, protocol.source, width)


def _size(size: int | None) -> str:
    return "" if size is None else f", {size:,} items"


def _row(name: str, text: str, width: int) -> list[str]:
    indent = " " * (width + 4)
    return textwrap.wrap(
        text, WIDTH, initial_indent=f"  {name:<{width}}  ", subsequent_indent=indent, break_on_hyphens=False
    )
