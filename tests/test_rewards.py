"""What the rewards of training pay for, and what they refuse to pay for."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
from rewarding import RIGHT, one, score, scored

from dsv3.errors import UserError
from dsv3.grading import sandbox
from dsv3.grading.sandbox import Outcome, Result, Sandbox
from dsv3.grading.verdict import Verdict
from dsv3.training.rewards.accuracy import AccuracyCode, AccuracyMath, CodeOptions, MathOptions, are_tests, program_of
from dsv3.training.rewards.registry import Rewards, RewardSection, build

# Accuracy.


def test_the_exact_answer_is_read_behind_the_thought():
    assert score("accuracy_exact", RIGHT, answer_="6") == 1.0
    assert score("accuracy_exact", RIGHT, answer_=6) == 1.0
    assert score("accuracy_exact", RIGHT, answer_="7") == 0.0
    assert score("accuracy_exact", r"<think>a</think>So it is \boxed{6.0}.", answer_="6") == 1.0
    assert score("accuracy_exact", RIGHT, answer_="6", whole=False) == 0.0


def test_letters():
    assert score("accuracy_choice", "<think>A?</think>The answer is (B).", answer_="B") == 1.0
    assert score("accuracy_choice", "<think>A?</think>The answer is (B).", answer_="C") == 0.0
    assert score("accuracy_choice", "Answer: F", answer_="F", letters="ABCDEF") == 1.0


HACKS = {
    "answer in the thought only": r"<think>\boxed{6}, the answer is 6</think>I will not tell.",
    "unfinished thought": r"<think>it is \boxed{6}",
    "second thought behind the answer": r"<think>a</think>6<think>\boxed{6}",
    "several answers": "6 or 7",
    "list of answers": r"\boxed{5, 6, 7}",
    "last of several boxes is wrong": r"\boxed{6}\boxed{7}",
    "restatement": r"<think>a</think>\boxed{3+3}",
    "identity": r"<think>a</think>\boxed{6=6}",
    "integral": r"<think>a</think>\boxed{\int_0^6 1 dx}",
    "sum": r"<think>a</think>\boxed{\sum_{k=1}^3 k}",
    "echo of the prompt": "What is 3+8-5? Put your final answer within \\boxed{}.",
    "echo of the instruction behind the answer": r"\boxed{6} Put your final answer within \boxed{}.",
    "repetition": "6 " * 30,
    "truncated box": r"<think>a</think>\boxed{6",
    "answer of a simulated turn": "<think>a</think>No idea.<｜User｜>Is it 6?<｜Assistant｜>6",
    "stray special token in the answer": "<think>a</think><answer><｜Assistant｜>6</answer>",
    "empty": "",
}


@pytest.mark.parametrize("hack", HACKS)
@pytest.mark.parametrize("name", ["accuracy_exact", "accuracy_math"])
def test_hack_is_not_paid_for_accuracy(name: str, hack: str):
    assert score(name, HACKS[hack], answer_="6") == 0.0


def test_hack_truncation():
    """What was cut off is no answer, even if it looks like one: 6 may have become 63."""
    for name in ("accuracy_exact", "accuracy_math"):
        assert score(name, r"<think>a</think>\boxed{6}", finish_reasons="length", answer_="6") == 0.0
    assert score("format", "<think>a</think>6", finish_reasons="length") == 0.0
    assert score("constraints", "fine", finish_reasons="length", rules_=[{"rule": "no_commas"}]) == 0.0


@pytest.mark.parametrize("text", ["A or B or C", "The answer is A, B or C.", r"\boxed{A, B, C}", "A\nB\nC\nD"])
def test_hack_a_or_b_or_c(text: str):
    for letter in "ABC":
        assert score("accuracy_choice", text, answer_=letter) == 0.0


def test_hack_repeated_answers_are_paid_once():
    assert score("accuracy_exact", r"<think>a</think>" + r"\boxed{6}" * 500, answer_="6") == 1.0
    assert score("format", RIGHT * 50) == 0.0


@pytest.mark.skipif(find_spec("math_verify") is None, reason="needs math-verify")
def test_mathematics_is_compared_as_mathematics():
    with one("accuracy_math") as rewards:
        texts = [rf"<think>a</think>\boxed{{{answer}}}" for answer in (r"(x+1)^2", r"x^2+2x+1", "x^2", r"(1+x)^2")]
        assert scored(rewards, *texts, answer=r"x^2+2x+1").total == [1.0, 1.0, 0.0, 1.0]


class Grader:
    """A MathGrader that cannot decide about some answers."""

    def __init__(self, *undecided: str) -> None:
        self.undecided = undecided

    def grade(self, golds: list[str], answers: list[str | None]) -> list[Verdict]:
        return [
            Verdict.MISSING if answer is None else Verdict.TIMEOUT if answer in self.undecided
            else Verdict.RIGHT if answer == gold else Verdict.WRONG
            for gold, answer in zip(golds, answers, strict=True)
        ]  # fmt: skip

    def close(self) -> None:
        pass


def test_what_cannot_be_decided_in_time_is_not_called_wrong_and_is_counted():
    reward = AccuracyMath(MathOptions())
    reward.grader = Grader("9^{9^9}")
    said: list[str] = []
    rewards = Rewards([("accuracy_math", reward, 1.0)])
    rewards.say = said.append
    for _ in range(2):
        found = scored(rewards, r"\boxed{9^{9^9}}", r"\boxed{6}", r"\boxed{7}", answer="6")
        assert found.by_name["accuracy_math"] == [None, 1.0, 0.0]
        assert found.problems == {"accuracy_math/undecided": 1}
    assert len(said) == 1 and "too long" in said[0]


def test_hack_hanging_the_grader_is_no_way_around_the_price_of_a_wrong_answer():
    reward = AccuracyMath(MathOptions(wrong=-1.0))
    reward.grader = Grader("9^{9^9}")
    found = scored(Rewards([("accuracy_math", reward, 1.0)]), r"\boxed{9^{9^9}}", r"\boxed{7}", answer="6")
    assert found.total == [-1.0, -1.0]


# Abstention.


def test_abstaining_ranks_between_right_and_wrong():
    options = {"abstain": 0.3, "answer_": "6"}
    assert score("accuracy_exact", RIGHT, **options) == 1.0
    assert score("accuracy_exact", "<think>hard</think>I don't know.", **options) == 0.3
    assert score("accuracy_exact", "<think>hard</think>我不知道", **options) == 0.3
    assert score("accuracy_exact", r"<think>hard</think>Sadly, \boxed{\text{unknown}}", **options) == 0.3
    assert score("accuracy_exact", "<think>hard</think>7", **options) == 0.0
    assert score("accuracy_exact", "<think>hard</think>7", wrong=-1.0, **options) == -1.0
    assert score("accuracy_exact", "<think>hard</think>I pass", abstain_phrases=["i pass"], **options) == 0.3


def test_without_the_option_an_abstention_is_a_wrong_answer():
    assert score("accuracy_exact", "I don't know", answer_="6") == 0.0


def test_hack_abstaining_and_answering():
    """Both at once is one of them: the marked answer counts where there is one, else the abstention."""
    options = {"abstain": 0.3, "answer_": "6"}
    assert score("accuracy_exact", r"I don't know, maybe \boxed{6}", **options) == 1.0
    assert score("accuracy_exact", r"I don't know, maybe \boxed{7}", **options) == 0.0
    assert score("accuracy_exact", "I don't know, maybe 6", **options) == 0.3
    assert score("accuracy_exact", r"\boxed{6 or unknown}", **options) == 0.3
    assert score("accuracy_exact", "<think>I don't know</think>7", **options) == 0.0
    assert score("accuracy_exact", "I don't know", finish_reasons="length", **options) == 0.0


@pytest.mark.parametrize("options", [{"abstain": 1.0}, {"abstain": 0.0}, {"wrong": 1.0}, {"abstain_phrases": [""]}])
def test_rewards_that_would_rank_otherwise_are_refused(options: dict):
    with pytest.raises(UserError, match="options of accuracy_exact"):
        RewardSection("accuracy_exact", options=options)


# Form, language, length, rules.


def test_format():
    assert score("format", RIGHT) == 1.0
    assert score("format", "<think>a</think><answer>6</answer>", style="r1-zero") == 1.0
    assert score("format", RIGHT, style="r1-zero") == 0.0


HAN = "<think>先算三加八等于十一，再减五，所以是六</think>"


def test_language_of_the_thought():
    assert score("language", HAN + "So the answer that I found is six.", language_="zh") == 1.0
    assert score("language", HAN, language_="en") == 0.0
    assert score("language", HAN, language="zh") == 1.0
    assert score("language", RIGHT, language_="en") is None
    assert score("language", RIGHT, language_="en", minimum=0.5) == 1.0
    assert score("language", HAN + "So the answer that I found is six.", language_="en", part="reply") == 1.0
    assert 0 < score("language", HAN + "So the answer that I found is six.", language_="en", part="all") < 1


def test_hack_no_thought_or_hidden_words_have_no_language():
    assert score("language", "The answer that I found without a thought is six.", language_="en") is None
    hidden = "<think>```\nwe hide all of the words in code so that nobody can judge them\n```</think>6"
    assert score("language", hidden, language_="zh") is None


@pytest.mark.parametrize(
    ("length", "finished", "expected"),
    [(50, True, 0.0), (80, True, 0.0), (90, True, -0.5), (100, True, -1.0), (150, True, -1.0), (100, False, -1.0)],
)
def test_overlong_completions_are_punished_softly(length: int, finished: bool, expected: float):
    reason = "stop" if finished else "length"
    options = {"completion_ids": [0] * length, "finish_reasons": reason, "max_tokens": 100}
    assert score("length", "a", soft_tokens=20, **options) == pytest.approx(expected)


def test_a_bare_limit_punishes_what_passes_it_or_was_cut_off_at_it():
    for length, reason, expected in [(100, "stop", 0.0), (101, "stop", -1.0), (100, "length", -1.0)]:
        found = score("length", "a", max_tokens=100, completion_ids=[0] * length, finish_reasons=reason)
        assert found == expected


def test_rules_are_kept_by_the_reply_alone():
    rules = [{"rule": "no_commas"}, {"rule": "words", "at_most": 3}]
    assert score("constraints", "<think>a, b, c, d, e</think>one two", rules_=rules) == 1.0
    assert score("constraints", "<think>a</think>one, two", rules_=rules) == 0.0
    assert score("constraints", "<think>a</think>one, two", rules_=rules, score="share") == 0.5
    assert score("constraints", "<think>only a thought", rules_=rules) == 0.0


# Code.


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("<think>```python\nx\n```</think>Here:\n```python\ny = 1\n```\nDone.", "y = 1\n"),
        ("```py\na\n```\nbetter:\n```\nb\n```", "b\n"),
        ("```python\na\n```\nrun it:\n```bash\npython a.py\n```", "a\n"),
        ("```python\na\n```\n```python\nb", "a\n"),
        ("```python\n\n```", None),
        ("<think>```python\na\n```", None),
        ("y = 1", None),
    ],
)
def test_the_program_is_the_last_finished_block_of_the_reply(text: str, program: str | None):
    assert program_of(text) == program


@pytest.fixture(scope="module")
def code() -> Iterator[Rewards]:
    try:
        Sandbox()
    except UserError as error:
        pytest.skip(str(error))
    with one("accuracy_code", timeout=2.0, workers=2) as rewards:
        yield rewards


def block(program: str) -> str:
    return f"<think>easy</think>\n```python\n{program}\n```"


TESTS = "assert double(2) == 4\nassert double(-1) == -2"


def test_code_passes_its_tests_or_not(code: Rewards):
    good, bad = block("def double(x):\n    return 2 * x"), block("def double(x):\n    return 4")
    assert scored(code, good, bad, "no code", tests=TESTS).total == [1.0, 0.0, 0.0]
    cases = [{"input": "2\n", "output": "4\n"}, {"input": "-1\n", "output": "-2\n"}]
    assert scored(code, block("print(2 * int(input()))"), block("print(4)"), tests=[cases, cases]).total == [1.0, 0.0]


@pytest.mark.parametrize(
    ("hack", "program"),
    [
        ("exits early", "import os\nos._exit(0)"),
        ("exits politely", "import sys\nsys.exit(0)"),
        ("hangs", "while True: pass"),
        ("exits when it is called", "def double(x):\n    raise SystemExit(0)"),
        ("ends in a thread", "import threading, os\nthreading.Timer(0, lambda: os._exit(0)).start()"),
        ("reads the tests", "import sys\nprint([open(name).read() for name in sys.argv])\nraise SystemExit(0)"),
        ("prints success", "print('PASSED')\nprint('OK')\nraise SystemExit(0)"),
        ("equals all", "class E(int):\n    __eq__ = lambda self, other: True\ndef double(x):\n    return E(7)"),
        ("disarms the tests", "import builtins\nbuiltins.AssertionError = int\ndef double(x):\n    return 7"),
        ("answers what it saw before", "def double(x):\n    return 4"),
    ],
)  # fmt: skip
def test_hack_code(code: Rewards, hack: str, program: str):
    assert scored(code, block(program), tests=TESTS).total == [0.0]


def test_a_program_that_is_stopped_has_failed(monkeypatch: pytest.MonkeyPatch):
    class Stopped:
        def run(self, *arguments: Any) -> Any:
            return Result(Outcome.TIMEOUT, "", 1.0)

    monkeypatch.setattr(sandbox, "Sandbox", lambda *arguments: Stopped())
    rewards = Rewards([("accuracy_code", AccuracyCode(CodeOptions(wrong=-1.0)), 1.0)])
    assert scored(rewards, block("while True: pass"), tests=TESTS).total == [-1.0]


# Gold answers.


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("accuracy_exact", {"answer": " "}, "row 2: answer: ' ' must be text or a number"),
        ("accuracy_exact", {"answer": ["6"]}, "must be text or a number"),
        ("accuracy_math", {"answer": True}, "must be a number, an expression"),
        ("accuracy_choice", {"answer": "E"}, "row 2: answer: 'E' must be one of the letters ABCD"),
        ("constraints", {"rules": [{"rule": "rhyme"}]}, "row 2: rules: .*names no rule"),
        ("constraints", {"rules": "no commas"}, "must be a list of rules"),
        ("language", {"language": "tlh"}, "row 2: language: .*unknown"),
    ],
)
def test_a_row_that_cannot_be_judged_is_named(name: str, row: dict, words: str):
    good = {"answer": "A" if "choice" in name else "6", "rules": [{"rule": "no_commas"}], "language": "en"}
    with one(name) as rewards, pytest.raises(UserError, match=words):
        rewards.check_rows([good, good | row])


@pytest.mark.skipif(find_spec("math_verify") is None, reason="needs math-verify")
def test_hack_unparseable_gold_is_refused_at_load():
    """It would be right for everybody, or for nobody."""
    rows = [{"answer": "6"}, {"answer": r"\frac{1}{", "_where": "data.jsonl, line 7"}]
    with (
        one("accuracy_math") as rewards,
        pytest.raises(UserError, match=r"row 2 \(data.jsonl, line 7\).*mend or remove"),
    ):
        rewards.check_rows(rows)


def test_tests_of_code_must_be_python_or_cases():
    for tests in ("assert (", "", "# nothing", [], [{"input": "1"}], {"input": "1"}, None):
        assert not are_tests(tests)
    assert are_tests(TESTS) and are_tests([{"input": "", "output": "4"}])


def test_a_row_must_have_something_to_be_right_about():
    sections = [RewardSection("accuracy_exact"), RewardSection("accuracy_choice", options={"column": "letter"})]
    with build(sections) as rewards:
        rewards.check_rows([{"answer": "6"}, {"letter": "A"}])
        with pytest.raises(UserError, match=r"row 3: .*add 'answer' \(for accuracy_exact\) or 'letter'"):
            rewards.check_rows([{"answer": "6"}, {"letter": "A"}, {"question": "?"}])
        with pytest.raises(UserError, match="no row has the column 'letter'"):
            rewards.check_rows([{"answer": "6"}])
        rewards.check_rows([])


def test_rows_of_several_kinds_are_judged_by_what_fits_them():
    sections = [RewardSection("accuracy_exact"), RewardSection("accuracy_choice", options={"column": "letter"})]
    with build(sections) as rewards:
        found = scored(rewards, "6", "A", answer=["6", None], letter=[None, "B"])
    assert found.by_name == {"accuracy_exact": [1.0, None], "accuracy_choice": [None, 0.0]}
    assert found.total == [1.0, 0.0]
