"""First answers, final answers, and what happens between them."""

import time

import pytest

from dsv3.grading.answers import exact
from dsv3.grading.reflection import Reflection, candidates, until_first, with_wrong_first
from dsv3.grading.statistics import mean_interval


def is_six(answer: str) -> bool:
    return exact(answer, "6")


@pytest.mark.parametrize(
    ("thought", "found"),
    [
        ("first 3+8=11, then 11-5=6, so 6", ["6"]),
        ("先算3+8=11，再算11-5=6，所以是6", ["6"]),
        ("so 3+8=11, so 6. Wait, the answer is 7.", ["6", "7"]),
        (r"thus \boxed{5}. Hmm, so the answer is $6$. It's \boxed{7}", ["5", "6", "7"]),
        (r"the answer is \boxed{5}", ["5"]),
        (r"the answer is x = \boxed{5}", ["5"]),
        ("the answer is x+1. No, the answer should be 12/5, so it's 3.5.", ["x+1", "12/5", "3.5"]),
        ("the answer is **5**.", ["5"]),
        ("The answer is Paris, I think", ["Paris"]),
        ("答案是 12。不对，答案应该是13", ["12", "13"]),
        ("<answer> 7 </answer> or so x = 1,234.", ["7", "1,234"]),
        ("So, the answer to the question needs care. The answer is in the form a/b. The answer is not 5.", []),
        ("the answer is 12 + 3", []),
        ("so 3+8=11 and therefore 5*3 is 15", []),
        ("", []),
    ],
)
def test_candidates_are_answers_and_not_steps(thought: str, found: list[str]):
    assert candidates(f"<think>{thought}</think>the reply: so 99.") == found
    assert candidates(thought) == found


TRACE = "<think>3+8=11, so 7. Wait, the answer is 6.</think>6"


def test_a_trace_can_be_cut_at_its_first_candidate():
    assert until_first(TRACE) == "<think>3+8=11, so 7"
    assert until_first(r"<think>it is \boxed{7}, but</think>6") == r"<think>it is \boxed{7}"
    assert until_first("<think>hmm</think>so 6.") is None


def test_a_wrong_candidate_can_be_put_in_its_place():
    assert with_wrong_first(TRACE, "8") == "<think>3+8=11, so 8"
    assert with_wrong_first(r"<think>it is \boxed{7}, but</think>6", "8") == r"<think>it is \boxed{8}"
    assert with_wrong_first("<think>hmm</think>6", "8") is None


def matrix(*traces: tuple[str, str]) -> Reflection:
    reflection = Reflection()
    for thought, reply in traces:
        reflection.add(f"<think>{thought}</think>{reply}", is_six)
    return reflection


def test_every_trace_lands_in_its_cell():
    reflection = matrix(
        ("so 6.", "6"), ("so 6. Wait, so 7.", r"\boxed{6}"),
        ("so 7. Wait, so 6.", "6"),
        ("so 6. But no, so 7.", "7"), ("so 6.", "I cannot say. " * 20),
        ("so 7.", "7.0"),
        ("so 7. So 8.", "8"),
        ("hmm", "6"), ("", "6"),
        ("so 6.", ""),
    )  # fmt: skip
    reflection.add("no thought, so 6.", is_six)
    reflection.add("<think>so 6. And on and on", is_six)
    assert (reflection.right_right, reflection.wrong_right, reflection.right_wrong) == (2, 1, 2)
    assert (reflection.wrong_same, reflection.wrong_changed) == (1, 1)
    assert (reflection.no_candidate, reflection.unfinished, reflection.judged) == (3, 2, 7)


def test_what_the_matrix_says():
    right, mended, spoilt, lost = ("so 6.", "6"), ("so 7. So 6.", "6"), ("so 6. So 7.", "7"), ("so 7.", "7")
    reflection = matrix(*[right] * 4, *[mended] * 3, spoilt, *[lost] * 2)
    assert reflection.correction_precision == pytest.approx(3 / 4)
    assert reflection.recovery == pytest.approx(3 / 5)
    assert reflection.net_gain == pytest.approx(2 / 10)
    assert reflection.net_gain_interval == mean_interval([1.0] * 3 + [-1.0] + [0.0] * 6)


def test_nothing_is_claimed_where_nothing_changed():
    reflection = matrix(("so 6.", "6"))
    assert reflection.correction_precision is None and reflection.recovery is None and reflection.net_gain == 0
    report = Reflection().report()
    assert report["net_gain"] is None and report["net_gain_interval"] is None
    assert report["correction_precision_interval"] is None


def test_words_are_a_footnote_and_change_nothing():
    plain, wordy = matrix(("so 7. So 6.", "6")), matrix(("so 7. Wait, wait, however, 检查, so 6.", "6, but wait"))
    assert wordy.words == {"wait": 2, "however": 1, "检查": 1}
    assert not plain.words and plain.report()["reflective_words"] == {}


def test_the_judge_is_asked_once_where_first_and_final_are_the_same():
    asked = []

    def judge(answer: str) -> bool:
        asked.append(answer)
        return True

    Reflection().add("<think>so 6.</think>6.0", judge)
    Reflection().add("<think>so 6.</think>7", judge)
    assert asked == ["6", "6", "7"]


@pytest.mark.parametrize(
    "unit", ["so ", "answer is ", "answer: ", "so 1", "1", r"\boxed{1}", "<answer>", " ", "so it is "]
)
def test_hack_repetition_costs_linear_time(unit: str):
    began = time.perf_counter()
    for start in ("", "<answer>", "so", "answer is"):
        candidates(start + unit * (60_000 // len(unit)))
    assert time.perf_counter() - began < 5
