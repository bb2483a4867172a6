"""Rewards for right answers: mathematics, text, letters, code.

All of them read the reply behind the thought, and its last answer only. A completion that was cut off has no answer.

Abstaining can be worth something. With `abstain` = x a right answer scores 1, an abstention x, a wrong answer `wrong`:
answering pays from a chance of (x - wrong) / (1 - wrong) upwards, and below it the honest thing is to say so. A reply
abstains when its final answer (the marked one, or the whole reply where none is marked and it is short) contains one of
`abstain_phrases`. It is then not graded, whatever else it says.
"""

import ast
import os
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ...errors import UserError
from ...grading.answers import choice, exact, final_answer, reply_of
from ...grading.verdict import Verdict
from ..settings import Count, Positive, Section, Size
from .reward import Batch, Reward, Score

ABSTAIN_PHRASES = (
    "I don't know", "I do not know", "I'm not sure", "I am not sure", "cannot be determined", "unknown",
    "不知道", "不确定", "无法确定", "不清楚",
)  # fmt: skip


@dataclass(frozen=True)
class AccuracyOptions(Section):
    """column: of the gold answer. wrong: score of a wrong or missing one. abstain: see the module; off without it."""

    column: str = "answer"
    wrong: float = 0.0
    abstain: float | None = None
    abstain_phrases: tuple[str, ...] = ABSTAIN_PHRASES

    def check(self) -> None:
        if self.wrong >= 1:
            raise UserError(f"wrong must be below 1, what a right answer scores, not {self.wrong:g}")
        if self.abstain is not None and not self.wrong < self.abstain < 1:
            raise UserError(f"abstain must lie between wrong ({self.wrong:g}) and 1, not {self.abstain:g}")
        if not all(phrase.strip() for phrase in self.abstain_phrases):
            raise UserError("abstain_phrases has an empty phrase, which every reply contains")


class Accuracy(Reward):
    """1 for a right answer, `wrong` for another or none, `abstain` for an abstention; None where nobody knows."""

    judges = True
    gold_is: str

    def __init__(self, options: AccuracyOptions) -> None:
        super().__init__(options.column)
        self.options = options
        self._phrases = [plain(phrase) for phrase in options.abstain_phrases]

    def score(self, batch: Batch) -> list[Score]:
        # An empty text has no answer in anybody's eyes.
        texts = [text if finished else "" for text, finished in zip(batch.texts, batch.finished, strict=True)]
        abstained = [self.options.abstain is not None and self.abstains(text) for text in texts]
        graded = [i for i in range(len(batch)) if not abstained[i]]
        verdicts = self.grade([batch.given[i] for i in graded], [texts[i] for i in graded])
        self.problems["undecided"] += verdicts.count(Verdict.TIMEOUT)
        wrong = self.options.wrong
        # Nobody knows: no score, which counts as 0. Where wrong answers cost something, this must not be the way out.
        values: dict[Verdict, Score] = {Verdict.RIGHT: 1.0, Verdict.TIMEOUT: wrong if wrong < 0 else None}
        scores = [self.options.abstain] * len(batch)
        for i, found in zip(graded, verdicts, strict=True):
            scores[i] = values.get(found, wrong)
        return scores

    def abstains(self, text: str) -> bool:
        answer = plain(final_answer(text, whole=True) or "")
        return any(phrase in answer for phrase in self._phrases)

    @abstractmethod
    def grade(self, golds: Sequence[Any], texts: Sequence[str]) -> list[Verdict]:
        """A verdict on each text."""

    def useless(self, given: Sequence[Any]) -> tuple[int, str] | None:
        for i, gold in enumerate(given):
            if not self.is_gold(gold):
                return i, f"{shown(gold)} must be {self.gold_is}: mend or remove the row"
        return None

    @abstractmethod
    def is_gold(self, gold: Any) -> bool:
        """Is it something that an answer could agree with?"""


def plain(text: str) -> str:
    return " ".join(text.replace("’", "'").casefold().split())


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def is_text(gold: Any) -> bool:
    """Text, or a number of JSON: what a gold answer in words or figures may be."""
    return isinstance(gold, str | int | float) and not isinstance(gold, bool) and str(gold).strip() != ""


def verdict(answer: Any, right: bool) -> Verdict:
    if answer is None:
        return Verdict.MISSING
    return Verdict.RIGHT if right else Verdict.WRONG


@dataclass(frozen=True)
class ExactOptions(AccuracyOptions):
    """whole: a short reply in which no answer is marked is the answer (`final_answer`)."""

    whole: bool = True


class AccuracyExact(Accuracy):
    """The same number or the same text (`grading.answers.exact`). Needs no process."""

    gold_is = "text or a number"

    def __init__(self, options: ExactOptions) -> None:
        super().__init__(options)
        self.whole = options.whole

    def grade(self, golds: Sequence[Any], texts: Sequence[str]) -> list[Verdict]:
        answers = [final_answer(text, self.whole) for text in texts]
        return [verdict(answer, exact(answer, str(gold))) for answer, gold in zip(answers, golds, strict=True)]

    def is_gold(self, gold: Any) -> bool:
        return is_text(gold) and exact(str(gold), str(gold))


@dataclass(frozen=True)
class ChoiceOptions(AccuracyOptions):
    """letters: that may be chosen."""

    letters: str = "ABCD"

    def check(self) -> None:
        super().check()
        if not re.fullmatch("[A-Z]{2,}", self.letters) or len(set(self.letters)) < len(self.letters):
            raise UserError(f'letters must be different capitals, like "ABCD", not {self.letters!r}')


class AccuracyChoice(Accuracy):
    """The letter of a multiple-choice question (`grading.answers.choice`)."""

    def __init__(self, options: ChoiceOptions) -> None:
        super().__init__(options)
        self.letters = options.letters
        self.gold_is = f"one of the letters {self.letters}"

    def grade(self, golds: Sequence[Any], texts: Sequence[str]) -> list[Verdict]:
        answers = [choice(text, self.letters) for text in texts]
        return [verdict(answer, answer == gold) for answer, gold in zip(answers, golds, strict=True)]

    def is_gold(self, gold: Any) -> bool:
        return isinstance(gold, str) and len(gold) == 1 and gold in self.letters


@dataclass(frozen=True)
class MathOptions(AccuracyOptions):
    """timeout: CPU seconds for one comparison. workers: processes that compare. whole: as with exact answers."""

    timeout: Positive = 5.0
    workers: Size = 1
    whole: bool = False


class AccuracyMath(Accuracy):
    """Mathematical equality, decided in a process of its own where it is not a matter of numbers (`grading.math`)."""

    gold_is = "a number, an expression or a short text"

    def __init__(self, options: MathOptions) -> None:
        from ...grading.math import MathGrader

        super().__init__(options)
        self.whole, self.grader = options.whole, MathGrader(options.timeout, options.workers)

    def grade(self, golds: Sequence[Any], texts: Sequence[str]) -> list[Verdict]:
        return self.grader.grade([str(gold) for gold in golds], [final_answer(text, self.whole) for text in texts])

    def is_gold(self, gold: Any) -> bool:
        return is_text(gold)

    def useless(self, given: Sequence[Any]) -> tuple[int, str] | None:
        if found := super().useless(given):
            return found
        for i in self.grader.check_gold([str(gold) for gold in given]):
            return (
                i,
                f"{shown(given[i])} cannot be read as mathematics, so no reply would be right: mend or remove the row",
            )
        return None

    def close(self) -> None:
        self.grader.close()


@dataclass(frozen=True)
class CodeOptions(AccuracyOptions):
    """timeout: seconds of one program. memory_mib: of it. workers: programs at a time, 0 = one for each CPU core.
    unsafe: run programs without a sandbox where there is none.
    """

    column: str = "tests"
    timeout: Positive = 5.0
    memory_mib: Size = 512
    workers: Count = 0
    unsafe: bool = False


_PYTHON = ("", "python", "python3", "py")


def program_of(text: str) -> str | None:
    """The last finished code block of a reply that is Python or says no language."""
    program, body, language = None, [""], None
    for line in reply_of(text).split("\n"):
        if language is None and line.startswith("```"):
            body, language = [], line[3:].strip().lower()
        elif language is not None and line.rstrip() == "```":
            program = "\n".join(body) + "\n" if language in _PYTHON else program
            language = None
        else:
            body.append(line)
    return program if program and program.strip() else None


class AccuracyCode(Accuracy):
    """Passes all tests in the sandbox; a program that is stopped there has failed.

    tests: Python that follows the program and raises where it is wrong (asserts), or a list of
    {"input": text, "output": text}: what the program reads, and what it must then print.
    """

    gold_is = 'Python with asserts, or a list of {"input": text, "output": text}'

    def __init__(self, options: CodeOptions) -> None:
        from ...grading.sandbox import Sandbox

        super().__init__(options)
        self.workers = options.workers or os.cpu_count() or 1
        self.sandbox = Sandbox(options.timeout, options.memory_mib, options.unsafe)

    def grade(self, golds: Sequence[Any], texts: Sequence[str]) -> list[Verdict]:
        programs = [program_of(text) for text in texts]
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self._passes, programs, golds))

    def _passes(self, program: str | None, tests: Any) -> Verdict:
        from ...grading.sandbox import Outcome

        if program is None:
            return Verdict.MISSING
        if isinstance(tests, str):
            passed = self.sandbox.run(program, tests).outcome is Outcome.PASSED
        else:
            runs = (self.sandbox.run(program, "", case["input"], case["output"]) for case in tests)
            passed = all(run.outcome is Outcome.PASSED for run in runs)
        return Verdict.RIGHT if passed else Verdict.WRONG

    def is_gold(self, gold: Any) -> bool:
        return are_tests(gold)


def are_tests(gold: Any) -> bool:
    """Python that does something, or a list of inputs and outputs?"""
    if isinstance(gold, str):
        try:
            return bool(ast.parse(gold).body)
        except (SyntaxError, ValueError, RecursionError):
            return False
    return isinstance(gold, list) and bool(gold) and all(map(_is_case, gold))


def _is_case(case: Any) -> bool:
    return isinstance(case, Mapping) and all(isinstance(case.get(key), str) for key in ("input", "output"))
