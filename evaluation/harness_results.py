"""From what lm-eval returns to rows of a report: one metric of each task with an interval, the others beside it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from math import log
from statistics import fmean
from typing import Any

from ..grading.statistics import UNKNOWN, Interval
from . import published
from .harness_model import Account
from .items import plural
from .perplexity import ratio_interval
from .published import LM, benchmark_of
from .results import Result, interval, macro_interval
from .store import digest

NO_METRICS = ("name", "alias", "sample_len", "sample_count")
RIGHT = ("exact_match", "em", "acc")
NAMES = {"f1": published.F1, "bits_per_byte": published.BPB, "acc_norm": "accuracy by likelihood per byte"}


def build(name: str, found: Mapping[str, Any], account: Account, protocol: str) -> list[Result]:
    """The result of `name`, or of each task below it where lm-eval gives it none of its own (a tag, a plain group)."""
    if any(_metrics(found["results"].get(name, {}))):
        return [_result(name, found, account, protocol)]
    leaves = list(found["n-samples"])
    results = [_result(leaf, found, account, protocol) for leaf in leaves]
    whole = sum(result.items for result in results)
    for result in results:
        # The requests of all tasks went through the model together.
        result.seconds = account.seconds * result.items / whole
        result.tokens = round(account.tokens * result.items / whole)
        result.lengths, result.truncated, result.mean_tokens = [], None, None
        result.notes.append(f"time and tokens are its share of those of {LM}{name}, by items")
    return results


def _metrics(row: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """(metric, filter, value) of lm-eval's "acc,none" and the like."""
    for key, value in row.items():
        metric, comma, chosen = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            yield metric, chosen, float(value)


def _result(name: str, found: Mapping[str, Any], account: Account, protocol: str) -> Result:
    leaves = _leaves(name, found)
    kind = found["configs"][leaves[0]].get("output_type")
    every = list(_metrics(found["results"][name]))
    metric, chosen, value = _main(name, every, kind)
    label = label_of(metric, kind)
    samples = {
        leaf: [row[metric] for row in found["samples"][leaf] if row["filter"] == chosen and metric in row]
        for leaf in leaves
    }
    share, borders = _interval(metric, value, samples)
    better = found["higher_is_better"].get(name, {}).get(metric)
    counts = [found["n-samples"][leaf] for leaf in leaves]
    repeats = {int(found["configs"][leaf].get("repeats") or 1) for leaf in leaves}
    shots = {found["n-shot"].get(leaf, 0) for leaf in leaves}
    result = Result(
        task=LM + name,
        title=_title(name),
        protocol=protocol,
        metric=label,
        items=sum(count["effective"] for count in counts),
        of=sum(count["original"] for count in counts),
        samples=max(repeats),
        full_samples=max(repeats),
        settings=_settings(found, leaves, account),
        value=value,
        low=borders[0],
        high=borders[1],
        shots=max(shots),
        lower=better is False,
        scale=100.0 if share else 1.0,
        tokens=account.tokens,
        seconds=account.seconds,
        lengths=list(account.lengths),
        extra={f"{other},{way}": worth for other, way, worth in every if (other, way) != (metric, chosen)},
        notes=[f"lm-eval {metadata.version('lm-eval')}, metric {metric}" + (f", {chosen}" if chosen != "none" else "")],
    )
    if account.lengths:
        result.mean_tokens = fmean(account.lengths)
        result.truncated = account.cut_off / len(account.lengths)
    if len(shots) > 1:
        result.flags.append(f"tasks of {min(shots)} to {max(shots)} shots")
    if account.shortened:
        result.flags.append(f"{account.shortened} prompts were cut at their beginning, to fit the context")
    if account.unasked:
        result.flags.append(f"{account.unasked} questions do not fit the context and count as wrong")
    if account.refused:
        result.flags.append(f"refused, and so wrong: {plural(account.refused, 'question')}")
    if result.items < result.of:
        result.notes.append("lm-eval takes the first items, where there is a limit")
    if len(leaves) > 1 and share:
        result.groups = {
            leaf: {"items": len(values), "value": fmean(values)} for leaf, values in samples.items() if values
        }
    return result


def label_of(metric: str, kind: str | None) -> str:
    """Our name of a metric of lm-eval's; its own where we have none."""
    if metric in RIGHT:
        return published.ACCURACY if kind == "generate_until" else published.LIKELIHOOD
    return NAMES.get(metric, metric)


def _main(name: str, every: Sequence[tuple[str, str, float]], kind: str | None) -> tuple[str, str, float]:
    """The metric that the published figure is in, else the task's first."""
    figures = published.rows(benchmark_of(LM + name))
    for each in every:
        if any(published.same_metric(label_of(each[0], kind), row.metric) for row in figures):
            return each
    return every[0]


def _leaves(name: str, found: Mapping[str, Any]) -> list[str]:
    """The tasks below a group, itself where it is a task."""
    if name in found["n-samples"]:
        return [name]
    below = found["group_subtasks"].get(name, [])
    return [leaf for child in below for leaf in _leaves(child, found)]


def _interval(metric: str, value: float, samples: Mapping[str, Sequence[Any]]) -> tuple[bool, Interval]:
    """Whether the values are shares, and the interval of their mean; unknown where `value` is no mean of them."""
    flat = [value for values in samples.values() for value in values]
    if metric == "bits_per_byte" and flat and all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in flat):
        return False, ratio_interval([-pair[0] / log(2) for pair in flat], [pair[1] for pair in flat])
    if not flat or not all(isinstance(each, int | float) and 0 <= each <= 1 for each in flat):
        return False, UNKNOWN
    groups = [[float(each) for each in values] for values in samples.values() if values]
    if abs(fmean(flat) - value) < 1e-6:
        return True, interval([[each] for group in groups for each in group])
    if abs(fmean(map(fmean, groups)) - value) < 1e-6:
        return True, macro_interval(groups)
    return 0 <= value <= 1, UNKNOWN


def _title(name: str) -> str:
    benchmark = benchmark_of(LM + name)
    return next((row.title for row in published.rows(benchmark)), name) + " (lm-eval)"


def _settings(found: Mapping[str, Any], leaves: Sequence[str], account: Account) -> str:
    """A hash of what decides the replies: the tasks' own files too, but not where their data lies."""
    configs = {
        leaf: {key: value for key, value in found["configs"][leaf].items() if key not in ("dataset_kwargs", "metadata")}
        for leaf in leaves
    }
    text = re.sub(r" at 0x[0-9a-f]+", "", repr(configs))
    versions = [found["versions"].get(leaf) for leaf in leaves]
    return digest([account.settings, text, versions, metadata.version("lm-eval")])
