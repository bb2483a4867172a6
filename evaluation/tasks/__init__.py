"""The benchmarks that this package reads and scores itself, by name."""

import difflib

from ..items import Task
from . import choice, code, hard, instructions, live, maths, reading_comprehension

_MODULES = (choice, maths, code, live, hard, reading_comprehension, instructions)
TASKS: dict[str, Task] = {task.name: task for module in _MODULES for task in module.TASKS}


def closest(name: str, others: tuple[str, ...] = ()) -> str | None:
    """The name that a misspelt one probably means."""
    found = difflib.get_close_matches(name, [*TASKS, *others], 1)
    return found[0] if found else None
