"""The published rows as something to run: what is asked, what counts as comparable, and the verdicts."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.errors import UserError
from dsv3.evaluation.items import Kind
from dsv3.evaluation.protocols import PROTOCOLS
from dsv3.evaluation.published import (
    BPB,
    CONSENSUS,
    HARNESS,
    MODELS,
    ROWS,
    STUDENTS,
    figure,
    incomparable,
    reference,
    same_metric,
)
from dsv3.evaluation.results import Result
from dsv3.evaluation.suites import SUITES, Outcome, Row, Suite, Verdict, hours_of, judge, suite
from dsv3.evaluation.tasks import TASKS

GPU = {"device": "cuda", "devices": 8}
MMLU = Result(
    "mmlu", "MMLU", "base", "accuracy by likelihood", 14042, 14042, 1, "0" * 16, 0.871, 0.865, 0.877, 5, seconds=900.0
)


def only(row_of: str, model: str, metric: str | None = None) -> Suite:
    """A suite of one row."""
    for each in SUITES.values():
        for row in each.rows:
            figure = row.published
            if (figure.benchmark, figure.model) == (row_of, model) and metric in (None, figure.metric):
                return Suite("one", "one", (model,), (row,))
    raise AssertionError(row_of)


def verdict(result: Result, model: str = "V3-Base", **subject: object) -> Outcome:
    (outcome,) = judge(only(result.task, model), [result], subject or GPU)
    return outcome


@pytest.mark.parametrize(
    ("benchmark", "model", "value", "shots", "protocol"),
    [
        ("mmlu", "V3", 88.5, 0, "v3"),
        ("mmlu", "V3-Base", 87.1, 5, "base"),
        ("humaneval", "V3-Base", 65.2, 0, "base"),
        ("gsm8k", "V3-Base", 89.3, 8, "base"),
        ("math", "V3-Base", 61.6, 4, "base"),
        ("pile", "V3-Base", 0.548, 0, "base"),
        ("math500", "V3", 90.2, 0, "v3"),
        ("aime24", "V3", 39.2, 0, "v3"),
        ("aime24", "R1", 79.8, 0, "r1"),
        ("math500", "R1", 97.3, 0, "r1"),
        ("ifeval", "R1", 83.3, 0, "r1"),
        ("aime24", "R1-Distill-Qwen-1.5B", 28.9, 0, "r1"),
        ("gpqa", "R1-Distill-Llama-70B", 65.2, 0, "r1"),
    ],
)
def test_the_published_figures(benchmark: str, model: str, value: float, shots: int, protocol: str):
    row = figure(benchmark, model)
    assert (row.value, row.shots, row.protocol) == (value, shots, protocol)
    assert row.source


def test_every_row_can_be_run_or_says_why_not():
    assert {"v3-paper", "r1-paper"} < set(SUITES)
    for each in SUITES.values():
        for row in each.rows:
            assert row.published.protocol in PROTOCOLS
            if row.task is None:
                assert row.why_not
            elif row.task.startswith("lm:"):
                assert row.task.removeprefix("lm:") in HARNESS.values() and row.protocol == "base"
            else:
                assert row.task in TASKS or row.task == "pile"
    assert set(suite("v3-paper").tasks("base")) > {"mmlu", "humaneval", "gsm8k", "math", "pile", "lm:hellaswag"}
    assert set(suite("v3-paper").tasks("v3")) >= {"mmlu", "math500", "aime24", "gpqa", "ifeval"}
    assert suite("r1-paper").protocols == ("r1",)
    assert len(STUDENTS) == 6 and all(f"{model.lower()}-paper" in SUITES for model in STUDENTS)


def test_our_tasks_ask_as_the_report_does():
    """Shots and metric of a task, when nothing is said, are those of V3-Base's row."""
    own = [row for row in suite("v3-paper").only(["base"]).rows if row.task in TASKS]
    assert len(own) > 7
    for row in own:
        task = TASKS[row.task]
        assert task.shots == row.shots, row
        assert task.kind is Kind.CHOICE or same_metric(task.metric, row.published.metric), row


def test_figures_are_shares_but_where_they_say_otherwise():
    for row in ROWS:
        assert 0 < row.value <= 100 or row.metric == "rating"
        assert (row.digits == 3) == (row.metric == BPB)
        assert round(row.value, row.digits) == row.value


def test_one_row_of_a_protocol():
    part = suite("v3-paper").only(["v3"])
    assert {row.protocol for row in part.rows} == {"v3"}
    assert len(part.rows) + len(suite("v3-paper").only(["base"]).rows) == len(suite("v3-paper").rows)


def test_an_unknown_suite():
    with pytest.raises(UserError, match=r"unknown suite 'v4'; there are v3-paper, r1-paper"):
        suite("v4")


@given(value=st.floats(0, 1), below=st.floats(0, 0.3), above=st.floats(0, 0.3))
def test_a_row_passes_where_the_interval_reaches_the_figure(value: float, below: float, above: float):
    found = verdict(replace(MMLU, value=value, low=value - below, high=value + above))
    reached = 100 * (value + above) >= 87.05
    assert found.verdict is (Verdict.PASS if reached else Verdict.FAIL)
    assert found.value == pytest.approx(100 * value)


@given(value=st.floats(0.2, 1), half=st.floats(0, 0.2))
def test_where_less_is_better_the_other_end_counts(value: float, half: float):
    result = Result(
        "pile", "Pile", "base", BPB, 9, 9, 1, "0" * 16, value, value - half, value + half, lower=True, scale=1.0
    )
    assert (verdict(result).verdict is Verdict.PASS) == (value - half <= 0.5485)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shots": 3}, "3 shots, not 5"),
        ({"items": 100}, "100 of 14,042 items"),
        ({"items": 20, "of": 20}, "the data has 20 items, the published set 14,042"),
        ({"metric": "accuracy"}, "accuracy, not accuracy by likelihood"),
        ({"metric": "F1"}, "F1, not accuracy by likelihood"),
        ({"samples": 1, "full_samples": 4}, "1 sample of every item, not 4"),
        ({"protocol": "greedy"}, "protocol greedy, not base"),
        ({"protocol": "v3"}, "protocol v3, not base"),
        ({"flags": ["some prompts were cut"]}, "some prompts were cut"),
    ],
)
def test_what_is_not_comparable_decides_nothing(change: dict, reason: str):
    result = replace(MMLU, **change)
    assert reason in incomparable(result, figure("mmlu", "V3-Base"))
    found = verdict(result)
    assert found.verdict is Verdict.NOT_RUN
    assert reason in found.reason or result.protocol == "v3"


def test_a_mean_over_subjects_or_samples_is_the_same_metric():
    assert incomparable(MMLU, figure("mmlu", "V3-Base")) == []
    assert same_metric("accuracy by likelihood, mean over subjects", "accuracy by likelihood")
    assert same_metric("pass@1", "accuracy") and not same_metric("cons@64", "accuracy")


def test_rows_that_were_not_run_say_why():
    part = suite("v3-paper").only(["base"])
    outcomes = {
        each.row.task: each for each in judge(part, [MMLU], GPU, {"gsm8k.base": "data absent", "math": "later"})
    }
    assert outcomes["gsm8k"].reason == "data absent"
    assert outcomes["math"].reason == "later"
    assert outcomes["humaneval"].reason == "humaneval was not asked for under protocol base"
    assert outcomes["mmlu"].verdict is Verdict.PASS
    for each in outcomes.values():
        assert each.verdict is not Verdict.NOT_RUN or each.reason


def test_of_two_results_the_comparable_one_counts():
    theirs = replace(MMLU, task="lm:mmlu", protocol="lm-eval", value=0.9, low=0.89, high=0.91)
    part = replace(MMLU, items=10, value=0.2, low=0.1, high=0.3)
    (outcome,) = judge(only("mmlu", "V3-Base"), [part, theirs], GPU)
    assert outcome.verdict is Verdict.PASS and outcome.result is theirs


def test_one_text_has_no_interval_and_so_no_verdict():
    pile = Result("pile", "Pile", "base", BPB, 1, 1, 1, "0" * 16, 0.5, lower=True, scale=1.0)
    assert verdict(pile).verdict is Verdict.NOT_RUN


def test_the_majoritys_answer_has_a_row_of_its_own():
    row = only("aime24", "R1-Zero", CONSENSUS)
    aime = Result("aime24", "AIME", "r1", "pass@1", 30, 30, 64, "0" * 16, 0.7, 0.6, 0.8, full_samples=64)
    (without,) = judge(row, [aime], GPU)
    assert without.verdict is Verdict.NOT_RUN
    aime.extra[CONSENSUS] = 26 / 30
    (found,) = judge(row, [aime], GPU)
    assert found.verdict is Verdict.PASS and found.value == pytest.approx(86.667, abs=1e-3)
    aime.extra[CONSENSUS] = 10 / 30
    assert judge(row, [aime], GPU)[0].verdict is Verdict.FAIL


@pytest.mark.parametrize(
    ("subject", "hours", "unit"),
    [
        ({"device": "cuda", "devices": 8}, 2.0, "GPU-hours"),
        ({"device": "cuda:1"}, 0.25, "GPU-hours"),
        ({"device": "npu", "devices": 2}, 0.5, "NPU-hours"),
        ({"device": "cpu", "devices": 1}, 0.25, "CPU-hours"),
        ({"device": "server", "devices": 1}, 0.25, "hours of the server"),
    ],
)
def test_hours_are_seconds_times_accelerators(subject: dict, hours: float, unit: str):
    assert hours_of(MMLU, subject) == (hours, unit)


def test_results_stand_beside_the_model_of_their_protocol():
    assert reference(MMLU).model == "V3-Base"
    assert reference(replace(MMLU, protocol="v3")).model == "V3"
    assert reference(replace(MMLU, protocol="r1")).model == "R1"
    assert reference(replace(MMLU, task="lm:mmlu", protocol="lm-eval")).model == "V3-Base"
    assert reference(replace(MMLU, task="gpqa", protocol="r1"), STUDENTS[0]).value == 33.8
    assert reference(replace(MMLU, task="mine")) is None
    assert all(figure("mmlu", model) for model in MODELS)


def test_a_row_is_plain_data():
    (outcome,) = judge(only("mmlu", "V3-Base"), [MMLU], GPU)
    found = outcome.as_json()
    assert found["verdict"] == "pass" and found["hours"] == 2.0 and found["target"] == 87.1
    assert Row(figure("mmlu", "V3"), "mmlu").tolerance == pytest.approx(0.05)
