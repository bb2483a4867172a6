"""A picture of simulations: how long users waited for each token, over time."""

from collections.abc import Mapping
from pathlib import Path

from ..core.files import atomic_write
from ..core.records import library
from .simulate import Outcome

COLOURS = ("#1f5fbf", "#c2542d")
TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)  # ms
GOAL = 100.0  # ms


def draw(outcomes: Mapping[str, Outcome], file: str | Path, title: str) -> None:
    """A PNG with the waiting time of every token of every request, on a logarithmic axis; of two outcomes at most, by
    name."""
    library("matplotlib", "a picture", "'dsv3[train]'").use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.add_subplot()
    for colour, (name, outcome) in zip(COLOURS, outcomes.items(), strict=False):
        points = [point for course in outcome.courses for point in course.gaps]
        axis.scatter([x for x, _ in points], [1e3 * y for _, y in points], s=4, linewidths=0, color=colour, label=name)
    axis.axhline(GOAL, color="#808890", linewidth=0.8, linestyle="--")
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    ticks = [tick for tick in TICKS if low < tick < high]
    axis.set_yticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("seconds")
    axis.set_ylabel("between two tokens of a request, ms")
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(outcomes), frameon=False, markerscale=3)
    with atomic_write(Path(file)) as out:
        figure.savefig(out, format="png", dpi=120)
