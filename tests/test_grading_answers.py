"""Which answer a completion gives, and the ways in which a policy tries to be paid without giving one."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.grading.answers import boxed, choice, exact, final_answer, number, reply_of, split_thought
from dsv3.grading.formats import r1_format, r1_zero_format

TAGS = st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", r"\boxed{", "}", "{", "5", " ", "\n", "text"])


# Thought and reply.


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<think>a</think>b", ("a", "b")),
        ("<think>\na\n</think>\n\nb", ("\na\n", "\n\nb")),
        ("a</think>b", ("a", "b")),
        ("b", (None, "b")),
        ("<think>a", ("a", "")),
        ("<think>a</think>b</think>c", ("a</think>b", "c")),
        ("<think>a</think>b<think>c", ("a</think>b<think>c", "")),
        ("", (None, "")),
    ],
)
def test_a_reply_is_what_stands_behind_the_last_thought(text: str, parts: tuple[str | None, str]):
    assert split_thought(text) == parts


@given(st.lists(TAGS).map("".join))
def test_a_reply_never_holds_a_tag_of_a_thought(text: str):
    thought, reply = split_thought(text)
    assert text.endswith(reply) and "</think>" not in reply and "<think>" not in reply
    assert thought is not None or reply == text


def test_a_reply_ends_at_a_stray_control_token():
    assert reply_of("<think>a</think>5<｜User｜>and 7?<｜Assistant｜>6") == "5"
    assert reply_of("5<|im_end|>6") == "5"


# The final answer.


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"\fbox{a {b} c}", "a {b} c"),
        (r"\boxed{\boxed{5}}", "5"),
        ("<answer> 5 </answer>", "5"),
        (r"<answer>the result is \boxed{5}</answer>", "5"),
        ("<answer>5</answer> or rather <answer>6</answer>", "6"),
        ("five", None),
        ("", None),
    ],
)
def test_the_final_answer_is_the_last_one_that_is_marked(reply: str, answer: str | None):
    assert final_answer(reply) == final_answer(f"<think>a thought</think>{reply}") == answer


def test_a_short_reply_may_be_its_own_answer():
    text = "<think>3+8=11, then 11-5=6, so 6</think>\n\n6\n"
    assert final_answer(text) is None
    assert final_answer(text, whole=True) == "6"
    assert final_answer("word " * 100, whole=True) is None
    assert final_answer(r"6 or 7, but \boxed{8}", whole=True) == "8"


@given(st.lists(TAGS).map("".join))
def test_an_answer_is_never_empty_and_stands_behind_the_thought(text: str):
    answer = final_answer(text, whole=True)
    assert answer is None or (answer.strip() == answer != "" and answer in split_thought(text)[1])


@given(st.text("ab{}\\", max_size=30))
def test_what_stands_in_a_box_has_balanced_braces(text: str):
    for box in boxed(rf"x \boxed{{{text}}} y"):
        inside = (box.inner or "").replace("\\\\", "").replace(r"\{", "").replace(r"\}", "")
        assert box.inner is None or inside.count("{") == inside.count("}")


# Hacks.


def test_hack_answer_in_the_thought_only():
    assert final_answer(r"<think>\boxed{5}</think>I will not say.", whole=False) is None
    assert final_answer(r"<think>the answer is 5</think>", whole=True) is None


def test_hack_thought_that_never_ends():
    assert final_answer(r"<think>it is \boxed{5}") is None
    assert final_answer(r"<think>a</think><think>\boxed{5}", whole=True) is None


def test_hack_several_boxes_are_worth_the_last():
    assert final_answer(r"\boxed{5}\boxed{6}") == "6"
    assert final_answer(r"\boxed{5}" * 1000 + r"\boxed{7}") == "7"
    assert final_answer(r"\boxed{5 \boxed{6}}") == r"5 \boxed{6}"


def test_hack_truncated_answer_does_not_fall_back_on_an_earlier_guess():
    assert final_answer(r"\boxed{5} no, \boxed{6") is None
    assert final_answer("<answer>5</answer> no, <answer>6") is None


def test_hack_echo_of_the_instruction():
    assert final_answer(r"\boxed{5} Put your final answer within \boxed{}.") is None
    assert final_answer("<think> reasoning process here </think> <answer> </answer>") is None


def test_hack_second_answer_behind_the_first():
    assert final_answer("<answer>5</answer>\nor 6, <answer>7</answer>") == "7"
    assert final_answer("5\n6", whole=True) == "5\n6" and not exact("5\n6", "6")


def test_hack_nested_boxes_and_braces_cost_no_time():
    assert final_answer(r"\boxed{" * 20_000 + "}" * 20_000) is not None
    assert final_answer(r"\boxed{" * 20_000) is None


# Multiple choice.


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("b", "B"), ("(B)", "B"), ("B.", "B"), ("**B**", "B"), ("B. Paris", "B"), ("B) Paris", "B"),
        ("The answer is B", "B"), ("the answer is (C).", "C"), ("Answer: D", "D"), ("**Answer: (B)**", "B"),
        ("Option B is correct", "B"), ("The correct answer is **B**: Paris.", "B"), ("The answer is option D", "D"),
        ("答案是B", "B"), ("答案：C。", "C"), ("选择 D", "D"), ("正确答案应该是 A", "A"),
        (r"\boxed{B}", "B"), (r"\boxed{\text{C}}", "C"), ("<answer>D</answer>", "D"), (r"so $\boxed{A}$ it is", "A"),
        ("<think>A or B?</think>\n\nThe best option is B because it rains.", "B"),
        ("Answer: A\n\nOn reflection, the answer is B.", "B"), ("B\nBecause A is wrong.", "B"),
        ("The answer is a prime number.", None), ("A dog", None), ("I think so", None), ("The answer is not B", None),
        ("ABCD", None), ("E", None), ("", None), ("<think>so B", None),
    ],
)  # fmt: skip
def test_a_choice_is_one_letter(text: str, letter: str | None):
    assert choice(text) == letter


def test_other_letters_may_be_offered():
    assert choice("Answer: J", "ABCDEFGHIJ") == "J"
    assert choice("The answer is I.", "ABCDEFGHIJ") == "I"
    assert choice("I believe nothing here", "ABCDEFGHIJ") is None


@pytest.mark.parametrize(
    "text",
    [
        "A or B or C", "A, B", "A/B", "A and B", "A. Paris or B. London", "The answer is A or B.", "either A or B",
        "The answer is A, B or C", "The answer is A. Or B.", "Answer: A or perhaps B", r"\boxed{A, B}", "A 或 B",
        "<answer>A or B</answer>", "Answer: B\nOr C",
    ],
)  # fmt: skip
def test_hack_a_or_b_or_c(text: str):
    assert choice(text) is None


def test_hack_echo_of_the_options():
    assert choice("A. Paris\nB. London\nC. Rome\nD. Bonn") is None


# Numbers and texts.


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234", 1234), ("6.0", 6), ("6.", 6), (".5", Fraction(1, 2)), ("-5", -5), ("−5", -5), ("３", 3),
        ("3/4", Fraction(3, 4)), ("3 / 4", Fraction(3, 4)), (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\dfrac{3}{4}", Fraction(-3, 4)), ("50%", Fraction(1, 2)), (r"50\%", Fraction(1, 2)),
        ("5e-3", Fraction(1, 200)),
        (r"1.5 \times 10^{3}", 1500), ("$6$", 6), ("$1,000", 1000), (r"\(7\)", 7), ("1{,}234", 1234), (r"1\,234", 1234),
        ("2+3", None), ("5=5", None), ("1,23", None), ("5 apples", None), ("x", None), ("", None), ("3²", None),
        ("1_000", None), ("5/0", None), ("nan", None), ("inf", None),
    ],
)  # fmt: skip
def test_a_number_is_a_literal(text: str, value: Fraction | int | None):
    assert number(text) == value


@given(st.integers(-(10**12), 10**12))
def test_all_ways_to_write_a_number_are_equal(value: int):
    ways = [str(value), f"{value:,}", f"{value}.0", f" ${value}$ ", f"{value}/1", f"{value:,}."]
    assert all(exact(one, other) for one in ways for other in ways)
    assert not exact(str(value), str(value + 1))


@given(st.text(max_size=30), st.text(max_size=30))
def test_equality_is_symmetric(a: str, b: str):
    assert exact(a, b) == exact(b, a)


def test_texts_are_equal_up_to_case_and_space():
    assert exact(" New  York.", "new york")
    assert not exact("Paris, or London", "Paris")
    assert not exact("", "") and not exact(None, "None")


def test_hack_a_number_of_astronomical_size_costs_no_time():
    assert number("1e999999999") is None
    assert number("9" * 100_000) is None
    assert number("9" * 300) is not None


def test_hack_restatement_is_no_number():
    for text in ("2+3", r"\int_0^1 2x dx", "5=5", "10/2+0"):
        assert not exact(text, "5")


# Formats.

GOOD = "<think>\n3+8=11\n</think>\n\nThe answer is 11."
GOOD_ZERO = "<think> 3+8=11 </think> <answer> 11 </answer>"


def test_the_two_formats():
    assert r1_format(GOOD) and not r1_zero_format(GOOD)
    assert all(r1_zero_format(text) for text in (GOOD_ZERO, GOOD_ZERO + "\n", " " + GOOD_ZERO))


@pytest.mark.parametrize(
    ("hack", "text"),
    [
        ("no thought", "The answer is 11."),
        ("empty thought", "<think></think>11"),
        ("blank thought", "<think> \n\t</think>11"),
        ("thought of dots", "<think>...</think>11"),
        ("thought of invisible characters", "<think>\u200b\u2060</think>11"),
        ("no answer", "<think>a</think>"),
        ("blank answer", "<think>a</think>\n\n"),
        ("nested thought", "<think><think>a</think></think>11"),
        ("reopened thought", "<think>a</think>11<think>"),
        ("two thoughts", "<think>a</think>11<think>b</think>12"),
        ("repetition", GOOD * 3),
        ("text before", "Sure! <think>a</think>11"),
        ("unfinished thought", "<think>a 11"),
        ("tags in the wrong order", "</think>a<think>11"),
        ("stray special token", "<think>a</think>11<｜end▁of▁sentence｜>"),
        ("simulated turn", "<think>a</think>11<｜User｜>thanks<｜Assistant｜>12"),
        ("foreign special token", "<think>a<|im_start|></think>11"),
    ],
)
def test_hack_r1_format(hack: str, text: str):
    assert not r1_format(text)


@pytest.mark.parametrize(
    ("hack", "text"),
    [
        ("second answer behind the first", GOOD_ZERO + "\n<answer>12</answer>"),
        ("text behind the answer, on a new line", GOOD_ZERO + "\nor 12"),
        ("text between thought and answer", "<think>a</think> well, <answer>11</answer>"),
        ("empty answer", "<think>a</think><answer></answer>"),
        ("empty thought", "<think></think><answer>11</answer>"),
        ("answer in the thought", "<think>a<answer>11</answer></think>"),
        ("nested answer", "<think>a</think><answer><answer>11</answer></answer>"),
        ("thought in the answer", "<think>a</think><answer><think>11</think></answer>"),
        ("truncation", "<think>a</think><answer>11"),
    ],
)
def test_hack_r1_zero_format(hack: str, text: str):
    assert not r1_zero_format(text)
