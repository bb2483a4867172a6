"""What a report says of results: its sections, as blocks."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .contamination import Overlap
from .protocols import PROTOCOLS
from .published import MODELS, NOTHING_SHOWN, Published, benchmark_of, figure, incomparable, reference, same_metric
from .report_blocks import Block, Folded, Heading, Picture, Points, Table, Text
from .results import Result, known
from .suites import RULE, Outcome, Suite, hours_of

NONE = "–"
HITS = 50  # items named, of those that a corpus holds


def number(value: float | None, digits: int = 1) -> str:
    return NONE if known(value) is None else f"{value:.{digits}f}"


def ours(value: float | None, low: float | None, high: float | None, digits: int = 1) -> str:
    """61.2 [58.5, 63.8]"""
    if known(value) is None:
        return NONE
    borders = (low, high)
    known_ones = (
        "interval unknown" if None in map(known, borders) else ", ".join(number(each, digits) for each in borders)
    )
    return f"{number(value, digits)} [{known_ones}]"


def digits_of(result: Result) -> int:
    return 1 if result.scale == 100 else 3


def scaled(result: Result) -> tuple[float | None, float, float]:
    value = None if result.value is None else result.value * result.scale
    return value, result.low * result.scale, result.high * result.scale


def result_section(results: Sequence[Result], subject: Mapping[str, Any], model: str | None) -> Iterator[Block]:
    """The main table, why rows are not comparable, and what else is to be known about them."""
    yield Heading("Results")
    if not results:
        yield Text("Nothing was run.")
        return
    head = ["Task", "Metric", "Protocol", "Shots", "Items", "Samples", "Ours [95%]", *MODELS, "Delta", "Comparable"]
    yield Table([*head, "Cut off", "Settings"], [_row(result, model) for result in results])
    yield Text(
        "Ours is the value with its 95% interval, over items drawn anew; samples of one item count as one. Published "
        "figures carry their shots in brackets. Delta is ours less the figure of the model that the protocol is of, "
        "named beside it. Cut off is the share of replies that ended at a limit. Settings is a hash of everything that "
        "decides a reply but the item."
    )
    reasons = list(_reasons(results, model))
    if reasons:
        yield Heading("Not comparable", 3)
        yield Points(reasons)
    if notes := [f"{result.title} ({result.protocol}): {note}" for result in results for note in result.notes]:
        yield Heading("Notes", 3)
        yield Points(notes)
    yield from _more(results, subject)


def _row(result: Result, model: str | None) -> list[str]:
    digits = digits_of(result)
    value, low, high = scaled(result)
    row = reference(result, model)
    comparable = NONE if row is None else "no" if incomparable(result, row) else "yes"
    items = f"{result.items:,}" if result.items == result.of else f"{result.items:,} of {result.of:,}"
    return [
        result.title,
        result.metric,
        result.protocol,
        str(result.shots),
        items,
        str(result.samples),
        ours(value, low, high, digits),
        *(_figure(figure(benchmark_of(result.task), name, result.metric), result) for name in MODELS),
        _delta(value, row, result),
        comparable,
        NONE if result.truncated is None else f"{result.truncated:.1%}",
        result.settings,
    ]


def _figure(row: Published | None, result: Result) -> str:
    if row is None:
        return NONE
    text = f"{row.value:.{row.digits}f}"
    text += f" ({row.shots})" if row.shots not in (None, NOTHING_SHOWN) else ""
    return (
        text if same_metric(result.metric, row.metric) or row.metric.startswith("accuracy") else f"{text} {row.metric}"
    )


def delta(result: Result, row: Published | None) -> float | None:
    """Ours less the published figure, in its units; None where the two are of different units."""
    value = scaled(result)[0]
    both_shares = result.scale == 100 and row is not None and row.metric.startswith("accuracy")
    if row is None or value is None or not (same_metric(result.metric, row.metric) or both_shares):
        return None
    return value - row.value


def _delta(value: float | None, row: Published | None, result: Result) -> str:
    difference = delta(result, row)
    return NONE if difference is None or row is None else f"{difference:+.{digits_of(result)}f} ({row.model})"


def _reasons(results: Iterable[Result], model: str | None) -> Iterator[str]:
    for result in results:
        row = reference(result, model)
        name = f"{result.title} ({result.protocol})"
        if row is None:
            yield f"{name}: no figure of it is published"
        elif reasons := incomparable(result, row):
            yield f"{name} with {row.model}: {'; '.join(reasons)}"


def _more(results: Sequence[Result], subject: Mapping[str, Any]) -> Iterator[Block]:
    rows = []
    for result in results:
        hours, unit = hours_of(result, subject)
        rest = [f"{name} {value:.4g}" for name, value in result.extra.items() if isinstance(value, int | float)]
        rows.append(
            [
                f"{result.title} ({result.protocol})",
                NONE if result.mean_tokens is None else f"{result.mean_tokens:,.0f}",
                NONE if result.missing is None else f"{result.missing:.1%}",
                f"{result.tokens:,}",
                f"{hours:.2g} {unit}",
                ", ".join(rest) or NONE,
            ]
        )
    yield Heading("Replies and cost", 3)
    yield Table(["Task", "Mean tokens of a reply", "Without an answer", "Tokens", "Time", "Besides"], rows)
    for result in results:
        if result.groups:
            lines = [
                [group, f"{each['items']:,.0f}", number(each["value"] * result.scale, digits_of(result))]
                for group, each in result.groups.items()
            ]
            table = Table(["Group", "Items", "Value"], lines)
            yield Folded(f"{result.title} ({result.protocol}) by group", [table])


def suite_section(suite: Suite, outcomes: Sequence[Outcome]) -> Iterator[Block]:
    """Every row of the suite with its verdict, and the sums."""
    yield Heading(f"Suite {suite.name}: {suite.title}")
    counts = Counter(str(outcome.verdict) for outcome in outcomes)
    # Two rows may have one result: pass@1 and the majority's answer.
    taken = {(each.result.task, each.result.protocol): each for each in outcomes if each.result is not None}
    hours: dict[str, float] = {}
    for outcome in taken.values():
        hours[outcome.unit] = hours.get(outcome.unit, 0.0) + (outcome.hours or 0.0)
    spent = ", ".join(f"{value:.2g} {unit}" for unit, value in hours.items()) or "no time"
    summary = ", ".join(f"{counts[name]} {name}" for name in ("pass", "fail", "not run"))
    yield Text(f"{summary}; {spent}. {RULE[0].upper()}{RULE[1:]}.")
    rows = []
    for outcome in outcomes:
        row = outcome.row.published
        rows.append(
            [
                row.title,
                row.model,
                row.protocol,
                NONE if row.shots is None else str(row.shots),
                row.metric,
                f"{row.value:.{row.digits}f}",
                ours(outcome.value, outcome.low, outcome.high, max(1, row.digits)),
                str(outcome.verdict),
                NONE if outcome.hours is None else f"{outcome.hours:.2g} {outcome.unit}",
                "; ".join(filter(None, (outcome.reason, row.note))) or NONE,
            ]
        )
    head = ["Benchmark", "Model", "Protocol", "Shots", "Metric", "Published", "Ours [95%]", "Verdict", "Time", "Why"]
    yield Table(head, rows)


def reflection_section(result: Result, pictures: Iterable[str]) -> Iterator[Block]:
    """First answers against final ones, and the controls."""
    report: dict[str, Any] = result.extra["reflection"]
    matrix = report["matrix"]
    yield Heading(f"Reflection: {result.title} ({result.protocol})", 3)
    yield from (Picture(name, "first answers of the thoughts against final ones") for name in pictures)
    yield Table(
        ["First answer", "Final answer right", "Final answer wrong"],
        [
            ["right", f"{matrix['right_right']:,}", f"{matrix['right_wrong']:,}"],
            [
                "wrong",
                f"{matrix['wrong_right']:,}",
                f"{matrix['wrong_wrong_same']:,} the same, {matrix['wrong_wrong_changed']:,} another",
            ],
        ],
    )
    points = [
        f"{report['traces']:,} replies; {matrix['no_candidate']:,} without an answer in the thought and "
        f"{matrix['unfinished']:,} unfinished are in no cell",
        "of the changes that mattered, corrected: "
        + _share(matrix["correction_precision"], matrix["correction_precision_interval"]),
        "net gain of thinking on: " + _share(matrix["net_gain"], matrix["net_gain_interval"]),
    ]
    if control := report.get("control"):
        points.append(
            f"thoughts ended at their first answer, {control['items']:,} items: {_share(control['cut_short'])} right, "
            f"with the whole thought {_share(control['whole_thought'])}; "
            f"difference {_share(control['gain'], control['gain_interval'])}"
        )
    if injection := report.get("injection"):
        points.append(
            f"thoughts begun with a wrong answer, {injection['items']:,} items: "
            f"{_share(injection['mended'], injection['mended_interval'])} ended right"
        )
    if report.get("note"):
        points.append(report["note"])
    words = sum(matrix["reflective_words"].values())
    points.append(f"words such as wait or check: {words:,}, which says little about what they do")
    yield Points(points)


def _share(value: float | None, interval: Sequence[float] | None = None) -> str:
    if value is None:
        return "unknown"
    low, high = (each * 100 for each in interval) if interval else (None, None)
    return f"{value:.1%}" if interval is None else ours(value * 100, low, high) + "%"


def needle_section(result: Result, pictures: Iterable[str]) -> Iterator[Block]:
    """Where in which texts the needle was found."""
    yield Heading(f"{result.title} ({result.protocol})", 3)
    yield from (Picture(name, "share of needles found, by length of the text and depth") for name in pictures)
    cells: dict[str, float] = result.extra["cells"]
    places = [tuple(map(int, name.split("/"))) for name in cells]
    lengths, depths = (sorted({place[side] for place in places}) for side in (0, 1))
    rows = [[f"{depth}%", *(_percent(cells.get(f"{length}/{depth}")) for length in lengths)] for depth in depths]
    yield Folded("As a table", [Table(["Depth", *(f"{length:,} tokens" for length in lengths)], rows)])


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{value:.0%}"


def contamination_section(overlaps: Sequence[Overlap], results: Sequence[Result]) -> Iterator[Block]:
    """What the corpora hold of the items, and the results without it."""
    yield Heading("Contamination")
    yield Text(
        f"Items that share a run of {overlaps[0].run} words with one of {overlaps[0].documents:,} texts. Shorter items "
        "cannot be found; a run that many items of one task share is passed over."
    )
    values = {(result.task, result.protocol): result for result in results}
    rows = []
    for overlap in overlaps:
        result = values.get((overlap.task, overlap.protocol))
        clean = overlap.clean
        rows.append(
            [
                f"{overlap.title} ({overlap.protocol})",
                f"{overlap.items:,}",
                f"{overlap.short:,}",
                f"{len(overlap.hits):,}",
                f"{overlap.share:.1%}",
                NONE if result is None else ours(*scaled(result), digits_of(result)),
                NONE if clean is None else ours(*scaled(clean), digits_of(clean)),
            ]
        )
    head = ["Task", "Items", "Too short", "Found", "Share of the rest", "Ours [95%]", "Ours without them [95%]"]
    yield Table(head, rows)
    for overlap in overlaps:
        if overlap.hits:
            shown = [[hit.item, hit.where, hit.run] for hit in overlap.hits[:HITS]]
            table = Table(["Item", "Found at", "Words"], shown)
            more = f", the first {HITS}; all are in report.json" if len(overlap.hits) > HITS else ""
            yield Folded(f"{overlap.title} ({overlap.protocol}): items found{more}", [table])


def source_section(results: Iterable[Result], model: str | None) -> Iterator[Block]:
    """Where protocols and figures come from."""
    yield Heading("Sources")
    used = dict.fromkeys(result.protocol for result in results)
    points = [f"Protocol {name}: {PROTOCOLS[name].source}" for name in used if name in PROTOCOLS]
    found: dict[str, str] = {}
    for result in results:
        for name in (*MODELS, *([model] if model else [])):
            row = figure(benchmark_of(result.task), name, result.metric)
            if row is not None:
                found.setdefault(name, row.source)
                if row.note:
                    points.append(f"{row.model}, {row.title}: {row.note}")
    yield Points([*points, *(f"Figures of {name}: {source}" for name, source in found.items())] or ["none"])
