"""Mathematics: GSM8K, MATH, MATH-500, AIME.

Base models see worked solutions drawn from the training split and go on with one of their own; chat models are asked as
R1's usage advice says (README of the release). What they end with is compared as mathematics, not as text.
"""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

from ...grading.answers import final_answer, number
from ..items import Data, Item, Kind, Task
from ..reading import Record, read_records
from .splits import split_files, split_of

GSM8K_FILES = "the folder with test.jsonl and train.jsonl (question, answer that ends in '#### NUMBER'), or its parquet"
MATH_FILES = "the folder with test/TYPE/*.json and train/TYPE/*.json, or test.jsonl and train.jsonl (problem, solution)"
MATH500_FILES = "test.jsonl (problem, answer, subject, level)"
AIME_FILES = "a jsonl, csv or parquet file (problem, answer)"
BOXED = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv")


def _chat(item: Item) -> str:
    return item.question.strip() + BOXED


# GSM8K


def _gsm8k_item(name: str, record: Record) -> Item:
    worked, mark, gold = record.text("answer").rpartition("####")
    gold = gold.strip().replace(",", "").removeprefix("$")
    if not mark or not gold:
        record.broken("the answer does not end in '#### NUMBER'")
    worked = re.sub(r"<<.*?>>", "", worked).strip()  # the calculator's marks
    return Item(name, record.text("question"), gold, extra={"solution": worked}, where=record.where)


def read_gsm8k(path: Path) -> Data:
    splits = split_files(path, "gsm8k", GSM8K_FILES, ENDINGS)
    test, train = (
        [
            _gsm8k_item(f"{split}/{number}", record)
            for file in splits.get(split, [])
            for number, record in enumerate(read_records(file))
        ]
        for split in ("test", "train")
    )
    return Data(test, {"": train} if train else {}, drawn=True)


# MATH and what is like it


def _math_item(name: str, record: Record) -> Item:
    solution = str(record.get("solution") or "")
    answer = record.get("answer")
    gold = str(answer).strip() if answer is not None else final_answer(solution)
    if not gold:
        record.broken("no answer, and no \\boxed{} in the solution")
    group = str(record.get("type", "subject") or "")
    return Item(name, record.text("problem"), gold, (), group, {"solution": solution.strip()}, record.where)


def read_math(path: Path, task: str = "math", files: str = MATH_FILES) -> Data:
    splits = split_files(path, task, files, ENDINGS)
    test, train = (
        [
            _math_item(str(record.get("unique_id", "id") or _place(file, path, number)), record)
            for file in splits.get(split, [])
            for number, record in enumerate(read_records(file))
        ]
        for split in ("test", "train")
    )
    # Drawings in Asymptote are long, and a shot is to show how a solution ends.
    shown = [item for item in train if "[asy]" not in item.question + item.extra["solution"]]
    return Data(test, {"": shown} if shown else {}, drawn=True)


def _place(file: Path, root: Path, number: int) -> str:
    name = file.relative_to(root).as_posix() if file != root else file.name
    return name if file.suffix == ".json" and number == 0 and split_of(file, root) else f"{name}/{number}"


def read_aime(path: Path, task: str) -> Data:
    """All rows of the files, whatever their split is called: the sets have 30 problems and one split."""
    splits = split_files(path, task, AIME_FILES, ENDINGS)
    items = []
    for file in sorted(file for files in splits.values() for file in files):
        for place, record in enumerate(read_records(file)):
            answer = record.text("answer").strip()
            value = number(answer)
            if value is None or value.denominator != 1 or not 0 <= value <= 999:
                record.broken(f"the answer {answer!r} is no integer from 0 to 999")
            name = str(record.get("id", "problem_idx") or f"{file.stem}/{place}")
            items.append(Item(name, record.text("problem", "question"), str(value), where=record.where))
    return Data(items)


def _problem(item: Item) -> str:
    return f"Problem:\n{item.question.strip()}\n\nSolution:\n"


def _aime(year: int) -> Task:
    name = f"aime{year % 100}"
    return replace(
        _MATH,
        name=name,
        title=f"AIME {year}",
        files=AIME_FILES,
        read=partial(read_aime, task=name),
        shots=0,
        size=30,
    )


_MATH = Task(
    "math",
    "MATH",
    Kind.MATH,
    MATH_FILES,
    read_math,
    ask=_problem,
    tell=lambda item: item.extra["solution"],
    chat=_chat,
    shots=4,
    stop=("\n\nProblem:",),
    tokens=1024,
    size=5000,
)
TASKS = (
    replace(
        _MATH,
        name="gsm8k",
        title="GSM8K",
        files=GSM8K_FILES,
        read=read_gsm8k,
        ask=lambda item: f"Question: {item.question.strip()}\nAnswer:",
        tell=lambda item: f" {item.extra['solution']}\n#### {item.gold}",
        shots=8,
        stop=("\n\nQuestion:", "\nQuestion:"),
        tokens=512,
        size=1319,
    ),
    _MATH,
    replace(
        _MATH,
        name="math500",
        title="MATH-500",
        files=MATH500_FILES,
        read=partial(read_math, task="math500", files=MATH500_FILES),
        shots=0,
        size=500,
    ),
    _aime(2024),
    _aime(2025),
)
