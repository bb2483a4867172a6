"""From replies to grades, for every kind of task."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.evaluation.items import Item
from dsv3.evaluation.scoring import Case, Grade, Graders
from dsv3.evaluation.tasks import TASKS, hard
from dsv3.evaluation.tasks.code import program
from dsv3.evaluation.tasks.live import PRELUDE
from dsv3.evaluation.tasks.reading_comprehension import words_f1
from dsv3.grading.verdict import Verdict

FOUR = ("Paris", "Rome", "Bern", "Oslo")


def grade(task: str, item: Item, text: str, chat: bool = True) -> Grade:
    with Graders() as graders:
        return graders.grade(TASKS[task], [Case(item, text, chat)])[0]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Answer: B", "B"),
        ("<think>It is C. No.</think>Rome it is.\nAnswer: B", "B"),
        ("<think>Answer: B", None),
        ("答案：B", "B"),
        ("It could be A or B.", None),
    ],
)
def test_a_letter_is_read_behind_the_thought(text, letter):
    found = grade("mmlu", Item("i", "Q", "B", FOUR), text)
    assert (found.answer, found.right) == (letter, letter == "B")


@pytest.mark.parametrize(
    ("text", "chat", "right"),
    [
        ("So it is \\boxed{1,024}.", True, True),
        ("<think>\\boxed{1024}</think>I do not know.", True, False),
        ("She has 1000 + 24 = 1024.\n#### 1024\n\nQuestion: another", False, True),
        ("#### 1024.", False, True),
        ("\\boxed{1000+24}", True, False),
    ],
)
def test_a_number_is_read_where_it_is_marked(text, chat, right):
    assert grade("gsm8k", Item("i", "Q", "1024"), text, chat).right is right


def test_an_answer_that_is_missing_is_no_wrong_one():
    assert grade("gsm8k", Item("i", "Q", "1"), "Who knows?").verdict is Verdict.MISSING
    assert grade("mmlu", Item("i", "Q", "B", FOUR), "Who knows?").verdict is Verdict.MISSING
    assert grade("drop", Item("i", "Q", "3", extra={"golds": ["3"]}), "Who knows?").verdict is Verdict.MISSING


def test_expressions_are_compared_as_mathematics():
    assert grade("math", Item("i", "Q", "\\frac{\\sqrt{2}}{2}"), "\\boxed{\\frac{1}{\\sqrt{2}}}").right
    assert not grade("math", Item("i", "Q", "\\frac{\\sqrt{2}}{2}"), "\\boxed{0.7}").right


def test_instructions_are_kept_to_the_letter_or_not():
    rules = {"rules": [{"rule": "no_commas"}, {"rule": "words", "at_most": 3}]}
    item = Item("i", "P", "", extra=rules)
    assert grade("ifeval", item, "<think>a, b, c, d</think>one two three").right
    assert not grade("ifeval", item, "one, two").right
    assert not grade("ifeval", item, "one two three four").right


# BBH and DROP


@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        ("Let me see. So the answer is False.", "False", True),
        ("the answer is (B).", "(B)", True),
        ("the answer is B", "(B)", True),
        ("the answer is (B) a red car", "(B)", True),
        ("the answer is (C).", "(B)", False),
        ("The answer is a b c.\nSo the answer is c b a.", "c b a", True),
        ("I think it is False.", "False", False),
    ],
)
def test_bbh_reads_what_the_answer_is_said_to_be(text, gold, right):
    found = hard.stated_answer(text, True)
    assert (found is not None and hard.same(found, gold)) is right


@pytest.mark.parametrize(
    ("answer", "gold", "share"),
    [
        ("the New England Patriots", "New England Patriots", 1.0),
        ("Patriots", "New England Patriots", 0.5),
        ("3 yards", "3", 2 / 3),
        ("4 yards", "3 yards", 0.0),
        ("3.0", "3", 1.0),
        ("1,000", "1000", 1.0),
        ("Al and Bo", "Al, Bo", 0.8),
        ("nobody", "Al", 0.0),
        ("", "Al", 0.0),
    ],
)
def test_drop_counts_the_words_in_common(answer, gold, share):
    assert words_f1(answer, gold) == pytest.approx(share)


@given(st.text(), st.text())
def test_f1_is_a_share(answer, gold):
    assert 0 <= words_f1(answer, gold) <= 1
    assert words_f1(answer, gold) in (0, 1) or answer != gold


def test_drop_takes_the_best_of_its_gold_answers():
    item = Item("i", "Who?", "Al", extra={"golds": ["Al", "Al Bo Cy"]})
    found = grade("drop", item, "He says so.\nAnswer: Al Bo")
    assert (found.verdict, found.credit) == (Verdict.WRONG, pytest.approx(0.8))
    assert grade("drop", item, " Al Bo Cy\nPassage", chat=False).credit == 1


# Programs

ONE = Item("i", "def one():\n    '''1'''\n", "", extra={"entry": "one", "tests": "assert one() == 1\n"})
FREE = Item("i", "Write one().", "", extra={"tests": "assert one() == 1\n", "shown": []})
WHOLE = "def one():\n    return 1\n"


@pytest.mark.parametrize(
    ("item", "reply", "chat", "starts"),
    [
        (ONE, "    return 1\n", False, "def one():\n    '''1'''\n    return 1"),
        (ONE, f"```python\n{WHOLE}```", True, "def one():\n    '''1'''\n\n\ndef one():"),
        (ONE, f"<think>```python\nno\n```</think>Here:\n```\n{WHOLE}```\nDone.", True, "def one():"),
        (ONE, "```python\n    return 1\n```", True, "def one():\n    '''1'''\n    return 1"),
        (ONE, WHOLE, True, "def one():"),
        (FREE, f"{WHOLE}[DONE]", False, "def one():"),
        (FREE, f"```python\n{WHOLE}```", True, "def one():"),
    ],
)
def test_a_program_is_found_in_a_reply(item, reply, chat, starts):
    source = program(item, reply, chat)
    assert source is not None and source.startswith(starts)
    found: dict = {}
    exec(source, found)
    assert found["one"]() == 1


@pytest.mark.parametrize("reply", ["I cannot do that.", "<think>```python\ndef one(): return 1\n```</think>", ""])
def test_a_reply_without_a_program_gives_none(reply):
    assert program(ONE, reply, True) is None
    assert grade("humaneval", ONE, reply).verdict is Verdict.MISSING


def test_programs_are_right_when_their_tests_pass():
    right, wrong = f"```python\n{WHOLE}```", "```python\ndef one():\n    return 2\n```"
    with Graders() as graders:
        graders.prepare(TASKS["humaneval"])
        found = graders.grade(TASKS["humaneval"], [Case(ONE, right, True), Case(ONE, wrong, True)])
    assert [each.verdict for each in found] == [Verdict.RIGHT, Verdict.WRONG]


@pytest.mark.slow
def test_programs_that_end_early_or_never_are_not_right():
    early = "```python\nimport os\nos._exit(0)\n```"
    never = "```python\ndef one():\n    while True: pass\n```"
    with Graders() as graders:
        found = graders.grade(TASKS["humaneval"], [Case(ONE, early, True), Case(ONE, never, True)])
    assert [each.verdict for each in found] == [Verdict.WRONG, Verdict.TIMEOUT]


PRINTS = Item("i", "Double it.", "", extra={"date": "2024-09", "starter": "", "cases": [("1\n", "2\n"), ("2\n", "4")]})
METHOD = "class Solution:\n    def double(self, xs: List[int]) -> List[int]:\n        "
CALLED = Item(
    "i",
    "Double them.",
    "",
    extra={"starter": METHOD, "prelude": PRELUDE, "tests": "assert Solution().double(*[[1, 2]]) == [2, 4]"},
)


def test_contest_programs_are_right_when_they_print_or_return_what_is_expected():
    doubles, always = "```python\nprint(2 * int(input()))\n```", "```python\nprint(2)\n```"
    method = f"```python\n{METHOD}return [2 * x for x in xs]\n```"
    cases = [Case(PRINTS, doubles, True), Case(PRINTS, always, True), Case(CALLED, method, True)]
    cases.append(Case(CALLED, "return [2 * x for x in xs]\n", False))
    with Graders() as graders:
        found = graders.grade(TASKS["livecodebench"], cases)
    assert [each.right for each in found] == [True, False, True, True]
