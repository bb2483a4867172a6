"""DROP: questions about a passage, whose answers are numbers, dates or names from it. The result is the F1 of words."""

import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...grading.answers import number, reply_of
from ..items import Data, Item, Kind, Task
from ..reading import Record, read_records
from .splits import split_files

FILES = (
    "the folder with drop_dataset_dev.json and drop_dataset_train.json, or its parquet (passage, question, "
    "answers_spans), or the jsonl of simple-evals (context, ref_text)"
)
ENDINGS = (".json", ".jsonl", ".jsonl.gz", ".parquet")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_STATED = re.compile(r"(?i:answer)\W*:\s*([^\n]+)")


def read_drop(path: Path) -> Data:
    """Asks the dev (validation) split, as everybody does: the answers of the test split are not public."""
    splits = split_files(path, "drop", FILES, ENDINGS)
    asked = [file for split in ("dev", "validation") for file in splits.get(split, [])] or splits.get("test", [])
    shown = list(_items(splits.get("train", [])))
    return Data(list(_items(asked)), {"": shown} if shown else {}, drawn=True)


def _items(files: Sequence[Path]) -> Iterator[Item]:
    for file in files:
        for place, record in enumerate(read_records(file)):
            if record.get("ref_text") is not None:
                yield _simple_evals(f"{file.name}/{place}", record)
            elif record.get("answers_spans") is not None:
                spans = tuple(dict.fromkeys(record.get("answers_spans")["spans"]))
                name = str(record.get("query_id") or f"{file.name}/{place}")
                yield _item(name, record.text("passage"), record.text("question"), [spans], record.where)
            else:
                yield from _passages(record)


def _passages(record: Record) -> Iterator[Item]:
    """The authors' file: an object of passages by their ids."""
    for name, passage in record.values.items():
        if not isinstance(passage, Mapping) or "qa_pairs" not in passage:
            record.broken(f"{name!r} is no passage with qa_pairs")
        for place, pair in enumerate(passage["qa_pairs"]):
            given = [pair["answer"], *pair.get("validated_answers", ())]
            golds = [spans for spans in map(_spans, given) if spans]
            key = str(pair.get("query_id") or f"{name}/{place}")
            yield _item(key, passage["passage"], pair["question"], golds, f"{record.where}, {key}")


def _spans(answer: Mapping[str, Any]) -> tuple[str, ...]:
    """An answer of the authors' file: a number, a date, or spans."""
    if answer.get("number"):
        return (str(answer["number"]),)
    if answer.get("spans"):
        return tuple(answer["spans"])
    date = answer.get("date") or {}
    words = " ".join(str(date[part]) for part in ("day", "month", "year") if date.get(part))
    return (words,) if words else ()


def _simple_evals(name: str, record: Record) -> Item:
    found = re.search(r"Passage:\s*(.*?)\nQuestion:\s*(.*?)\nAnswer:", record.text("context") + "\nAnswer:", re.DOTALL)
    if found is None:
        record.broken("the context is not 'Passage: ... Question: ...'")
    golds = [(text,) for text in record.text("ref_text").split("|") if text.strip()]
    return _item(name, found[1], found[2], golds, record.where)


def _item(name: str, passage: str, question: str, golds: Sequence[tuple[str, ...]], where: str) -> Item:
    texts = list(dict.fromkeys(", ".join(spans) for spans in golds))
    extra = {"passage": passage.strip(), "golds": texts}
    return Item(name, question.strip(), texts[0] if texts else "", (), "", extra, where)


def stated_answer(reply: str, chat: bool) -> str | None:
    """What a reply answers: behind its last "Answer:", or else its first line where it goes on with a text."""
    if chat:
        found = _STATED.findall(reply_of(reply))
        return found[-1].strip(" *.") or None if found else None
    lines = reply.strip().splitlines()
    return lines[0].strip() or None if lines else None


def words_f1(answer: str, gold: str) -> float:
    """F1 of the words in common, without articles, punctuation and case; 0 where the gold one has numbers and the
    answer none of them."""
    given, wanted = Counter(_words(answer)), Counter(_words(gold))
    numbers = {word for word in wanted if number(word) is not None}
    common = sum((given & wanted).values())
    if not common or (numbers and not numbers & given.keys()):
        return 0.0
    return 2 * common / (given.total() + wanted.total())


def _words(text: str) -> list[str]:
    words = []
    for word in re.split(r"[ \-]+", text.lower()):
        value = number(word.strip(string.punctuation.replace("-", "") + "€£"))
        plain = str(float(value)) if value is not None else word.translate(_PUNCTUATION)
        words += _ARTICLES.sub(" ", plain).split()
    return words


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _ask(item: Item) -> str:
    return f"Passage: {item.extra['passage']}\nQuestion: {item.question}\nAnswer:"


def _chat(item: Item) -> str:
    return (
        f"Passage: {item.extra['passage']}\nQuestion: {item.question}\n\n"
        'Think it through, then write as the last line of your reply: "Answer: " and the answer, as short as you can.'
    )


TASKS = (
    Task(
        "drop",
        "DROP",
        Kind.SPANS,
        FILES,
        read_drop,
        _ask,
        lambda item: f" {item.gold}",
        _chat,
        shots=3,
        stop=("\n",),
        tokens=64,
        metric="F1",
    ),
)
