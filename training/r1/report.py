"""What a pipeline came to, as a page to read: its stages, and what thinking on was worth before and after each
reinforcement."""

from collections.abc import Iterator, Mapping
from typing import Any

LINES = {  # what is said of a stage, by the key of its note
    "steps": "{:,} steps",
    "loss": "loss {:.3f}",
    "reward": "reward {:.3f}",
    "completions/mean_length": "{:.1f} tokens a completion",
    "completions/clipped_ratio": "{:.0%} cut off",
    "prompts": "{:,} prompts",
    "samples": "{:,} samples",
    "kept": "{:,} traces kept",
    "from_zero": "{:,} traces of R1-Zero",
    "rewritten_by_model": "{:,} rewritten by a model",
    "corrections": "{:,} with an error found and mended",
    "given": "{:,} conversations given",
}
CELLS = ("right_right", "wrong_right", "right_wrong", "wrong_wrong_same", "wrong_wrong_changed")


def markdown(report: Mapping[str, Any]) -> str:
    """report: as RUN/r1_report.json has it."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    yield from ("# R1 pipeline", "", "| stage | what came out | seconds |", "|---|---|---|")
    for name, note in report["stages"].items():
        seconds = sum(report["seconds"].get(key, 0.0) for key in (name, f"{name}/samples"))
        yield f"| {name} | {_said(note)} | {seconds:,.0f} |"
    if not report["reflection"]:
        return
    yield from (
        "",
        "## Reflection, before and after reinforcement",
        "",
        "Each reply to the held-out questions is judged twice: at the first answer that its thought arrives at, and at "
        "its end. Net gain is what thinking on added to the share of right answers; intervals are of 95%.",
        "",
        "| stage | model | right | tokens | right, right | wrong, right | right, wrong | wrong, same | wrong, other "
        "| no first answer | precision of corrections | net gain |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    )
    for stage, both in report["reflection"].items():
        for when in ("before", "after"):
            if when in both:
                yield _reflection(f"{when} {stage}", both[when])


def _said(note: Mapping[str, Any]) -> str:
    shown = {key: note[key] for key in LINES if isinstance(note.get(key), int | float)}
    if "reward" in shown:  # the loss of reinforcement is no measure of anything
        shown.pop("loss", None)
    found = [LINES[key].format(value) for key, value in shown.items()]
    if note.get("too_few"):
        found.append(f"fewer than the {note['wanted']:,} of R1-Zero that were wanted")
    return ", ".join(found)


def _reflection(name: str, found: Mapping[str, Any]) -> str:
    matrix = found["reflection"]
    low, high = found["accuracy_interval"]
    cells = [
        name,
        found["name"],
        f"{found['accuracy']:.1%} ({low:.1%} to {high:.1%})",
        f"{found['mean_tokens']:.1f}",
        *(f"{matrix[cell]:,}" for cell in CELLS),
        f"{matrix['no_candidate'] + matrix['unfinished']:,}",
        _share(matrix["correction_precision"], matrix["correction_precision_interval"]),
        _share(matrix["net_gain"], matrix["net_gain_interval"]),
    ]
    return f"| {' | '.join(cells)} |"


def _share(value: float | None, interval: list[float] | None) -> str:
    if value is None:
        return "-"
    if interval is None:
        return f"{value:.1%}"
    low, high = max(interval[0], -1), min(interval[1], 1)
    return f"{value:.1%} ({low:.1%} to {high:.1%})"
