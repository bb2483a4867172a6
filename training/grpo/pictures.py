"""The curves of a run of GRPO, drawn from its log: grpo.png."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...core.files import atomic_write
from ...errors import UserError
from ..plots import BLUE, GREY, smooth

Records = Sequence[dict[str, Any]]


def draw(records: Records, directory: str | Path) -> Path:
    """Draw what `read_metrics` returned: reward, its parts, validation, length, entropy and KL, a panel each."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("pictures need matplotlib: pip install 'dsv3[train]'") from None
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    panels: list[tuple[str, Callable[[Any], None]]] = [
        ("reward", lambda axis: _curve(axis, records, "reward")),
        ("reward of each function", lambda axis: _family(axis, records, "rewards/", "/mean")),
        ("tokens of a completion", lambda axis: _curve(axis, records, "completions/mean_length")),
        ("entropy, nats per token", lambda axis: _curve(axis, records, "entropy")),
    ]
    if _series(records, "kl")[0]:
        panels.append(("KL to the reference, nats per token", lambda axis: _curve(axis, records, "kl")))
    if any(key.startswith("validation/") for record in records for key in record):
        panels.append(("held-out prompts, greedy", lambda axis: _family(axis, records, "validation/rewards/")))
    columns = 3
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.6 * rows), layout="constrained")
    for number, (title, fill) in enumerate(panels):
        axis = figure.add_subplot(rows, columns, number + 1)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("step")
        axis.set_ylabel(title)
        fill(axis)
    target = Path(directory) / "grpo.png"
    with atomic_write(target) as file:
        figure.savefig(file, format="png", dpi=120)
    return target


def _series(records: Records, key: str) -> tuple[list[int], list[float]]:
    found = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _curve(axis: Any, records: Records, key: str) -> None:
    steps, values = _series(records, key)
    axis.plot(steps, values, color=GREY, linewidth=0.8)
    axis.plot(steps, smooth(values), color=BLUE, linewidth=1.8)


def _family(axis: Any, records: Records, prefix: str, suffix: str = "") -> None:
    """A line for each key between prefix and suffix."""
    keys = {key for record in records for key in record if key.startswith(prefix) and key.endswith(suffix)}
    for key in sorted(keys):
        steps, values = _series(records, key)
        name = key.removeprefix(prefix).removesuffix(suffix)
        axis.plot(
            steps, values if not suffix else smooth(values), label=name, marker="" if suffix else "o", markersize=3
        )
    if keys:
        axis.legend(frameon=False)
