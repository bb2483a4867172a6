"""LiveCodeBench: contest problems with their dates, judged by hidden tests. Each report names the months that it asked
for; protocols carry them.

A program that reads standard input must print what is expected, up to white space at the ends of lines; a method is
called with each test's arguments and must return the expected value.
"""

import base64
import io
import json
import pickle
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from ..items import Data, Item, Kind, Task
from ..reading import Record, read_records
from .splits import split_files

FILES = (
    "the folder with test.jsonl, test2.jsonl, ... (question_content, starter_code, contest_date, public_test_cases, "
    "private_test_cases, metadata)"
)
# What contestants on such sites need not import.
PRELUDE = """\
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from typing import *
import bisect, collections, copy, functools, heapq, itertools, math, operator, random, re, string, sys
"""
LONGEST = 2**28  # bytes of a record's hidden tests, unpacked


def read_livecodebench(path: Path) -> Data:
    items = []
    for file in sorted(
        file for files in split_files(path, "livecodebench", FILES, _ENDINGS).values() for file in files
    ):
        items += [_item(record) for record in read_records(file)]
    dates = sorted(item.extra["date"][:10] for item in items)
    notes = (f"the data has problems of {dates[0]} to {dates[-1]}",) if dates else ()
    return Data(items, notes=notes)


_ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")


def _item(record: Record) -> Item:
    cases = [*_cases(record, "public_test_cases"), *_cases(record, "private_test_cases")]
    if not cases:
        record.broken("no test cases")
    starter = str(record.get("starter_code") or "")
    extra: dict[str, Any] = {"date": str(record.get("contest_date") or record.text("contest_date")), "starter": starter}
    if cases[0].get("testtype") == "functional":
        metadata = _json(record, "metadata", record.text("metadata"))
        name = metadata.get("func_name") if isinstance(metadata, Mapping) else None
        if not isinstance(name, str) or not name.isidentifier():
            record.broken("metadata names no func_name")
        extra |= {"prelude": PRELUDE, "tests": "\n".join(_call(record, name, case) for case in cases)}
    else:
        extra["cases"] = [(str(case["input"]), str(case["output"])) for case in cases]
    name, group = record.text("question_id"), str(record.get("difficulty") or "")
    return Item(name, record.text("question_content"), "", (), group, extra, record.where)


def _call(record: Record, name: str, case: Mapping[str, Any]) -> str:
    """A line of tests: the arguments stand in the lines of the input, as JSON."""
    arguments = [_json(record, "input", line) for line in str(case["input"]).splitlines() if line.strip()]
    expected = _json(record, "output", str(case["output"]))
    return f"assert Solution().{name}(*{arguments!r}) == {expected!r}"


def _cases(record: Record, column: str) -> list[Mapping[str, Any]]:
    text = record.get(column)
    if text is None:
        return []
    if isinstance(text, str) and not text.lstrip().startswith("["):
        text = _unpacked(record, column, text)
    cases = _json(record, column, text) if isinstance(text, str) else text
    if not isinstance(cases, list) or not all(isinstance(case, Mapping) and "output" in case for case in cases):
        record.broken(f"{column} is no list of test cases")
    return cases


def _unpacked(record: Record, column: str, text: str) -> str:
    """The hidden tests are JSON text, pickled, compressed and in base64."""
    try:
        data = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), LONGEST)
        found = _Texts(io.BytesIO(data)).load()
    except (ValueError, zlib.error, pickle.UnpicklingError, EOFError) as error:
        record.broken(f"{column} cannot be unpacked ({error})")
    if not isinstance(found, str):
        record.broken(f"{column} holds no text")
    return found


class _Texts(pickle.Unpickler):
    """Reads plain values; a pickle that names a class or a function, which is how they run code, is refused."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _json(record: Record, column: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        record.broken(f"{column} is not JSON")


def _chat(item: Item) -> str:
    if item.extra["starter"].strip():
        starter = f"```python\n{item.extra['starter']}\n```"
        how = f"Complete this Python class; reply with all of it in one ```python block.\n{starter}"
    else:
        how = (
            "Write a Python program that reads the input from standard input and prints the answer. Reply with all of "
            "it in one ```python block."
        )
    return f"{item.question.strip()}\n\n{how}"


def _ask(item: Item) -> str:
    return f"{_chat(item)}\n\n```python\n{item.extra['starter']}"


TASKS = (
    Task(
        "livecodebench",
        "LiveCodeBench",
        Kind.CODE,
        FILES,
        read_livecodebench,
        _ask,
        lambda item: "",
        _chat,
        stop=("```",),
        tokens=1024,
    ),
)
