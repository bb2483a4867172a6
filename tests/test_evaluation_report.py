"""The report: what it says, that it holds together as JSON, Markdown and HTML, and that it is there whole or not."""

import json
import random
import re
import sys
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.errors import UserError
from dsv3.evaluation import report
from dsv3.evaluation.contamination import Hit, Overlap
from dsv3.evaluation.report import write_report
from dsv3.evaluation.report_blocks import Code, Folded, Heading, Points, Table, Text
from dsv3.evaluation.report_html import html
from dsv3.evaluation.report_markdown import markdown
from dsv3.evaluation.results import Result
from dsv3.evaluation.suites import SUITES

WHEN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
SUBJECT = {"name": "tiny", "digest": "d" * 16, "device": "cpu", "devices": 1, "machine": {"cpu": {"cores": 2}}}
MATRIX = {
    "right_right": 30,
    "wrong_right": 4,
    "right_wrong": 1,
    "wrong_wrong_same": 6,
    "wrong_wrong_changed": 5,
    "no_candidate": 3,
    "unfinished": 1,
    "correction_precision": 0.8,
    "correction_precision_interval": [0.38, 0.96],
    "net_gain": 0.065,
    "net_gain_interval": [-0.03, 0.16],
    "recovery": 0.27,
    "reflective_words": {"wait": 90, "check": 12},
}
REFLECTION = {
    "traces": 50,
    "matrix": MATRIX,
    "control": {"items": 46, "cut_short": 0.67, "whole_thought": 0.74, "gain": 0.07, "gain_interval": [-0.04, 0.1]},
    "injection": {"items": 31, "mended": 0.4, "mended_interval": [0.25, 0.56], "matrix": MATRIX},
}
DRAW = random.Random(0)
CELLS = {f"{length}/{depth}": float(depth < 60) for length in (1024, 4096) for depth in range(0, 101, 10)}
RESULTS = [
    Result(
        "mmlu",
        "MMLU",
        "base",
        "accuracy by likelihood",
        14042,
        14042,
        1,
        "a1b2c3d4e5f60718",
        0.5,
        0.49,
        0.51,
        5,
        groups={"anatomy": {"items": 135, "value": 0.8}, "law": {"items": 20, "value": 0.1}},
        seconds=7200.0,
    ),
    Result(
        "gsm8k",
        "GSM8K",
        "v3",
        "accuracy",
        100,
        1319,
        1,
        "b" * 16,
        0.52,
        0.42,
        0.62,
        truncated=0.1,
        lengths=[DRAW.randrange(500) for _ in range(100)],
        mean_tokens=250.0,
        notes=["a note"],
    ),
    Result("math500", "MATH-500", "r1", "pass@1", 500, 500, 16, "c" * 16, 0.7, 0.6, 0.8, full_samples=16),
    Result("needle", "Needle in a haystack", "v3", "accuracy", 22, 22, 1, "d" * 16, 0.55, 0.3, 0.7),
    Result("pile", "Pile", "base", "bits per byte", 1, 1, 1, "e" * 16, 0.6, lower=True, scale=1.0),
]
RESULTS[2].extra = {"reflection": REFLECTION, "cons@16": 0.8}
RESULTS[3].extra = {"cells": CELLS}


def write(out: Path, results: list[Result] = RESULTS, **more: Any) -> dict[str, Any]:
    """report.json of a report."""
    given: dict[str, Any] = {"subject": SUBJECT, "command": "dsv3 eval tiny --tasks mmlu", "when": WHEN} | more
    write_report(out, results, **given)
    return json.loads((out / "report.json").read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name))


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects what is fetched and what is said."""

    EMPTY = ("meta", "img", "link", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.said: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said.append(data)


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a Markdown text, as rows of cells."""
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif found[-1]:
            found.append([])
    return [rows for rows in found if rows]


def test_rows_stand_beside_the_published_figures(tmp_path: Path):
    tree = write(tmp_path)
    rows = {row["task"]: row for row in tree["results"]}
    mmlu = {figure["model"]: figure for figure in rows["mmlu"]["published"]}
    assert mmlu["V3-Base"]["comparable"] and mmlu["V3-Base"]["measured_against"]
    assert mmlu["V3-Base"]["delta"] == pytest.approx(50 - 87.1)
    assert mmlu["V3"]["not_comparable"] == [
        "protocol base, not v3",
        "5 shots, not 0",
        "accuracy by likelihood, not accuracy",
    ]
    assert rows["needle"]["published"] == []
    assert rows["pile"]["low"] is None and rows["pile"]["high"] is None
    assert rows["pile"]["published"][0]["delta"] == pytest.approx(0.052)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    (main,) = [table for table in tables(text) if "Comparable" in table[0]]
    head, lines = main[0], {row[0]: row for row in main[2:]}
    assert lines["MMLU"][head.index("Ours [95%]")] == "50.0 [49.0, 51.0]"
    assert lines["MMLU"][head.index("V3-Base")] == "87.1 (5)"
    assert lines["MMLU"][head.index("Comparable")] == "yes"
    assert lines["GSM8K"][head.index("Items")] == "100 of 1,319"
    assert lines["GSM8K"][head.index("Cut off")] == "10.0%"
    assert lines["MATH-500"][head.index("Delta")] == "-27.3 (R1)"
    assert lines["Pile"][head.index("Ours [95%]")] == "0.600 [interval unknown]"
    assert "GSM8K (v3): no figure of it is published" in text
    assert "dsv3 eval tiny --tasks mmlu" in text


def test_the_page_stands_alone(tmp_path: Path):
    write(tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.sources and all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not {"script", "link", "iframe"} & page.tags


def test_pictures(tmp_path: Path):
    tree = write(tmp_path)
    assert tree["pictures"] == ["lengths.png", "math500-r1-reflection.png", "needle-v3-depths.png", "results.png"]
    for name in tree["pictures"]:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert name in (tmp_path / "report.md").read_text()
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    write(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_suite_gives_every_row_a_verdict(tmp_path: Path):
    tree = write(tmp_path, suite=SUITES["v3-paper"], reasons={"humaneval.base": "data absent"})
    rows = tree["suite"]["rows"]
    assert len(rows) == len(SUITES["v3-paper"].rows)
    found = {(row["benchmark"], row["model"]): row for row in rows}
    assert found["mmlu", "V3-Base"]["verdict"] == "fail" and found["mmlu", "V3-Base"]["hours"] == 2.0
    assert (
        found["humaneval", "V3-Base"] | {"verdict": "not run", "reason": "data absent"} == found["humaneval", "V3-Base"]
    )
    assert "0 pass, 1 fail" in (tmp_path / "report.md").read_text()
    assert "2 CPU-hours" in (tmp_path / "report.md").read_text()


def test_a_suite_of_one_model_is_what_results_are_measured_against(tmp_path: Path):
    tree = write(tmp_path, suite=SUITES["r1-distill-qwen-7b-paper"])
    (main,) = [figure for figure in tree["results"][2]["published"] if figure["measured_against"]]
    assert (main["model"], main["value"]) == ("R1-Distill-Qwen-7B", 92.8)


def test_contamination_has_a_section(tmp_path: Path):
    clean = replace(RESULTS[1], items=98, value=0.5, low=0.4, high=0.6)
    overlap = Overlap("gsm8k", "GSM8K", "v3", 100, 20, 7, hits=[Hit("test/3", "corpus.jsonl:5", "ann has 3 cats")] * 2)
    overlap.clean = clean
    tree = write(tmp_path, overlaps=[overlap])
    assert tree["contamination"][0]["found"] == 2 and tree["contamination"][0]["share"] == 2 / 80
    text = (tmp_path / "report.md").read_text()
    assert "corpus.jsonl:5" in text and "50.0 [40.0, 60.0]" in text and "2.5%" in text


def test_without_matplotlib_the_report_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert write(tmp_path)["pictures"] == []
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]
    for name in ("report.html", "report.md"):
        assert "pip install" in (tmp_path / name).read_text()


def test_an_error_leaves_the_report_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def broken(*_: Any) -> str:
        raise RuntimeError("no page today")

    monkeypatch.setattr(report, "html", broken)
    with pytest.raises(RuntimeError):
        write(tmp_path, RESULTS[:1])
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_place_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot"):
        write(tmp_path / "file")


def test_nothing_ran(tmp_path: Path):
    assert write(tmp_path, [])["results"] == []
    assert "Nothing was run." in (tmp_path / "report.md").read_text()


def test_names_of_ones_own_do_no_harm(tmp_path: Path):
    odd = 'x|y <script>alert("1")</script> [a](http://b) `c` *d* $\\frac{ 你好 \ud800'
    write(tmp_path, [replace(RESULTS[1], task="odd/../name", title=odd, notes=[odd], flags=[odd])])
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags and all(source.startswith("data:") for source in page.sources)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    bare = re.sub(r"\\.", "", text)
    assert "<script" not in bare and "](http" not in bare
    assert all(len({len(row) for row in table}) == 1 for table in tables(text))


@given(st.lists(st.lists(st.text(max_size=20), min_size=3, max_size=3), min_size=1, max_size=4))
def test_any_text_stays_in_its_cell(rows: list[list[str]]):
    (table,) = tables(markdown([Table(["a", "b", "c"], rows)]))
    assert [len(row) for row in table] == [3] * (len(rows) + 2)


@given(st.text(max_size=60))
def test_any_text_can_be_shown(text: str):
    blocks = [Heading(text), Text(text), Code(text), Points([text]), Folded(text, [Table([text], [[text]])])]
    said = "".join(Page(html("title", blocks, {})).said)
    for letter in text:
        assert letter in said or letter in "\r\x00" or letter.isspace()
    assert markdown(blocks).count("<details>") == 1
