"""BBH: the 27 hard tasks of BIG-bench, with the worked examples that its authors wrote for each."""

import re
from pathlib import Path
from typing import NoReturn

from ...errors import UserError
from ...grading.answers import reply_of
from ..items import Data, Item, Kind, Task
from ..reading import read_records

FILES = "the folder with bbh/TASK.json (examples of input and target) and cot-prompts/TASK.txt"
COT = "Let's think step by step."
_STATED = re.compile(r"\banswer is:?\s*(.+)")


def read_bbh(path: Path) -> Data:
    """Every TASK.json below `path`; its shots come from the TASK.txt of the same name."""
    if not path.is_dir():
        raise UserError(f"bbh: {path} is no folder; expected {FILES}")
    items, shots = [], {}
    for file in sorted(path.rglob("*.json")):
        group = file.stem
        text = next(iter(sorted(path.rglob(f"{group}.txt"))), None)
        instruction = ""
        if text is not None:
            instruction, shots[group] = _worked(text, group)
        for record in read_records(file):
            examples = record.get("examples")
            if not isinstance(examples, list):
                record.broken("no list of examples")
            for place, example in enumerate(examples):
                where = f"{file}, example {place + 1}"
                if not isinstance(example, dict) or not isinstance(example.get("input"), str):
                    raise UserError(f"{where}: no input; mend or remove it")
                gold, extra = str(example.get("target", "")).strip(), {"instruction": instruction}
                items.append(Item(f"{group}/{place}", example["input"], gold, (), group, extra, where))
    return Data(items, shots)


def _worked(file: Path, group: str) -> tuple[str, list[Item]]:
    """(instruction, worked examples) of a file of the authors: a warning above a line of dashes, the instruction, and
    "Q: ... A: ..." for each example."""

    def broken(what: str) -> NoReturn:
        raise UserError(f"{file}: {what}; expected {FILES}")

    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        broken(f"cannot be read ({error})")
    body = re.split(r"^-{3,}\s*$", text, maxsplit=1, flags=re.MULTILINE)[-1].strip()
    instruction, *parts = re.split(r"^Q: ", body, flags=re.MULTILINE)
    shots = []
    for place, part in enumerate(parts):
        question, mark, worked = part.partition("\nA: ")
        found = _STATED.findall(worked)
        if not mark or not found:
            broken(f"example {place + 1} has no 'A: ... the answer is ...'")
        extra = {"instruction": instruction.strip(), "worked": worked.strip()}
        gold = found[-1].strip(". ")
        shots.append(Item(f"{group}/shot/{place}", question.strip(), gold, (), group, extra, str(file)))
    return instruction.strip(), shots


def stated_answer(reply: str, chat: bool) -> str | None:
    """What stands behind the last "the answer is"."""
    found = _STATED.findall(reply_of(reply) if chat else reply)
    return found[-1].strip(" .*$\"'") or None if found else None


def same(answer: str, gold: str) -> bool:
    """Equal but for case, spaces and a final stop; a letter may stand without its brackets: (B), B."""
    one, other = (" ".join(text.casefold().split()).rstrip(".") for text in (answer, gold))
    if one == other:
        return True
    letter = re.fullmatch(r"\(([a-z])\)", other)
    return letter is not None and re.match(rf"\(?{letter[1]}(?:\)|$)", one) is not None


def _header(item: Item) -> str:
    return f"{item.extra['instruction']}\n\n" if item.extra["instruction"] else ""


def _chat(item: Item) -> str:
    return (
        f"{_header(item)}{item.question.strip()}\n\n"
        'Think step by step, then end your reply with: "So the answer is " and the answer, as the question wants it.'
    )


TASKS = (
    Task(
        "bbh",
        "BBH",
        Kind.STATED,
        FILES,
        read_bbh,
        lambda item: f"Q: {item.question.strip()}\nA:" + ("" if "worked" in item.extra else f" {COT}"),
        lambda item: f" {item.extra['worked']}",
        _chat,
        _header,
        shots=3,
        stop=("\n\nQ:", "\nQ:"),
        tokens=512,
        macro=True,
        size=6511,
    ),
)
