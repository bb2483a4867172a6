"""Programs: HumanEval and MBPP. A completion is right when its program passes the data set's tests in the sandbox."""

import ast
import re
from collections.abc import Sequence
from pathlib import Path

from ...grading.answers import split_thought
from ..items import Data, Item, Kind, Task
from ..reading import Record, read_records
from .splits import split_files

HUMANEVAL_FILES = "HumanEval.jsonl or .jsonl.gz (task_id, prompt, test, entry_point), or its parquet"
MBPP_FILES = "mbpp.jsonl (task_id, text, code, test_list), or the folder with its parquet"
MBPP_SHOTS, MBPP_TEST = range(1, 11), range(11, 511)  # task ids, as the data set's authors divide them
FENCE = re.compile(r"```[^\n]*\n(.*?)```", re.DOTALL)


def read_humaneval(path: Path) -> Data:
    splits = split_files(path, "humaneval", HUMANEVAL_FILES, (".jsonl", ".jsonl.gz", ".parquet"))
    items = []
    for file in splits.get("test", []):
        for record in read_records(file):
            tests = f"{record.text('test')}\n\ncheck({record.text('entry_point')})\n"
            extra = {"tests": tests, "entry": record.text("entry_point"), "code": record.get("canonical_solution")}
            items.append(Item(record.text("task_id"), record.text("prompt"), "", extra=extra, where=record.where))
    return Data(items)


def read_mbpp(path: Path) -> Data:
    """The tests of ids 11 to 510; shots are taken of ids 1 to 10. Also reads the sanitized version, which has fewer."""
    splits = split_files(path, "mbpp", MBPP_FILES, (".jsonl", ".json", ".parquet"))
    items, shots = [], []
    for file in sorted(file for files in splits.values() for file in files):
        for record in read_records(file):
            identity = record.text("task_id")
            if not identity.isdigit():
                record.broken(f"task_id {identity!r} is no number")
            item = _mbpp_item(identity, record)
            if int(identity) in MBPP_TEST:
                items.append(item)
            elif int(identity) in MBPP_SHOTS:
                shots.append(item)
    return Data(items, {"": shots} if shots else {})


def _mbpp_item(identity: str, record: Record) -> Item:
    tests = record.texts("test_list")
    imports = record.texts("test_imports") if record.get("test_imports") is not None else []
    setup = [*imports, str(record.get("test_setup_code") or "")]
    extra = {"tests": "\n".join([*filter(None, setup), *tests, ""]), "shown": tests, "code": record.text("code")}
    return Item(identity, record.text("text", "prompt"), "", extra=extra, where=record.where)


def _shown(item: Item) -> str:
    return "\n".join(item.extra["shown"])


def _ask_mbpp(item: Item) -> str:
    return f"Task: {item.question.strip()}\nThe code must pass these tests:\n{_shown(item)}\n[BEGIN]\n"


def _chat_mbpp(item: Item) -> str:
    return (
        f"Write Python code for this task: {item.question.strip()}\n\nIt must pass these tests:\n```python\n"
        f"{_shown(item)}\n```\n\nReply with the whole code in one ```python block, without the tests."
    )


def _chat_humaneval(item: Item) -> str:
    return (
        f"Complete this Python function:\n```python\n{item.question.rstrip()}\n```\n\n"
        "Reply with the whole function, and with the imports that it needs, in one ```python block."
    )


def program(item: Item, reply: str, chat: bool) -> str | None:
    """The program that a reply gives, None if there is none in it.

    Base models go on with the prompt, so the program is both together. Of a chat reply it is the last fenced block
    behind the thought, preferably one that defines the function, or the reply itself if it is nothing but Python.
    """
    entry, prelude = item.extra.get("entry"), str(item.extra.get("prelude", ""))
    if not chat:
        begun = item.question if entry else str(item.extra.get("starter", ""))
        return prelude + begun + reply if entry or begun else reply.replace("[DONE]", "").strip() or None
    _, answer = split_thought(reply)
    blocks = FENCE.findall(answer) or ([answer] if _is_python(answer) else [])
    if entry is None:
        return prelude + blocks[-1] if blocks else None
    whole = [block for block in blocks if re.search(rf"^\s*(async\s+)?def\s+{re.escape(entry)}\b", block, re.MULTILINE)]
    if whole:
        # A prompt may define helpers; by itself it is a function with nothing but its docstring, so it can go first.
        return f"{item.question.rstrip()}\n\n\n{whole[-1]}"
    return item.question + blocks[-1] if blocks else None


def _is_python(text: str) -> bool:
    try:
        return bool(ast.parse(text).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _definitions(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"\n{name}" for name in names)


TASKS = (
    Task(
        "humaneval",
        "HumanEval",
        Kind.CODE,
        HUMANEVAL_FILES,
        read_humaneval,
        ask=lambda item: item.question,
        tell=lambda item: item.extra["code"] or "",
        chat=_chat_humaneval,
        stop=_definitions(("class ", "def ", "#", "@", "print", "if ", "```")),
        size=164,
    ),
    Task(
        "mbpp",
        "MBPP",
        Kind.CODE,
        MBPP_FILES,
        read_mbpp,
        ask=_ask_mbpp,
        tell=lambda item: f"{item.extra['code'].strip()}\n[DONE]",
        chat=_chat_mbpp,
        shots=3,
        stop=("[DONE]",),
        size=500,
    ),
)
