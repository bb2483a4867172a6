"""The pictures of a report, as PNG: ours beside the published figures, lengths of replies, the needle's map, and first
answers against final ones. The only place that needs matplotlib."""

import io
import re
import warnings
from collections.abc import Sequence
from typing import Any

from .published import ACCURACY, LIKELIHOOD, MODELS, benchmark_of, figure, same_metric
from .results import Result

GREY, BLUE = "#b8c0cc", "#1f5fbf"
MARKS = {"V3-Base": ("s", "#8a94a3"), "V3": ("D", "#d98324"), "R1": ("^", "#a8323e")}
SHARES = (ACCURACY, LIKELIHOOD)  # belong on one axis with every share of ours
DPI = 120
BINS = 40
COLUMNS = 3  # histograms side by side


def pictures(results: Sequence[Result]) -> dict[str, bytes]:
    """File name -> PNG, of those that the results have something for. ImportError without matplotlib."""
    drawn = {
        "results.png": _results([result for result in results if result.scale == 100 and result.value is not None]),
        "lengths.png": _lengths([result for result in results if result.lengths]),
    }
    for result in results:
        if cells := result.extra.get("cells"):
            drawn[name_of(result, "depths")] = _depths(result, cells)
        if reflection := result.extra.get("reflection"):
            drawn[name_of(result, "reflection")] = _reflection(result, reflection["matrix"])
    return {name: _png(each) for name, each in drawn.items() if each is not None}


def name_of(result: Result, what: str) -> str:
    """The file of a picture that a single result has."""
    return re.sub(r"[^\w.-]+", "-", f"{result.task}-{result.protocol}-{what}") + ".png"


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # letters that the font does not have
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def _label(result: Result) -> str:
    text = f"{result.title} ({result.protocol})".encode("utf-8", errors="replace").decode("utf-8")
    return text.replace("$", r"\$")  # no mathematics


def _bare(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)


def _results(results: Sequence[Result]) -> Any:
    if not results:
        return None
    drawn = _figure(8, 1.2 + 0.42 * len(results))
    axis = drawn.add_subplot()
    for place, result in enumerate(results):
        value = (result.value or 0.0) * 100
        low, high = max(0.0, result.low * 100), min(100.0, result.high * 100)
        known = result.low > float("-inf")
        axis.plot([0, value], [place, place], color=GREY, linewidth=1)
        axis.errorbar(
            value,
            place,
            xerr=[[max(0.0, value - low)], [max(0.0, high - value)]] if known else None,
            fmt="o",
            color=BLUE,
            capsize=3,
            zorder=3,
            label="ours, with its 95% interval" if place == 0 else None,
        )
        for model in MODELS:
            row = figure(benchmark_of(result.task), model, result.metric)
            if row is not None and (same_metric(result.metric, row.metric) or row.metric in SHARES):
                mark, colour = MARKS[model]
                axis.plot(row.value, place - 0.2, marker=mark, color=colour, linestyle="none")  # above ours
    for model, (mark, colour) in MARKS.items():
        axis.plot([], [], marker=mark, color=colour, linestyle="none", label=f"{model}, published")
    axis.set_yticks(range(len(results)), [_label(result) for result in results])
    axis.invert_yaxis()
    axis.set_xlim(0, 101)
    axis.set_xlabel("percent")
    drawn.legend(frameon=False, loc="outside lower center", ncols=4)
    _bare(axis)
    return drawn


def _lengths(results: Sequence[Result]) -> Any:
    if not results:
        return None
    columns = min(COLUMNS, len(results))
    lines = -(-len(results) // columns)
    drawn = _figure(4.2 * columns, 2.9 * lines)
    for place, result in enumerate(results):
        axis = drawn.add_subplot(lines, columns, place + 1)
        longest = max(result.lengths)
        axis.hist(result.lengths, bins=min(BINS, longest + 1), range=(0, longest + 1), color=BLUE)
        axis.set_title(_label(result), fontsize=10)
        axis.set_xlabel("tokens of a reply")
        axis.set_ylabel("replies")
        if result.mean_tokens is not None:
            axis.axvline(result.mean_tokens, color="black", linewidth=1, linestyle="--")
        _bare(axis)
    return drawn


def _depths(result: Result, cells: dict[str, float]) -> Any:
    """cells: share found, by "LENGTH/DEPTH"."""
    places = {tuple(map(int, name.split("/"))): value for name, value in cells.items()}
    lengths, depths = (sorted({place[side] for place in places}) for side in (0, 1))
    values = [[places.get((length, depth), float("nan")) for length in lengths] for depth in depths]
    drawn = _figure(2.6 + 0.7 * len(lengths), 1.6 + 0.32 * len(depths))
    axis = drawn.add_subplot()
    image = axis.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45, ha="right")
    axis.set_yticks(range(len(depths)), [f"{depth}%" for depth in depths])
    axis.set_xlabel("tokens of the text")
    axis.set_ylabel("depth of the needle")
    axis.set_title(f"{result.title}: share found", fontsize=10)
    drawn.colorbar(image, ax=axis)
    return drawn


def _reflection(result: Result, matrix: dict[str, Any]) -> Any:
    wrong = matrix["wrong_wrong_same"] + matrix["wrong_wrong_changed"]
    values = [[matrix["right_right"], matrix["right_wrong"]], [matrix["wrong_right"], wrong]]
    drawn = _figure(4.2, 3.4)
    axis = drawn.add_subplot()
    axis.imshow(values, cmap="Blues", vmin=0, vmax=max(1, 1.6 * max(max(row) for row in values)))
    for row, line in enumerate(values):
        for column, count in enumerate(line):
            axis.text(column, row, f"{count:,}", ha="center", va="center", fontsize=14)
    axis.set_xticks([0, 1], ["right", "wrong"])
    axis.set_yticks([0, 1], ["right", "wrong"])
    axis.set_xlabel("final answer")
    axis.set_ylabel("first answer of the thought")
    axis.set_title(_label(result), fontsize=10)
    return drawn
