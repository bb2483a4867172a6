"""Multiple choice: MMLU, MMLU-Pro, GPQA, C-Eval, CMMLU.

Base models are asked how likely each letter is behind the question and five answered ones of the same subject (the
report evaluates these sets by perplexity, section 4.4.1); chat models reason and end with the letter.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..items import LETTERS, Data, Item, Kind, Task
from ..reading import Record, read_records
from .splits import split_files, subject_of

MMLU_COLUMNS = ("question", "A", "B", "C", "D", "answer")
MMLU_FILES = "the folder with dev/*_dev.csv and test/*_test.csv (question,A,B,C,D,answer; no header), or its parquet"
PRO_FILES = "the folder with test and validation parquet or jsonl (question, options, answer, category)"
GPQA_FILES = "gpqa_diamond.csv (Question, Correct Answer, Incorrect Answer 1..3)"
CEVAL_FILES = "the folder with dev/*_dev.csv and val/*_val.csv (id,question,A,B,C,D,answer)"
CMMLU_FILES = "the folder with dev/*.csv and test/*.csv (Question,A,B,C,D,Answer)"


def _lettered(item: Item) -> str:
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(item.letters, item.choices, strict=True))


def _ask(item: Item) -> str:
    return f"{item.question.strip()}\n{_lettered(item)}\nAnswer:"


def _tell(item: Item) -> str:
    return f" {item.gold}"


def _chat(item: Item) -> str:
    return (
        f"{item.question.strip()}\n\n{_lettered(item)}\n\n"
        "Exactly one of the choices is right. Think it through, then write as the last line of your reply: "
        "Answer: LETTER"
    )


def _header(item: Item) -> str:
    subject = f" about {item.group.replace('_', ' ')}" if item.group else ""
    return f"The following are multiple choice questions (with answers){subject}.\n\n"


def _ask_chinese(item: Item) -> str:
    return f"{item.question.strip()}\n{_lettered(item)}\n答案："


def _chat_chinese(item: Item) -> str:
    return (
        f"{item.question.strip()}\n\n{_lettered(item)}\n\n"
        "以上选项中只有一个正确。请先思考，然后在回答的最后一行写出：答案：选项字母"
    )


def _header_chinese(item: Item) -> str:
    subject = f"关于{item.group.replace('_', ' ')}的" if item.group else ""
    return f"以下是{subject}单项选择题，每题之后附有答案。\n\n"


def letter_of(record: Record, choices: Sequence[str]) -> str:
    """The gold letter of a record, which may give it as a letter or as an index from 0."""
    answer = record.text("answer", "target").strip()
    letters = LETTERS[: len(choices)]
    if answer.isdigit() and int(answer) < len(letters):
        return letters[int(answer)]
    if len(answer) != 1 or answer.upper() not in letters:
        record.broken(f"the answer {answer!r} is none of {letters[0]} to {letters[-1]}")
    return answer.upper()


def _four(record: Record) -> tuple[str, ...]:
    if record.get("choices") is not None:
        return tuple(record.texts("choices"))
    return tuple(record.text(letter) for letter in "ABCD")


def _items(files: Sequence[Path], columns: Sequence[str] | None = None) -> list[Item]:
    """Questions of four choices, numbered within their subject."""
    items, counts = [], Counter[str]()
    for file in files:
        for record in read_records(file, columns if ".csv" in file.name else None):
            subject = str(record.get("subject") or subject_of(file))
            choices = _four(record)
            if len(choices) < 2:
                record.broken("fewer than two choices")
            gold = letter_of(record, choices)
            number = counts[subject]
            counts[subject] += 1
            items.append(
                Item(f"{subject}/{number}", record.text("question"), gold, choices, subject, where=record.where)
            )
    return items


def by_group(items: Sequence[Item]) -> dict[str, list[Item]]:
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.group, []).append(item)
    return groups


def _reader(name: str, files: str, test: str, columns: Sequence[str] | None = None) -> Callable[[Path], Data]:
    """Reads files of four choices; `test` is the split to be asked, dev gives the shots."""

    def read(path: Path) -> Data:
        splits = split_files(path, name, files, (".csv", ".parquet", ".jsonl", ".jsonl.gz"))
        chosen = splits.get(test) or splits.get("test") or []
        return Data(_items(chosen, columns), by_group(_items(splits.get("dev", []), columns)))

    return read


def read_mmlu_pro(path: Path) -> Data:
    """Up to ten choices; shots are the validation split, five a category."""
    splits = split_files(path, "mmlu-pro", PRO_FILES, (".parquet", ".jsonl", ".json"))
    return Data(
        _pro_items(splits.get("test", [])),
        by_group(_pro_items([*splits.get("validation", []), *splits.get("dev", [])])),
    )


def _pro_items(files: Sequence[Path]) -> list[Item]:
    items = []
    for file in files:
        for number, record in enumerate(read_records(file)):
            choices = tuple(choice for choice in record.texts("options", "choices") if choice != "N/A")
            if not 2 <= len(choices) <= len(LETTERS):
                record.broken(f"{len(choices)} choices")
            name = str(record.get("question_id", "id") or f"{file.stem}/{number}")
            group = str(record.get("category") or "")
            items.append(
                Item(name, record.text("question"), letter_of(record, choices), choices, group, {}, where=record.where)
            )
    return items


def read_gpqa(path: Path) -> Data:
    """The right answer is always the first in the file; here the choices are put in an order that is fixed by their
    text, so it is the same in every run."""
    splits = split_files(path, "gpqa", GPQA_FILES, (".csv", ".parquet"))
    items = []
    for file in splits.get("test", []) or [file for files in splits.values() for file in files]:
        for number, record in enumerate(read_records(file)):
            right = record.text("Correct Answer").strip()
            wrong = [record.text(f"Incorrect Answer {i}").strip() for i in (1, 2, 3)]
            choices = sorted([right, *wrong], key=lambda text: hashlib.sha256(text.encode()).digest())
            name = str(record.get("Record ID") or f"{file.stem}/{number}")
            gold = LETTERS[choices.index(right)]
            group = str(record.get("High-level domain") or "")
            items.append(Item(name, record.text("Question"), gold, tuple(choices), group, where=record.where))
    return Data(items)


_ENGLISH = Task(
    "mmlu",
    "MMLU",
    Kind.CHOICE,
    MMLU_FILES,
    _reader("mmlu", MMLU_FILES, "test", MMLU_COLUMNS),
    _ask,
    _tell,
    _chat,
    _header,
    shots=5,
    size=14042,
)
_CHINESE = replace(
    _ENGLISH,
    ask=_ask_chinese,
    tell=lambda item: item.gold,
    chat=_chat_chinese,
    header=_header_chinese,
    lead="",
    macro=True,
    size=None,
)
TASKS = (
    _ENGLISH,
    replace(_ENGLISH, name="mmlu-pro", title="MMLU-Pro", files=PRO_FILES, read=read_mmlu_pro, size=12032),
    replace(_ENGLISH, name="gpqa", title="GPQA-Diamond", files=GPQA_FILES, read=read_gpqa, shots=0, size=198),
    replace(
        _CHINESE,
        name="ceval",
        title="C-Eval",
        files=CEVAL_FILES,
        read=_reader("ceval", CEVAL_FILES, "validation"),
        size=1346,
    ),
    replace(_CHINESE, name="cmmlu", title="CMMLU", files=CMMLU_FILES, read=_reader("cmmlu", CMMLU_FILES, "test")),
)
