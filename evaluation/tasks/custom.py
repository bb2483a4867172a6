"""Questions of one's own: JSON lines with a prompt and an answer."""

from dataclasses import replace
from pathlib import Path

from ...grading.answers import number
from ..items import Data, Item, Kind, Task
from ..reading import read_records
from . import choice
from .choice import letter_of
from .maths import BOXED, ENDINGS
from .splits import split_files

FILES = "a jsonl file (prompt, put as it stands, or question; answer; choices where the answer is a letter)"


def read(path: Path, name: str) -> tuple[Task, Data]:
    """The task that a file of the user makes, and its items.

    It is multiple choice where all rows have choices, mathematics where all answers are numbers, and otherwise texts
    that must equal the answer but for case, spaces and the form of numbers.
    """
    items = []
    for file in sorted(file for files in split_files(path, name, FILES, ENDINGS).values() for file in files):
        for place, record in enumerate(read_records(file)):
            key = str(record.get("id") or f"{file.stem}/{place}")
            prompt = record.text("prompt", "question", "problem")
            choices = tuple(record.texts("choices")) if record.get("choices") is not None else ()
            gold = letter_of(record, choices) if choices else record.text("answer").strip()
            extra = {"bare": record.get("prompt") is not None}
            group = str(record.get("group") or "")
            items.append(Item(key, prompt, gold, choices, group, extra, where=record.where))
    data = Data(items)
    if items and all(item.choices for item in items):
        like = choice.TASKS[0]
        return replace(like, name=name, title=name, files=FILES, read=lambda _: data, shots=0, size=None), data
    # A prompt that is put as it stands need not have asked for a box, so its replies are compared as a whole.
    numbers = all(number(item.gold) is not None and not item.extra["bare"] for item in items)
    task = Task(
        name,
        name,
        Kind.MATH if numbers else Kind.TEXT,
        FILES,
        read=lambda _: data,
        ask=lambda item: item.question if item.extra["bare"] else f"Question: {item.question.strip()}\nAnswer:",
        tell=lambda item: f" {item.gold}",
        chat=lambda item: item.question if item.extra["bare"] else item.question.strip() + BOXED,
        stop=("\n\n", "\nQuestion:"),
        strict=True,
    )
    return task, data
