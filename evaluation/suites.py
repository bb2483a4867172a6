"""Whole tables of a report as something to run: each published row with how it is asked, its target and a verdict.

A row passes where the 95% interval of ours reaches the printed figure, within the rounding of its last digit; it fails
where the whole interval is worse. A result of other shots, another protocol or a part of the data decides nothing: the
row counts as not run, and says why.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from ..errors import UserError
from ..grading.statistics import wilson
from . import published
from .items import Kind
from .published import HARNESS, LM, Published, benchmark_of, incomparable
from .results import Result, known
from .tasks import TASKS

TEXTS = "pile"  # bits per byte of texts: a task of this name over the user's copy of the test set
RULE = "pass: the 95% interval of ours reaches the printed figure, within the rounding of its last digit"
NO_CHAT_HARNESS = "this package has no scorer for it"
HARNESS_OFF = "executes generated programs without a sandbox in lm-eval, and this package has no scorer for it"


class Verdict(StrEnum):
    PASS = "pass"
    FAIL = "fail"
    NOT_RUN = "not run"


@dataclass(frozen=True)
class Row:
    """A published figure and what to run for it.

    task: one of tasks.TASKS, "pile", or "lm:NAME" for lm-eval; None where nothing here can run it, with `why_not`.
    tolerance: half a unit of the figure's last digit.
    """

    published: Published
    task: str | None
    why_not: str = ""

    @property
    def protocol(self) -> str:
        return self.published.protocol

    @property
    def shots(self) -> int | None:
        return self.published.shots

    @property
    def tolerance(self) -> float:
        return 0.5 * float(10**-self.published.digits)


@dataclass(frozen=True)
class Suite:
    """models: whose figures the rows are; one model cannot be all of them, so `only` picks the rows of a protocol."""

    name: str
    title: str
    models: tuple[str, ...]
    rows: tuple[Row, ...]

    def only(self, protocols: Iterable[str]) -> "Suite":
        """The suite with the rows of these protocols."""
        wanted = set(protocols)
        return Suite(self.name, self.title, self.models, tuple(row for row in self.rows if row.protocol in wanted))

    @property
    def protocols(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.protocol for row in self.rows))

    def tasks(self, protocol: str) -> list[str]:
        """What to run under a protocol, each once, in the order of the report."""
        return list(dict.fromkeys(row.task for row in self.rows if row.protocol == protocol and row.task))


@dataclass(frozen=True)
class Outcome:
    """What became of a row. value, low, high: of our result, in the units of the figure; None where there is none.
    hours: of the devices that computed it, see `hours_of`."""

    row: Row
    verdict: Verdict
    reason: str
    result: Result | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None
    hours: float | None = None
    unit: str = ""

    def as_json(self) -> dict[str, Any]:
        row = self.row.published
        return {
            "benchmark": row.benchmark,
            "title": row.title,
            "model": row.model,
            "protocol": row.protocol,
            "shots": row.shots,
            "metric": row.metric,
            "target": row.value,
            "tolerance": self.row.tolerance,
            "source": row.source,
            "note": row.note,
            "task": self.row.task,
            "verdict": self.verdict,
            "reason": self.reason,
            "value": self.value,
            "low": known(self.low),
            "high": known(self.high),
            "hours": self.hours,
            "hours_of": self.unit,
        }


def judge(
    suite: Suite, results: Sequence[Result], subject: Mapping[str, Any], reasons: Mapping[str, str] | None = None
) -> list[Outcome]:
    """A verdict for every row.

    subject: see `hours_of`. reasons: why a task was not run, by "TASK.PROTOCOL" or by its name.
    """
    return [_judge(row, results, subject, reasons or {}) for row in suite.rows]


def _judge(row: Row, results: Sequence[Result], subject: Mapping[str, Any], reasons: Mapping[str, str]) -> Outcome:
    if row.task is None:
        return Outcome(row, Verdict.NOT_RUN, row.why_not)
    target = row.published
    found = [each for each in results if benchmark_of(each.task) == target.benchmark and _answers(each, row)]
    if target.metric == published.CONSENSUS:
        found = [consensus for each in found if (consensus := _consensus(each)) is not None]
    # Several may answer for a benchmark: ours and lm-eval's, or two protocols. The first that is comparable counts.
    found.sort(key=lambda each: (bool(incomparable(each, target)), each.protocol != row.protocol))
    if not found:
        default = f"{row.task} was not asked for under protocol {row.protocol}"
        return Outcome(row, Verdict.NOT_RUN, reasons.get(f"{row.task}.{row.protocol}", reasons.get(row.task, default)))
    result = found[0]
    against = incomparable(result, target)
    scale = result.scale
    value, low, high = (scale * (each or 0.0) for each in (result.value, result.low, result.high))
    hours, unit = hours_of(result, subject)
    if against:
        verdict, reason = Verdict.NOT_RUN, f"what ran is not comparable: {'; '.join(against)}"
    elif known(low) is None or known(high) is None:
        verdict, reason = Verdict.NOT_RUN, "what ran is too little for an interval"
    else:
        reached = low <= target.value + row.tolerance if result.lower else high >= target.value - row.tolerance
        verdict, reason = (Verdict.PASS, "") if reached else (Verdict.FAIL, "the interval does not reach the figure")
    return Outcome(row, verdict, reason, result, value, low, high, hours, unit)


def _answers(result: Result, row: Row) -> bool:
    """Whether a result is an attempt at a row: not one of another row's protocol."""
    if result.protocol in published.HARNESS_PROTOCOLS:
        return result.value is not None and (result.protocol == published.HARNESS_PROTOCOL) == (row.protocol == "base")
    return result.value is not None and result.protocol in (row.protocol, "greedy")


def _consensus(result: Result) -> Result | None:
    """The result of the majority's answers, where as many samples were taken as the figure's."""
    value = result.extra.get(published.CONSENSUS)
    if value is None:
        return None
    low, high = wilson(round(value * result.items), result.items)
    return replace(result, metric=published.CONSENSUS, value=value, low=low, high=high)


def hours_of(result: Result, subject: Mapping[str, Any]) -> tuple[float, str]:
    """(hours, their unit) that a result took: seconds times accelerators / 3600.

    subject: "device" ("cuda", "npu", "cpu", or "server" where another machine computed), "devices" how many.
    """
    device = str(subject.get("device", "server")).partition(":")[0]
    units = {"cuda": "GPU-hours", "npu": "NPU-hours", "cpu": "CPU-hours"}
    unit = units.get(device, "hours of the server")
    devices = int(subject.get("devices", 1)) if device in units else 1
    return result.seconds * devices / 3600, unit


# What ran here can answer for a row

_NOT_HERE = {
    "mmlu-redux": NO_CHAT_HARNESS,
    "agieval": "lm-eval compares likelihoods, the report what the model writes",
    "drop": "lm-eval asks base models only",
    "codeforces": "needs the contests' judge",
    "swe-verified": "needs repositories and an agent",
    "aider-polyglot": "needs aider",
    "arena-hard": "needs a model as a judge",
    "alpacaeval2": "needs a model as a judge",
    "simpleqa": "needs a model as a judge",
    "frames": "needs a model as a judge",
    "humaneval-mul": "needs compilers of other languages",
    "cruxeval-i": HARNESS_OFF,
    "cruxeval-o": HARNESS_OFF,
}


def _row(figure: Published) -> Row:
    own = figure.benchmark in TASKS or figure.benchmark == TEXTS
    if figure.benchmark == "livecodebench" and figure.protocol == "base":
        return Row(figure, None, "the report does not publish the worked examples that it shows")
    if own and published.same_metric(_metric(figure), figure.metric):
        return Row(figure, figure.benchmark)
    if figure.protocol == "base" and figure.benchmark in HARNESS:
        return Row(figure, LM + HARNESS[figure.benchmark])
    return Row(figure, None, _NOT_HERE.get(figure.benchmark, NO_CHAT_HARNESS))


def _metric(figure: Published) -> str:
    """What our own task of this benchmark measures under the figure's protocol."""
    if figure.benchmark == TEXTS:
        return published.BPB
    if figure.metric == published.CONSENSUS:
        return published.CONSENSUS  # of the samples that pass@1 is the mean of
    task = TASKS[figure.benchmark]
    return published.LIKELIHOOD if figure.protocol == "base" and task.kind is Kind.CHOICE else task.metric


def _suite(name: str, title: str, *models: str) -> Suite:
    return Suite(name, title, models, tuple(_row(figure) for model in models for figure in published.rows(model=model)))


SUITES: Mapping[str, Suite] = {
    suite.name: suite
    for suite in (
        _suite("v3-paper", "DeepSeek-V3 report: V3-Base and V3", published.V3_BASE, published.V3),
        _suite("r1-paper", "DeepSeek-R1 report: R1", published.R1),
        *(
            _suite(f"{model.lower()}-paper", f"DeepSeek-R1 report: {model}", model)
            for model in (published.R1_ZERO, *published.STUDENTS)
        ),
    )
}


def suite(name: str) -> Suite:
    """A suite by its name; UserError with the names there are."""
    if name not in SUITES:
        raise UserError(f"unknown suite {name!r}; there are {', '.join(SUITES)}")
    return SUITES[name]
