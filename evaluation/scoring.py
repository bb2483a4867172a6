"""From replies to grades: which answer a reply gives, and whether it is right."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType

from ..errors import UserError
from ..grading.answers import choice, exact, final_answer, reply_of, split_thought
from ..grading.constraints import satisfied
from ..grading.math import MathGrader
from ..grading.sandbox import Outcome, Sandbox
from ..grading.verdict import Verdict
from .items import Item, Kind, Task, plural
from .tasks import hard, reading_comprehension
from .tasks.code import program
from .tasks.reading_comprehension import words_f1


@dataclass(frozen=True)
class Case:
    """A reply to an item. chat: it is the reply of a conversation, not how a base model went on."""

    item: Item
    text: str
    chat: bool


@dataclass(frozen=True)
class Grade:
    """answer: what was compared with the gold answer, None where the reply gives none.

    share: how right it is, 0 to 1, where a task knows more than right and wrong.
    """

    verdict: Verdict
    answer: str | None
    share: float | None = None

    @property
    def right(self) -> bool:
        return self.verdict is Verdict.RIGHT

    @property
    def credit(self) -> float:
        return float(self.right) if self.share is None else self.share


def marked_answer(case: Case) -> str | None:
    """What stands in the last answer tag or box behind the thought, or behind `####`, GSM8K's mark."""
    answer = final_answer(case.text)
    if answer is None and "####" in (reply := reply_of(case.text)):
        lines = reply.rpartition("####")[2].strip().splitlines()
        answer = lines[0].strip().rstrip(".") if lines else None
    return answer or None


class Graders:
    """Judges cases of any task; starts what that takes (a mathematician's process, a sandbox) when it is first needed.
    A context manager.

    workers: programs that run at a time. unsafe: run programs without a sandbox where there is none.
    """

    def __init__(self, workers: int = 2, unsafe: bool = False) -> None:
        self._workers, self._unsafe = workers, unsafe
        self._stack = ExitStack()
        self._math: MathGrader | None = None
        self._sandbox: Sandbox | None = None
        self._unread: dict[tuple[str, ...], list[int]] = {}

    def __enter__(self) -> "Graders":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def math(self) -> MathGrader:
        if self._math is None:
            self._math = self._stack.enter_context(MathGrader())
        return self._math

    @property
    def sandbox(self) -> Sandbox:
        if self._sandbox is None:
            self._sandbox = Sandbox(unsafe=self._unsafe)
        return self._sandbox

    def prepare(self, task: Task) -> None:
        """Raise now, not after hours of generation, if this machine cannot judge the task."""
        if task.kind is Kind.CODE:
            _ = self.sandbox

    def doubts(self, task: Task, items: Sequence[Item]) -> list[str]:
        """What is to be said of gold answers that the mathematician cannot read: only a reply that says the same to the
        letter is right then. Raises UserError, with the place, where the task is strict about its data."""
        if task.kind is not Kind.MATH:
            return []
        golds = tuple(item.gold for item in items)
        if golds not in self._unread:
            self._unread[golds] = self.math.check_gold(golds)
        unread = [items[i] for i in self._unread[golds]]
        if unread and task.strict:
            item = unread[0]
            raise UserError(f"{item.where}: the answer {item.gold!r} cannot be understood; mend or remove the record")
        places = ", ".join(item.where or item.id for item in unread[:3]) + (", ..." if len(unread) > 3 else "")
        return [f"compared as text only: {plural(len(unread), 'gold answer')} ({places})"] if unread else []

    def grade(self, task: Task, cases: Sequence[Case]) -> list[Grade]:
        """One grade for each case."""
        if task.kind is Kind.MATH:
            answers = [marked_answer(case) for case in cases]
            golds = [case.item.gold for case in cases]
            verdicts = self.math.grade(golds, answers)
            return [
                Grade(Verdict.RIGHT if exact(answer, gold) else verdict, answer)
                for verdict, answer, gold in zip(verdicts, answers, golds, strict=True)
            ]
        if task.kind is Kind.CODE:
            return self._run(cases)
        return [_grade(task.kind, case) for case in cases]

    def _run(self, cases: Sequence[Case]) -> list[Grade]:
        programs = [program(case.item, case.text, case.chat) for case in cases]
        with ThreadPoolExecutor(self._workers) as pool:
            return list(pool.map(self._judge, programs, [case.item for case in cases]))

    def _judge(self, source: str | None, item: Item) -> Grade:
        """A program passes when all its tests do, or when it prints what is expected of every input."""
        if source is None:
            return Grade(Verdict.MISSING, None)
        if "cases" not in item.extra:
            return Grade(_OUTCOMES[self.sandbox.run(source, item.extra["tests"]).outcome], source)
        for given, expected in item.extra["cases"]:
            outcome = self.sandbox.run(source, stdin=given, expected=expected).outcome
            if outcome is not Outcome.PASSED:
                return Grade(_OUTCOMES[outcome], source)
        return Grade(Verdict.RIGHT, source)


_OUTCOMES = {
    Outcome.PASSED: Verdict.RIGHT,
    Outcome.FAILED: Verdict.WRONG,
    Outcome.TIMEOUT: Verdict.TIMEOUT,
    Outcome.REFUSED: Verdict.WRONG,
}


def _grade(kind: Kind, case: Case) -> Grade:
    item = case.item
    if kind is Kind.CHOICE:
        return _verdict(choice(case.text, item.letters), lambda answer: answer == item.gold)
    reply = split_thought(case.text)[1].strip()
    if kind is Kind.RULES:
        return _verdict(reply or None, lambda answer: all(satisfied(rule, answer) for rule in item.extra["rules"]))
    if kind is Kind.STATED:
        return _verdict(hard.stated_answer(case.text, case.chat), lambda answer: hard.same(answer, item.gold))
    if kind is Kind.SPANS:
        answer = reading_comprehension.stated_answer(case.text, case.chat)
        share = max((words_f1(answer or "", gold) for gold in item.extra["golds"]), default=0.0)
        return replace(_verdict(answer, lambda answer: share == 1), share=share)
    if kind is Kind.FIND:
        return _verdict(reply or None, lambda answer: item.gold in answer)
    first = reply.splitlines()[0] if reply else None
    answer = marked_answer(case) or (final_answer(case.text, whole=True) if case.chat else first)
    return _verdict(answer, lambda answer: exact(answer, item.gold))


def _verdict(answer: str | None, right: Callable[[str], bool]) -> Grade:
    if answer is None:
        return Grade(Verdict.MISSING, None)
    return Grade(Verdict.RIGHT if right(answer) else Verdict.WRONG, answer)
