"""The rewards of a run: which functions score, with which weights, and what happens when one of them fails."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import UserError
from ..settings import Section
from .accuracy import (
    AccuracyChoice,
    AccuracyCode,
    AccuracyExact,
    AccuracyMath,
    ChoiceOptions,
    CodeOptions,
    ExactOptions,
    MathOptions,
)
from .functions import Runner, load_function, without_infinities
from .judge import Judge, JudgeOptions
from .reward import Message, Reward, RewardFunction, Row, Score
from .style import (
    Constraints,
    ConstraintsOptions,
    Format,
    FormatOptions,
    Language,
    LanguageOptions,
    Length,
    LengthOptions,
)

PATIENCE = 3  # batches in a row that a function may fail before the run stops
TIMEOUT = 600.0  # seconds

BUILT_IN: dict[str, tuple[type[Section], Callable[[Any], Reward]]] = {
    "accuracy_math": (MathOptions, AccuracyMath),
    "accuracy_exact": (ExactOptions, AccuracyExact),
    "accuracy_choice": (ChoiceOptions, AccuracyChoice),
    "accuracy_code": (CodeOptions, AccuracyCode),
    "format": (FormatOptions, Format),
    "language": (LanguageOptions, Language),
    "length": (LengthOptions, Length),
    "constraints": (ConstraintsOptions, Constraints),
    "judge": (JudgeOptions, Judge),
}


@dataclass(frozen=True)
class RewardSection(Section):
    """One reward. name: a built-in one, or "module:function" for code of your own. options: of a built-in one."""

    name: str = ""
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        if self.name in BUILT_IN:
            try:
                BUILT_IN[self.name][0].from_dict(self.options)
            except UserError as error:
                raise UserError(f"options of {self.name}: {error}") from None
        elif ":" not in self.name:
            known = ", ".join(BUILT_IN)
            raise UserError(f'name {self.name!r} is no reward; known are {known}, and "module:function" is your own')
        elif self.options:
            raise UserError(f"options are for built-in rewards; {self.name} gets the columns of the data instead")


@dataclass(frozen=True)
class Scores:
    """Scores of a batch. total: weighted sums, None counting as 0. by_name: unweighted; None where a function had
    nothing to say. problems: how often what went wrong, under "NAME/hung", "NAME/raised", ..."""

    total: list[float]
    by_name: dict[str, list[Score]]
    problems: Counter[str]


class Rewards:
    """Runs reward functions over batches. A context manager: it ends what the functions started.

    functions: (name, function, weight). timeout: seconds that a function may take over a batch. say: tells the user
    about a problem, once for each kind.

    A function that raises, returns something else than scores, or does not return in time, scores nothing in that
    batch (None throughout); when it does so `PATIENCE` times in a row, UserError.
    """

    def __init__(self, functions: Sequence[tuple[str, RewardFunction, float]], timeout: float = TIMEOUT) -> None:
        names = [name for name, _, _ in functions]
        for repeated in {name for name in names if names.count(name) > 1}:
            raise UserError(f"the reward {repeated} is there twice; give it once, with the sum of the weights")
        self.functions, self.timeout = list(functions), timeout
        self.say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)
        self._runners = {name: Runner(function, name) for name, function, _ in functions}
        self._failed: Counter[str] = Counter()
        self._said: set[str] = set()

    def __enter__(self) -> "Rewards":
        return self

    def __exit__(self, *exception: object) -> None:
        for runner in self._runners.values():
            runner.close()
        for _, function, _ in self.functions:
            if isinstance(function, Reward):
                function.close()

    def check_rows(self, rows: Sequence[Row]) -> None:
        """UserError, naming the row, where a gold answer, a language or a rule is of no use, or where nothing says what
        a right reply to a row would be. A row may say where it comes from in its column `_where`."""
        if not rows:
            return

        def refuse(index: int, why: str) -> UserError:
            place = f" ({rows[index]['_where']})" if rows[index].get("_where") else ""
            return UserError(f"row {index + 1}{place}: {why}")

        built_in = [(name, function) for name, function, _ in self.functions if isinstance(function, Reward)]
        for name, function in built_in:
            if function.column is None:
                continue
            own = [i for i, row in enumerate(rows) if row.get(function.column) is not None]
            if not own:
                raise UserError(f"no row has the column {function.column!r}, which the reward {name} reads")
            if useless := function.useless([rows[i][function.column] for i in own]):
                raise refuse(own[useless[0]], f"{function.column}: {useless[1]}")
        columns = {function.column or "": name for name, function in built_in if function.judges}
        others = len(built_in) < len(self.functions) or any(isinstance(function, Judge) for _, function in built_in)
        for i, row in enumerate(rows if columns and not others else ()):
            if all(row.get(column) is None for column in columns):
                wanted = " or ".join(f"{column!r} (for {name})" for column, name in columns.items())
                raise refuse(i, f"nothing says what is right here: add {wanted}, or remove the row")

    def score(
        self, prompts: Sequence[Sequence[Message]], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> Scores:
        """Score completions; all arguments are lists of one length, and `columns` has them by name."""
        count = len(completions)
        total = [0.0] * count
        found: dict[str, list[Score]] = {name: [None] * count for name, _, _ in self.functions}
        problems: Counter[str] = Counter()
        if not count:
            return Scores(total, found, problems)
        questions, texts = [list(prompt) for prompt in prompts], list(completions)
        lists = {name: list(column) for name, column in columns.items()}
        began = time.monotonic()
        started = {name: runner.start(questions, texts, lists) for name, runner in self._runners.items()}
        for name, function, weight in self.functions:
            future = started[name]
            try:
                if future is None:
                    raise TimeoutError
                scores, odd = without_infinities(future.result(max(began + self.timeout - time.monotonic(), 0)))
            except TimeoutError as error:
                if future is not None and future.done():  # a TimeoutError of its own
                    self._fail(name, "raised", _words(error), problems)
                else:
                    self._runners[name].cancel()
                    self._fail(name, "hung", f"it took more than {self.timeout:g} seconds over a batch", problems)
                continue
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                self._fail(name, "raised", _words(error), problems)
                continue
            self._failed[name] = 0
            found[name] = scores
            total = [sum_ + weight * (score or 0.0) for sum_, score in zip(total, scores, strict=True)]
            if odd:
                self._note(name, "not finite", f"{odd} scores of a batch were no finite numbers", problems, odd)
            if isinstance(function, Reward):
                for problem, times in function.problems.items():
                    if times:
                        self._note(name, problem, _MEANINGS[problem], problems, times)
                function.problems.clear()
        return Scores(total, found, problems)

    def _fail(self, name: str, kind: str, why: str, problems: Counter[str]) -> None:
        self._failed[name] += 1
        if self._failed[name] >= PATIENCE:
            raise UserError(f"the reward {name} failed in {PATIENCE} batches in a row: {why}")
        self._note(name, kind, f"{why}; the batch goes without it", problems)

    def _note(self, name: str, kind: str, text: str, problems: Counter[str], times: int = 1) -> None:
        key = f"{name}/{kind}"
        problems[key] += times
        if key not in self._said:
            self._said.add(key)
            self.say(f"reward {name}: {text} (said once; the log counts on)")


_MEANINGS = {
    "undecided": "comparing an answer took too long, so nobody knows whether it is right",
    "unreadable": "the judge's reply holds no score",
}


def _words(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    kind = type(error).__name__
    return text if isinstance(error, UserError) else f"{kind}: {text[:300]}" if text else kind


def build(settings: Sequence[RewardSection], timeout: float = TIMEOUT) -> Rewards:
    """The rewards that `settings` describe. UserError where code cannot be imported, or a machine lacks what a reward
    needs (a sandbox, a key)."""
    functions: list[tuple[str, RewardFunction, float]] = []
    for section in settings:
        if section.name in BUILT_IN:
            options, make = BUILT_IN[section.name]
            functions.append((section.name, make(options.from_dict(section.options)), section.weight))
        else:
            functions.append((section.name, load_function(section.name), section.weight))
    return Rewards(functions, timeout)
