"""Items that training texts hold are found, and the results without them are those of a run without them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.errors import UserError
from dsv3.evaluation.contamination import PHRASE, RUN, check
from dsv3.evaluation.items import Item, Kind
from dsv3.evaluation.results import Result, summarise
from dsv3.evaluation.scoring import Grade
from dsv3.evaluation.tasks import TASKS
from dsv3.grading.verdict import Verdict

WORDS = [
    "apple",
    "river",
    "stone",
    "cloud",
    "paper",
    "candle",
    "window",
    "garden",
    "horse",
    "mirror",
    "bottle",
    "silver",
]


def question(number: int, words: int = 16) -> str:
    """A question of so many words that no other one has."""
    return f"Question {number}: " + " ".join(f"{WORDS[i % len(WORDS)]}{number}" for i in range(words - 2)) + "?"


class Quiet:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def show(self, line: str, final: bool = False) -> None:
        self.lines.append(line)

    def say(self, text: str) -> None:
        self.lines.append(text)


def ran(out: Path, items: list[Item], right: list[bool], task: str = "gsm8k") -> tuple[Result, Any, list[Item]]:
    """A result as the runner leaves it."""
    chosen = TASKS[task]
    grades = {
        item.id: [Grade(Verdict.RIGHT if good else Verdict.WRONG, "1")] for item, good in zip(items, right, strict=True)
    }
    folder = out / "graded"
    folder.mkdir(exist_ok=True)
    rows = [{"item": name, "sample": 0, "verdict": each[0].verdict, "answer": "1"} for name, each in grades.items()]
    (folder / f"{task}.v3.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = Result(task, task, "v3", "accuracy", len(items), len(items), 1, "0" * 16)
    return summarise(result, chosen, items, grades), chosen, items


def corpus(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def items() -> list[Item]:
    return [Item(f"test/{number}", question(number), "1") for number in range(10)]


def test_found_items_and_the_result_without_them(items: list[Item], tmp_path: Path):
    right = [True, True, True, True, False, False, False, False, True, False]
    one = ran(tmp_path, items, right)
    texts = ["nothing of interest", f"as seen on a page, {question(1).upper()} and so on", f"x {question(3)}", "more"]
    (found,) = check([one], [corpus(tmp_path / "c.jsonl", texts)], tmp_path, Quiet())
    assert [hit.item for hit in found.hits] == ["test/1", "test/3"]
    assert found.hits[0].where.endswith("c.jsonl:2") and len(found.hits[0].run.split()) == RUN
    assert (found.items, found.short, found.documents, found.share) == (10, 0, 4, 0.2)
    assert found.clean is not None
    assert (found.clean.items, found.clean.value) == (8, pytest.approx(3 / 8))
    kept = [item for item in items if item.id not in ("test/1", "test/3")]
    alone, *_ = ran(tmp_path, kept, [right[int(item.id[-1])] for item in kept])
    assert (found.clean.low, found.clean.high) == (alone.low, alone.high)
    assert json.dumps(found.as_json(), allow_nan=False)


def test_a_clean_corpus(items: list[Item], tmp_path: Path):
    (found,) = check([ran(tmp_path, items, [True] * 10)], [corpus(tmp_path / "c.jsonl", ["a b"])], tmp_path, Quiet())
    assert found.hits == [] and found.clean is None and found.share == 0


def test_items_that_were_not_asked_do_not_count(items: list[Item], tmp_path: Path):
    result, task, _ = ran(tmp_path, items[:4], [True, False, True, False])
    texts = corpus(tmp_path / "c.jsonl", [question(number) for number in (0, 7)])
    (found,) = check([(replace(result, of=10), task, items)], [texts], tmp_path, Quiet())
    assert (found.items, [hit.item for hit in found.hits]) == (4, ["test/0"])
    assert found.clean.value == pytest.approx(1 / 3)


def test_choices_belong_to_the_question_and_groups_stay_groups(tmp_path: Path):
    choices = ("one of the many", "two of the many", "three of them", "none of them at all")
    items = [
        Item(f"{group}/{n}", f"Which is it, {n}?", "A", choices, group) for group in ("law", "art") for n in (1, 2)
    ]
    one = ran(tmp_path, items, [True, False, True, True], "ceval")
    seen = corpus(tmp_path / "c.jsonl", ["Which is it, 2? " + " ".join(choices)])
    (found,) = check([one], [seen], tmp_path, Quiet())
    # Both subjects have this very question: each of the two is found.
    assert [hit.item for hit in found.hits] == ["law/2", "art/2"]
    assert one[0].value == 0.75 and found.clean.value == 1.0
    assert found.clean.metric == one[0].metric == "accuracy, mean over subjects"


def test_short_items_are_counted_not_guessed(tmp_path: Path):
    items = [Item("a", "What is it?", "1"), Item("b", question(1), "1")]
    (found,) = check(
        [ran(tmp_path, items, [True, True])],
        [corpus(tmp_path / "c.jsonl", ["What is it?", question(1)])],
        tmp_path,
        Quiet(),
    )
    assert (found.short, found.share, [hit.item for hit in found.hits]) == (1, 1.0, ["b"])
    assert found.clean.items == 1


def test_all_of_them(items: list[Item], tmp_path: Path):
    seen = corpus(tmp_path / "c.jsonl", [question(number) for number in range(10)])
    (found,) = check([ran(tmp_path, items, [True] * 10)], [seen], tmp_path, Quiet())
    assert found.share == 1 and found.clean is None


def test_what_many_items_share_is_a_phrase(tmp_path: Path):
    phrase = question(99, 15)
    many = [Item(str(n), f"{phrase} {n}", "1") for n in range(PHRASE + 1)]
    seen = corpus(tmp_path / "c.jsonl", [phrase])
    (found,) = check([ran(tmp_path, many, [True] * len(many))], [seen], tmp_path, Quiet())
    assert found.hits == []
    (found,) = check([ran(tmp_path, many[:PHRASE], [True] * PHRASE)], [seen], tmp_path, Quiet())
    assert len(found.hits) == PHRASE


def test_texts_of_several_kinds(items: list[Item], tmp_path: Path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(f"A page.\n{question(2)}")
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "manifest.json").write_text("{}")
    one = ran(tmp_path, items, [True] * 10)
    with pytest.raises(UserError, match="token shards"):
        check([one], [shards], tmp_path, Quiet())
    (found,) = check(
        [one],
        [tmp_path / "texts", shards],
        tmp_path,
        Quiet(),
        lambda folder: [(f"{folder.name}, document 0", question(5))],
    )
    assert [hit.where.rpartition("/")[2] for hit in found.hits] == ["a.txt", "shards, document 0"]
    with pytest.raises(UserError, match="does not exist"):
        check([one], [tmp_path / "gone"], tmp_path, Quiet())


def test_made_up_texts_are_passed_over(items: list[Item], tmp_path: Path):
    result, task, _ = ran(tmp_path, items, [True] * 10)
    seen = corpus(tmp_path / "c.jsonl", ["a"])
    assert check([(result, replace(task, kind=Kind.FIND), items)], [seen], tmp_path, Quiet()) == []


def test_lost_grades_are_said(items: list[Item], tmp_path: Path):
    one = ran(tmp_path, items, [True] * 10)
    (tmp_path / "graded" / "gsm8k.v3.jsonl").unlink()
    seen = corpus(tmp_path / "c.jsonl", [question(1)])
    with pytest.raises(UserError, match="run the same command again"):
        check([one], [seen], tmp_path, Quiet())


@given(st.integers(0, 9), st.integers(RUN, 16), st.integers(0, 3))
def test_any_run_of_a_question_gives_it_away(tmp_path_factory, number: int, length: int, start: int):
    folder = tmp_path_factory.mktemp("given")
    items = [Item(f"test/{n}", question(n), "1") for n in range(10)]
    words = question(number).split()
    piece = words[min(start, len(words) - length) :][:length]
    one = ran(folder, items, [True] * 10)
    (found,) = check([one], [corpus(folder / "c.jsonl", [f"so {' '.join(piece)} it goes"])], folder, Quiet())
    assert [hit.item for hit in found.hits] == [f"test/{number}"]
    (missed,) = check([one], [corpus(folder / "d.jsonl", [" ".join(piece[: RUN - 1])])], folder, Quiet())
    assert missed.hits == []
