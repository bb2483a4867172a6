"""The report of an evaluation: report.json, report.md, report.html and the pictures, beside the replies."""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from ..core.files import atomic_write
from ..errors import UserError
from . import report_plots
from .contamination import Overlap
from .published import MODELS, benchmark_of, figure, incomparable, reference
from .report_blocks import Block, Code, Folded, Heading, Picture, Table, Text
from .report_html import html
from .report_markdown import markdown
from .report_tables import (
    contamination_section,
    delta,
    needle_section,
    reflection_section,
    result_section,
    source_section,
    suite_section,
)
from .results import Result
from .suites import Outcome, Suite, judge

FORMAT = "dsv3-evaluation-1"
NO_PICTURES = "The pictures are missing: they need matplotlib, pip install 'dsv3[train]'."


def write_report(
    out: Path,
    results: Sequence[Result],
    *,
    subject: Mapping[str, Any],
    command: str,
    machine: str | Mapping[str, Any] = "",
    suite: Suite | None = None,
    reasons: Mapping[str, str] | None = None,
    overlaps: Sequence[Overlap] = (),
    model: str | None = None,
    when: datetime | None = None,
) -> list[Path]:
    """Write the report into the folder `out`, each file whole or not at all, and return its files.

    subject: the model as plain data, with "name", and "device" and "devices" as suites.hours_of reads them; it may hold
    "machine" itself. command: what runs the same again. suite: gives every row of it a verdict. reasons: why tasks were
    not run, see suites.judge. overlaps: see contamination.check. model: whose published figures results are measured
    against; None: those of the model that each protocol is of. when: now, unless given.
    Raises UserError where `out` cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made a folder ({error.strerror}); choose another place") from error
    outcomes = judge(suite, results, subject, reasons) if suite is not None else []
    if model is None and suite is not None and len(suite.models) == 1:
        model = suite.models[0]
    try:
        pictures, missing = report_plots.pictures(results), ""
    except ImportError:
        pictures, missing = {}, NO_PICTURES
    title = f"Evaluation of {subject.get('name', 'a model')}"
    date = (when or datetime.now(UTC)).isoformat(timespec="seconds")
    about = dict(subject)
    place = about.pop("machine", None) or machine
    blocks: list[Block] = [Heading(title, 1), *_head(about, place, command, date)]
    blocks += [Text(missing)] if missing else []
    if suite is not None:
        blocks += suite_section(suite, outcomes)
    blocks += result_section(results, subject, model)
    blocks += _pictures(results, pictures)
    if overlaps:
        blocks += contamination_section(overlaps, results)
    blocks += source_section(results, model)
    tree = {
        "format": FORMAT,
        "dsv3": metadata.version("dsv3"),
        "date": date,
        "subject": about,
        "machine": place,
        "command": command,
        "results": [result.as_json() | {"published": _published(result, model)} for result in results],
        "suite": _suite(suite, outcomes),
        "contamination": [overlap.as_json() for overlap in overlaps],
        "pictures": sorted(pictures),
    }
    # The data first: whoever finds the page finds its numbers too.
    texts = {
        "report.json": json.dumps(tree, ensure_ascii=False, indent=1, default=str, allow_nan=False) + "\n",
        "report.md": markdown(blocks),
        "report.html": html(title, blocks, pictures),
    }
    for name, data in pictures.items():
        with atomic_write(out / name) as file:
            file.write(data)
    for name, text in texts.items():
        with atomic_write(out / name, "w") as file:
            # A model may have written half a surrogate pair; a report that holds it must still be written.
            file.write(text.encode("utf-8", errors="replace").decode("utf-8"))
    return [out / name for name in (*texts, *pictures)]


def _head(about: Mapping[str, Any], place: str | Mapping[str, Any], command: str, date: str) -> Iterator[Block]:
    yield Table(["Model", ""], [[key, text] for key, text in [*_flat(about), ("date", date)] if key != "name"])
    if isinstance(place, str) and place:
        yield Text(f"Machine: {place}")
    elif place:
        yield Folded("Machine", [Table(["Machine", ""], [[key, text] for key, text in _flat(dict(place))])])
    if command:
        yield Code(command)


def _flat(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Names and texts of a tree's leaves; what is unknown is left out."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        elif isinstance(value, list | tuple) and any(isinstance(each, Mapping) for each in value):
            for place, each in enumerate(value):
                inner = {str(each.get("name", place)): each} if isinstance(each, Mapping) else {str(place): each}
                yield from _flat(inner, f"{before}{key}.")
        elif value is not None and value not in ("", [], ()):
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            yield f"{before}{key}", f"{value:,}" if isinstance(value, int) and abs(value) > 9999 else text


def _pictures(results: Sequence[Result], pictures: Mapping[str, bytes]) -> Iterator[Block]:
    for name, heading, text in (
        ("results.png", "Beside the published figures", "results with their intervals beside the published figures"),
        ("lengths.png", "Lengths of the replies", "histogram of tokens for each task"),
    ):
        if name in pictures:
            yield Heading(heading, 3)
            yield Picture(name, text)
    for result in results:
        if result.extra.get("cells"):
            yield from needle_section(result, [n for n in pictures if n == report_plots.name_of(result, "depths")])
        if result.extra.get("reflection"):
            yield from reflection_section(
                result, [n for n in pictures if n == report_plots.name_of(result, "reflection")]
            )


def _published(result: Result, model: str | None) -> list[dict[str, Any]]:
    """The figures beside a result, as plain data; `measured_against` marks the one that delta and flag are about."""
    main = reference(result, model)
    rows = [figure(benchmark_of(result.task), name, result.metric) for name in MODELS]
    found = [row for row in dict.fromkeys([main, *rows]) if row is not None]
    return [
        {
            "model": row.model,
            "value": row.value,
            "protocol": row.protocol,
            "shots": row.shots,
            "metric": row.metric,
            "source": row.source,
            "note": row.note,
            "delta": delta(result, row),
            "comparable": not incomparable(result, row),
            "not_comparable": incomparable(result, row),
            "measured_against": row is main,
        }
        for row in found
    ]


def _suite(suite: Suite | None, outcomes: Sequence[Outcome]) -> dict[str, Any] | None:
    if suite is None:
        return None
    return {"name": suite.name, "title": suite.title, "rows": [outcome.as_json() for outcome in outcomes]}
