"""When a mathematical answer is right, what is no answer, and what happens where comparing it takes for ever."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dsv3.errors import UserError
from dsv3.grading import math as module
from dsv3.grading.answers import final_answer
from dsv3.grading.math import MathGrader, literal, plain, same_number, words
from dsv3.grading.verdict import Verdict


@pytest.fixture(scope="module")
def grader() -> Iterator[MathGrader]:
    pytest.importorskip("math_verify")
    with MathGrader(timeout=10.0) as grader:
        yield grader


RIGHT = [
    # Numbers, and what may stand around them.
    ("1/2", "0.5"), (r"\frac12", "0.5"), (r"\frac{1}{2}", "2/4"), ("1,234", "1234"), ("1234", "1,234"),
    ("1234", r"1{,}234"), (r"10\%", "0.1"), ("0.1", r"10\%"), ("10", r"10\%"), ("7", "7 apples"),
    ("7", r"7\text{ cm}^2"),
    (r"\$5", "5"), ("5", r"\$5.00"), ("5", "x=5"), ("34", "m + n = 34"), ("-3", "- 3"), (r"3\frac12", "3.5"),
    ("90^\\circ", "90"), ("10^5", "100000"), ("0.00015", r"1.5 \times 10^{-4}"), ("1/3", "0.333333"),
    ("6", r"\boxed{6}"), ("6", "$6$"), ("6", r"\(6\)"), ("6", "**6**"), (r"0.\overline{3}", "1/3"), ("6.", "6"),
    # Words and letters.
    ("A", "A"), (r"\text{A}", "(A)"), (r"\text{east}", "East"), ("120_5", "120_{5}"),
    # Expressions.
    (r"\pi", "3.14159265"), (r"2\pi", "6.28318531"), (r"\sqrt{2}", r"\frac{2}{\sqrt2}"), (r"2\sqrt3", r"\sqrt{12}"),
    ("(x+1)^2", "x^2+2x+1"), ("y=2x+1", "2x+1"), (r"\frac{1}{2}x", "0.5x"), (r"1+\sqrt2", r"\sqrt2+1"),
    ("2^{10}", "1024"), (r"\sin x", r"\sin(x)"), ("2sqrt(3)", r"2\sqrt{3}"), ("x**2", "x^2"),
    # Sets, intervals, tuples, matrices.
    (r"\{1,2\}", r"\{2,1\}"), ("1, 2, 3", "3,2,1"), ("(1,2)", "(1, 2)"), (r"\left[0,1\right)", "[0,1)"),
    ("x>2", r"(2,\infty)"), ("x=1, x=2", "1,2"), (r"\pm 2", "2,-2"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
]  # fmt: skip
WRONG = [
    ("6", "5"), ("1/3", "0.333"), ("A", "B"), ("(1,2)", "(2,1)"), (r"\{1,2\}", "1"), (r"\{1,2\}", r"\{1,2,3\}"),
    ("x^2", "x^3"), ("east", "west"), (r"\text{east}", r"\text{seat}"), ("x", "X or y"), ("120_5", "120"),
    ("[0,1)", "[0,1]"), ("3", "3x"), ("3", "3 million"), ("3", "3 or 4"), ("5", r"5\sqrt{1}"), ("2,3", "23"),
]  # fmt: skip
HACKS = [
    # Restatements of the question.
    ("5", "2+3"), ("1", r"\int_0^1 2x dx"), ("10", r"\sum_{k=1}^4 k"), ("5", "5=5"), ("120", "5!"), ("5", r"\sqrt{25}"),
    ("1024", "2^{10}"), ("4", r"\lim_{x \to 4} x"), ("6", r"\max(6, 5)"), ("6", r"\gcd(12, 18)"), ("2", r"\log_2 4"),
    (r"\pi", r"\pi=\pi"), ("x+1", "x+1=x+1"), (r"\sqrt2", r"\int_0^1 \sqrt2 dx"), ("x^2", r"\int_0^x 2t dt"),
    ("x+8", "x+(5+3)"), ("(5, 1)", "(2+3, 1)"), (r"\{5, 1\}", r"\{2+3, 1\}"), (r"\frac{\pi}{2}", r"\frac{\pi}{1+1}"),
    # Several answers, all answers, no answer.
    ("6", "5, 6, 7"), ("6", r"\{6, 7\}"), ("6", r"6 \text{ or } 7"), ("6", r"\boxed{5}\boxed{6}"), ("A", "A or B or C"),
    ("A", "A, B, C"), (r"\sqrt2", r"\{\sqrt2, \sqrt3\}"), ("6", r"\mathbb{R}"), ("6", "x"), ("6", r"\infty"),
    ("6", r"\pm 6"), ("x", "the answer is whatever the reader thinks that it is"),
    # Length.
    ("6", "0" * 3000 + "6"), (r"\sqrt2", r"\sqrt2" + "+0" * 1500), ("6", "6 " * 200),
]  # fmt: skip


def test_right_wrong_and_hacks(grader: MathGrader):
    """One batch: what a comparison costs is mostly the start."""
    wanted = [
        (pair, verdict) for rows, verdict in ((RIGHT, "right"), (WRONG, "wrong"), (HACKS, "wrong")) for pair in rows
    ]
    found = grader.grade([gold for (gold, _), _ in wanted], [answer for (_, answer), _ in wanted])
    odd = [(pair, verdict, got) for (pair, verdict), got in zip(wanted, found, strict=True) if got != verdict]
    assert odd == []
    assert grader.timeouts == 0


def test_no_answer_is_missing(grader: MathGrader):
    assert grader.grade(["6", "x", r"\sqrt2"], [None, "", "  "]) == [Verdict.MISSING] * 3
    assert grader.grade([], []) == []


def test_of_several_boxes_the_last_one_counts(grader: MathGrader):
    said = [r"\boxed{6} no wait \boxed{5}", r"\boxed{5}, no, \boxed{6}"]
    assert grader.grade(["6", "6"], [final_answer(text) for text in said]) == [Verdict.WRONG, Verdict.RIGHT]


def test_what_is_equal_once_is_asked_once_and_in_any_order(grader: MathGrader):
    golds = [r"\sqrt{8}", "6", r"\sqrt{8}", r"\sqrt{8}"] * 20
    answers = [r"2\sqrt2", "6", r"3\sqrt2", None] * 20
    expected = [Verdict.RIGHT, Verdict.RIGHT, Verdict.WRONG, Verdict.MISSING] * 20
    asked: list[int] = []
    real = grader._ask

    def counted(calls: list[tuple[str, str]]) -> list[object]:
        asked.append(len(calls))
        return real(calls)

    grader._ask = counted
    try:
        assert grader.grade(golds, answers) == expected
    finally:
        del grader._ask
    assert asked == [2]


# Gold answers.


@pytest.mark.parametrize("gold", [r"\frac{1}{", "", " ", "(", "$", r"\frac{}{}", "{", r"\begin{matrix}", "?", "1/0"])
def test_gold_that_does_not_parse_is_named_and_nothing_equals_it(grader: MathGrader, gold: str):
    assert grader.check_gold(["6", gold, r"\sqrt2"]) == [1]
    answers = [gold or "x", "6", "x"]
    assert Verdict.RIGHT not in grader.grade([gold] * 3, answers)


def test_prose_as_gold_is_no_product_of_letters(grader: MathGrader):
    assert grader.check_gold(["all of the numbers that are even", r"\text{even}", "blue", "x^2"]) == [0]


@given(st.sampled_from([gold for gold, _ in RIGHT]))
def test_every_gold_that_a_right_answer_has_is_understood(gold: str):
    if literal(gold) is None and words(gold) is None:
        assert module._expression(gold) is not None


# What takes for ever.

ENDLESS = "2^{2^{2^{2^{2^{2}}}}}"
HUNGRY = r"(x+1)^{100000}"


@pytest.mark.slow
def test_a_comparison_that_hangs_is_killed_and_counted_apart():
    pytest.importorskip("math_verify")
    with MathGrader(timeout=1.0) as grader:
        grader.grade([r"\sqrt2"], [r"\sqrt3"])
        began = time.monotonic()
        pairs = [(r"\sqrt2", r"\frac{2}{\sqrt2}"), (r"\sqrt2x", ENDLESS), (r"\sqrt2", r"\sqrt3"), (r"\sqrt3x", HUNGRY)]
        found = grader.grade([gold for gold, _ in pairs], [answer for _, answer in pairs])
        assert found == [Verdict.RIGHT, Verdict.TIMEOUT, Verdict.WRONG, Verdict.TIMEOUT]
        assert grader.timeouts == 2
        assert time.monotonic() - began < 30
        assert grader.grade([r"\sqrt8"], [r"2\sqrt2"]) == [Verdict.RIGHT]
        assert grader.timeouts == 2


def test_numbers_of_astronomical_size_need_no_worker():
    with MathGrader(timeout=1.0) as grader:
        for answer in ("1e999", "10^{999}", "9" * 399, "1e99999999", "10^{10^{10}}", "0." + "3" * 390):
            assert grader.grade(["6"], [answer]) == [Verdict.WRONG]
        assert grader._workers[0]._server is None


def test_any_thread_may_grade(grader: MathGrader):
    """math-verify itself refuses to work off the main thread."""
    rows = RIGHT[-12:]
    with ThreadPoolExecutor(4) as pool:
        done = pool.map(lambda _: grader.grade([gold for gold, _ in rows], [answer for _, answer in rows]), range(4))
    assert all(found == [Verdict.RIGHT] * len(rows) for found in done)


@pytest.mark.slow
def test_several_workers_share_the_batches(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("math_verify")
    monkeypatch.setattr(module, "BATCH", 2)
    with MathGrader(timeout=10.0, workers=2) as grader:
        found = grader.grade(
            [rf"\sqrt{{{i}}}" for i in range(2, 9)], [rf"\sqrt{{{2 * (i // 2)}}}" for i in range(2, 9)]
        )
        assert [verdict is Verdict.RIGHT for verdict in found] == [i % 2 == 0 for i in range(2, 9)]
        assert all(worker._server is not None for worker in grader._workers)


def test_without_math_verify_numbers_are_compared_and_the_rest_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with MathGrader() as grader:
        assert grader.grade(["1/2", "A"], ["0.5", "B"]) == [Verdict.RIGHT, Verdict.WRONG]
        with pytest.raises(UserError, match="needs math-verify: pip install"):
            grader.grade([r"\sqrt2"], ["x"])


@pytest.mark.slow
def test_a_grader_that_was_closed_starts_again():
    pytest.importorskip("math_verify")
    grader = MathGrader(timeout=10.0)
    assert grader.grade([r"\sqrt8"], [r"2\sqrt2"]) == [Verdict.RIGHT]
    server = grader._workers[0]._server
    grader.close()
    assert server is not None and server.returncode is not None
    assert grader.grade([r"\sqrt8"], [r"2\sqrt2"]) == [Verdict.RIGHT]
    grader.close()


# Numbers as they are written.

FRACTIONS = st.fractions(max_denominator=10**6).filter(lambda value: abs(value) < 10**9)


def written(value: Fraction) -> list[str]:
    top, under = value.numerator, value.denominator
    sign, size = ("-" if top < 0 else ""), abs(top)
    ways = [f"{top}/{under}", rf"\frac{{{top}}}{{{under}}}", rf"{sign}\dfrac{{{size}}}{{{under}}}", rf"${top}/{under}$"]
    whole, rest = divmod(size, under)
    if whole and rest:
        ways.append(rf"{sign}{whole}\frac{{{rest}}}{{{under}}}")
    if under == 1:
        ways += [
            f"{top}",
            f"{top:,}",
            f"{top}.0",
            f"x = {top}",
            rf"{top} \text{{ cm}}",
            f"{top} apples",
            rf"\boxed{{{top}}}",
        ]
    return ways


@given(FRACTIONS)
@example(Fraction(-7, 2))
@example(Fraction(1234567))
def test_all_ways_to_write_a_number_are_right_and_its_neighbour_is_wrong(value: Fraction):
    ways = written(value)
    with MathGrader() as grader:
        assert grader.grade([ways[0]] * len(ways), ways) == [Verdict.RIGHT] * len(ways)
        neighbours = written(value + Fraction(1, value.denominator))
        assert Verdict.RIGHT not in grader.grade([ways[-1]] * len(neighbours), neighbours)
        assert grader._workers[0]._server is None


@given(FRACTIONS, FRACTIONS)
def test_being_the_same_number_is_symmetric(one: Fraction, other: Fraction):
    first, second = literal(f"{float(one):.7f}"), literal(f"{other.numerator}/{other.denominator}")
    assert first is not None and second is not None
    assert same_number(first, second) == same_number(second, first)
    assert same_number(first, first) and same_number(second, second)


PIECES = st.sampled_from(
    ["1", "2.5", "-", "+", "/", ",", " ", "x", "=", r"\frac", "{", "}", "(", ")", "^", "_", r"\text", "apples", "%",
     "$", r"\sqrt", r"\pi", "e", "\\", ".", "π", "∞", r"\circ", "!"]
)  # fmt: skip


@given(st.text(max_size=40) | st.lists(PIECES, max_size=12).map("".join))
def test_any_text_can_be_read(text: str):
    plain(text)
    value, said = literal(text), words(text)
    assert value is None or said is None
    assert value is None or same_number(value, value)


@given(st.text(max_size=30).filter(str.strip), st.integers(-999, 999))
def test_a_number_is_only_ever_equalled_by_that_number(text: str, gold: int):
    with MathGrader() as grader:
        (verdict,) = grader.grade([str(gold)], [text])
    value = literal(text, module._SUM_ASSIGNED)
    assert (verdict is Verdict.RIGHT) == (value is not None and Fraction(gold) in value.values)


@pytest.mark.parametrize(
    "unit", ["1,", "1 ", "(", "{", r"\frac{1}{", "$", "1.", "a ", "-", "x=", r"\text{", "_", "1/", "**"]
)
def test_hack_long_answers_cost_no_time(unit: str):
    text = unit * (2000 // len(unit))
    began = time.perf_counter()
    for function in (plain, literal, words, module._expression):
        function(text)
    assert time.perf_counter() - began < 1


def test_no_thread_is_left_behind():
    before = threading.active_count()
    with MathGrader() as grader:
        grader.grade(["6"], ["6"])
    assert threading.active_count() == before
