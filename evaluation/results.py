"""The result of one task under one protocol: from grades to numbers with intervals."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from ..grading.answers import exact
from ..grading.statistics import Interval, clustered_interval, pass_at_k, t_quantile, wilson
from ..grading.verdict import Verdict
from .items import Item, Kind, Task, plural
from .scoring import Grade


@dataclass
class Result:
    """A row of the report. Shares are 0 to 1; `value` lies between `low` and `high` with 95% confidence.

    metric: what `value` is. lower: whether a lower one is better. items: asked; of: in the data. samples: of each item.
    truncated: share of replies that ended at a limit; missing: share without an answer. mean_tokens: of a reply.
    seconds: spent on all replies, in this run and the interrupted ones before. lengths: tokens of every reply.
    full_samples: what the protocol wants of every item. groups: value and items by subject, level or the like.
    flags: why the result is not comparable with a published one. notes: what else a reader should know.
    settings: hash of everything that decides a reply but the item.
    """

    task: str
    title: str
    protocol: str
    metric: str
    items: int
    of: int
    samples: int
    settings: str
    value: float | None = None
    low: float = -math.inf
    high: float = math.inf
    shots: int = 0
    full_samples: int = 1
    lower: bool = False
    scale: float = 100.0
    truncated: float | None = None
    missing: float | None = None
    mean_tokens: float | None = None
    tokens: int = 0
    seconds: float = 0.0
    lengths: list[int] = field(default_factory=list)
    groups: dict[str, dict[str, float]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seed: int = 0

    def as_json(self) -> dict[str, Any]:
        """Plain data; an unknown border of the interval is null."""
        fields = asdict(self) | {"low": known(self.low), "high": known(self.high)}
        return fields


def known(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def summarise(result: Result, task: Task, items: Sequence[Item], grades: Mapping[str, Sequence[Grade]]) -> Result:
    """Fill in value, interval, groups and what else the grades tell. grades: by the item's id, one a sample."""
    values = {item.id: [grade.credit for grade in grades[item.id]] for item in items}
    means = {key: fmean(each) for key, each in values.items()}
    groups: dict[str, list[str]] = {}
    for item in items:
        groups.setdefault(item.group, []).append(item.id)
    if len(groups) > 1:
        result.groups = {
            group or "other": {"items": len(keys), "value": fmean(means[key] for key in keys)}
            for group, keys in sorted(groups.items())
        }
    if task.macro and len(groups) > 1:
        result.value = fmean(fmean(means[key] for key in keys) for keys in groups.values())
        result.low, result.high = macro_interval([[means[key] for key in keys] for keys in groups.values()])
        result.metric += ", mean over subjects"
    elif values:
        result.value = fmean(means.values())
        result.low, result.high = interval(list(values.values()))
    every = [grade for item in items for grade in grades[item.id]]
    if every:
        result.missing = sum(grade.verdict is Verdict.MISSING for grade in every) / len(every)
    if timeouts := sum(grade.verdict is Verdict.TIMEOUT for grade in every):
        result.extra["timeouts"] = timeouts
        result.notes.append(f"took too long to check, and so wrong: {plural(timeouts, 'answer')}")
    result.extra |= _several(task, [grades[item.id] for item in items])
    if task.kind is Kind.FIND:
        result.extra["cells"] = means
    return result


def interval(values_per_item: Sequence[Sequence[float]]) -> Interval:
    """For the mean of shares: Wilson's for one sample of right or wrong an item, else the clustered one, kept within 0
    to 1."""
    flat = {value for values in values_per_item for value in values}
    single = all(len(values) == 1 for values in values_per_item)
    if flat <= {0.0, 1.0} and (single or len(flat) == 1):
        # Samples that are all alike say no more than one sample of every item.
        return wilson(sum(values[0] > 0 for values in values_per_item), len(values_per_item))
    low, high = clustered_interval(values_per_item)
    return max(0.0, low), min(1.0, high)


def macro_interval(groups: Sequence[Sequence[float]]) -> Interval:
    """For the mean of the groups' means, items drawn anew within each group. A group of one item adds what a share of
    one half would."""
    variance = 0.0
    for values in groups:
        mean = fmean(values)
        spread = sum((value - mean) ** 2 for value in values) / (len(values) - 1) if len(values) > 1 else 0.25
        variance += spread / len(values)
    freedom = max(1, sum(len(values) for values in groups) - len(groups))
    half = t_quantile(0.95, freedom) * math.sqrt(variance) / len(groups)
    middle = fmean(fmean(values) for values in groups)
    return max(0.0, middle - half), min(1.0, middle + half)


def _several(task: Task, grades: Sequence[Sequence[Grade]]) -> dict[str, Any]:
    """What only several samples of an item tell: pass@k for programs, the majority's answer for mathematics."""
    count = min((len(each) for each in grades), default=0)
    if count < 2:
        return {}
    if task.kind is Kind.CODE:
        right = [sum(grade.right for grade in each) for each in grades]
        return {
            f"pass@{k}": fmean(pass_at_k(len(each), c, k) for each, c in zip(grades, right, strict=True))
            for k in sorted({1, 10, count})
            if k <= count
        }
    if task.kind in (Kind.MATH, Kind.CHOICE, Kind.TEXT):
        return {f"cons@{count}": fmean(majority(each) for each in grades)}
    return {}


def majority(grades: Sequence[Grade]) -> float:
    """1 if the answer that most samples gave is right, 0 if not; several equally frequent ones share the vote."""
    votes: Counter[str] = Counter()
    right: dict[str, bool] = {}
    for grade in grades:
        if grade.answer is None:
            continue
        # What is right is one answer, however it is written.
        name = next((known for known in votes if exact(grade.answer, known) or (grade.right and right[known])), None)
        name = grade.answer if name is None else name
        votes[name] += 1
        right[name] = right.get(name, False) or grade.right
    most = max(votes.values(), default=0)
    return fmean(right[name] for name, count in votes.items() if count == most) if votes else 0.0
