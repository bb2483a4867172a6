"""quickstart.png: what the base model learnt, how its experts were balanced, and what post-training changed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.files import atomic_write
from ..training.plots import BLUE, GREY, smooth
from .report import validations

ORANGE, GREEN = "#d9822b", "#2f8f5b"
Records = Sequence[dict[str, Any]]


def draw_summary(pretraining: Records, grpo: Records, report: dict[str, Any], target: Path) -> None:
    """Draw the logs of both runs and the report's measurements into the PNG file `target`."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.use("Agg")
    figure = Figure(figsize=(15, 3.7), layout="constrained")
    learning, load, reward, bars = (figure.add_subplot(1, 4, i + 1) for i in range(4))
    for axis in (learning, load, reward, bars):
        axis.spines[["top", "right"]].set_visible(False)
    draw_learning(learning, pretraining)
    draw_load(load, pretraining)
    _reinforcement(reward, grpo)
    draw_accuracy(bars, report["reasoning"])
    parameters, seconds = sum(report["parameters"].values()), round(report["seconds"]["total"])
    figure.suptitle(
        f"A DeepSeek-V3 of {parameters / 1e6:.1f} M parameters: pre-training on {report['tokens'] / 1e6:.2f} M tokens "
        f"found on this machine, SFT, GRPO, distillation: {seconds // 60}:{seconds % 60:02d} minutes on "
        f"{report['machine']['cores']} cores",
        fontsize=11,
    )
    with atomic_write(target) as file:
        figure.savefig(file, format="png", dpi=110)


def draw_learning(axis: Any, records: Records) -> None:
    for (name, values), color in zip(validations(records).items(), (BLUE, ORANGE, GREY), strict=False):
        steps, bits = zip(*values, strict=True)
        axis.plot(steps, bits, marker="o", markersize=3.5, color=color, label=name)
        axis.annotate(
            f"{bits[-1]:.2f}", (steps[-1], bits[-1]), (0, 7), textcoords="offset points", ha="right", color=color
        )
    axis.set_ylim(bottom=0)
    axis.set_xlabel("step of pre-training")
    axis.set_title("held-out text, bits per byte", fontsize=10)
    axis.legend(frameon=False, loc="lower left")


def draw_load(axis: Any, records: Records) -> None:
    steps = [record["step"] + 1 for record in records]
    values = [100 * record["max_violation"] for record in records]
    axis.plot(steps, values, color=GREY, linewidth=0.8)
    axis.plot(steps, smooth(values), color=BLUE, linewidth=1.8)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("step of pre-training")
    axis.set_title("busiest expert, % above the mean load", fontsize=10)


def _reinforcement(axis: Any, records: Records) -> None:
    steps = [record["step"] + 1 for record in records]
    right = [100 * record["rewards/accuracy_exact/mean"] for record in records]
    length = [record["completions/mean_length"] for record in records]
    axis.plot(steps, right, color=GREY, linewidth=0.8)
    axis.plot(steps, smooth(right, 0.7), color=GREEN, linewidth=1.8)
    axis.set_ylim(0, 100)
    axis.set_xlabel("step of GRPO")
    axis.set_title("sampled replies: % right (green), tokens (orange)", fontsize=10)
    other = axis.twinx()
    other.spines[["top"]].set_visible(False)
    other.plot(steps, length, color=ORANGE, linewidth=1.2)
    other.set_ylim(bottom=0)
    other.tick_params(axis="y", colors=ORANGE)


def draw_accuracy(axis: Any, reasoning: dict[str, Any]) -> None:
    bars = (
        ("SFT", "sft", GREY), ("GRPO", "grpo", GREEN), ("student,\nno teacher", "baseline", GREY),
        ("student", "student", GREEN),
    )  # fmt: skip
    for place, (_, key, color) in enumerate(bars):
        score = reasoning[key]["greedy"]
        value, (low, high) = 100 * score["accuracy"], (100 * edge for edge in score["interval"])
        axis.bar(place, value, color=color, width=0.7)
        axis.errorbar(place, value, [[value - low], [high - value]], color="black", capsize=3, linewidth=1)
        axis.annotate(f"{value:.0f}", (place - 0.2, value), (0, 3), textcoords="offset points", ha="center")
    axis.set_xticks(range(len(bars)), [name for name, _, _ in bars])
    axis.set_ylim(0, 100)
    axis.set_title("held-out problems right, %, greedy", fontsize=10)
