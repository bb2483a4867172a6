"""report.html: what happened in a quickstart and what it means, on one page that needs nothing beside it."""

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.files import atomic_write
from ..training.plots import BLUE, GREY, smooth
from .arithmetic import ENGLISH_THOUGHT, RIGHT_ATTEMPT, STYLES
from .picture import GREEN, ORANGE, draw_accuracy, draw_learning, draw_load
from .report import Records

STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 60rem; margin: 2.5rem auto; padding: 0 1.2rem }
h1 { font-size: 1.6rem; line-height: 1.25 } h2 { font-size: 1.2rem; margin-top: 2.4rem }
img { max-width: 100%; background: #fff; border-radius: 6px }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .3rem .8rem .3rem 0; text-align: left }
thead th { border-bottom: 1px solid #8886 } td.n, th.n { text-align: right }
pre, code { font-family: ui-monospace, monospace; font-size: .85em }
pre { white-space: pre-wrap; margin: 0; max-width: 24rem }
.samples td { vertical-align: top; border-bottom: 1px solid #8883 }
.right { color: #2f8f5b } .wrong { color: #c0392b } .note { border-left: 3px solid #d9822b; padding-left: 1rem }
"""


def write_page(report: dict[str, Any], logs: Mapping[str, Records], out: Path) -> None:
    """Write OUT/report.html from the report and the logs of the runs."""
    sections = [
        _head(report),
        "<h2>The base model</h2>",
        _figure(2, lambda axes: _pretraining(axes, logs["pretrain"])),
        _base(report),
        "<h2>Before and after reinforcement</h2>",
        _figure(3, lambda axes: _reinforcement(axes, logs["grpo"])),
        _table(report, ("sft", "grpo")),
        _meaning(report),
        _reflection(report),
        _zero(report),
        "<h2>The same questions, before and after</h2>",
        _samples(report["reasoning"]["sft"]["samples"], report["reasoning"]["grpo"]["samples"]),
        "<h2>Distillation</h2>",
        _figure(1, lambda axes: draw_accuracy(axes[0], report["reasoning"])),
        _table(report, ("grpo", "student", "baseline")),
        _distillation(report),
        "<h2>More</h2>",
        '<p>What <code>dsv3 eval</code> says of the model after GRPO: <a href="evaluation/report.html">its report</a> '
        "has intervals, settings, lengths, and how often a first answer was changed for a better or a worse one.</p>",
        "<h2>How long it took</h2>",
        _times(report),
    ]
    title = "dsv3 quickstart: a small DeepSeek-V3, from text to thought"
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
        f"<body>{''.join(sections)}</body></html>"
    )
    with atomic_write(out / "report.html", "w") as file:
        file.write(page)


def _head(report: dict[str, Any]) -> str:
    seconds, machine = round(report["seconds"]["total"]), report["machine"]
    return (
        "<h1>A DeepSeek-V3 of "
        f"{(report['parameters']['main'] + report['parameters']['mtp']) / 1e6:.2f} million parameters, from nothing to "
        f"short chains of thought in {seconds // 60}:{seconds % 60:02d} minutes</h1>"
        "<p>Multi-head latent attention, mixture of experts balanced by bias, multi-token prediction; pre-training, "
        "supervised fine-tuning, GRPO with rule rewards, distillation: the recipe of DeepSeek-V3 and R1 with nothing "
        f"left out, at the size of this machine ({machine['cores']} cores, {_text(machine['cpu'])}, "
        f"torch {_text(machine['torch'])}, seed {report['seed']}).</p>"
    )


def _base(report: dict[str, Any]) -> str:
    rows = "".join(
        f"<li>held-out {_text(name)}: {value['before']:.2f} → {value['after']:.2f} bits per byte</li>"
        for name, value in report["bits_per_byte"].items()
    )
    texts = "".join(
        f"<pre><b>{_text(completion['prompt'])}</b>{_text(completion['text'])}</pre><br>"
        for completion in report["completions"]
    )
    return (
        f"<ul>{rows}</ul>{texts}"
        f'<p class="note">{report["tokens"]:,} tokens teach a model the look of code and of English, not their '
        "meaning: names are plausible, programs do not run. Models of use read millions of times more. Whether it "
        "helped with the arithmetic below was not measured here; in the three runs of docs/quickstart.md it did not: "
        "the same cold start from random weights ended with more right answers. It is here because the recipe begins "
        "with it.</p>"
    )


def _pretraining(axes: Sequence[Any], records: Records) -> None:
    draw_learning(axes[0], records)
    draw_load(axes[1], records)


def _reinforcement(axes: Sequence[Any], records: Records) -> None:
    steps = [record["step"] + 1 for record in records]
    curves = (
        ("sampled replies that are right, %", "rewards/accuracy_exact/mean", 100, GREEN),
        ("thoughts in the question's language, %", "rewards/language/mean", 100, BLUE),
        ("tokens of a reply", "completions/mean_length", 1, ORANGE),
    )
    for axis, (title, key, factor, color) in zip(axes, curves, strict=True):
        values = [factor * (record[key] or 0.0) for record in records]
        axis.plot(steps, values, color=GREY, linewidth=0.8)
        axis.plot(steps, smooth(values, 0.7), color=color, linewidth=1.8)
        axis.set_ylim(bottom=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step of GRPO")


NAMES = {
    "sft": "cold start (SFT)",
    "grpo": "after GRPO",
    "student": "student, taught by its replies",
    "baseline": "the same student without a teacher",
}


def _table(report: dict[str, Any], keys: Sequence[str]) -> str:
    head = (
        "right, greedy",
        "95% interval",
        "right, T = 1",
        "Chinese thoughts in Chinese",
        "tokens a reply",
        "well formed",
        "cut off",
    )
    rows = []
    for key in keys:
        greedy, warm = report["reasoning"][key]["greedy"], report["reasoning"][key]["temperature 1"]
        low, high = greedy["interval"]
        share = greedy["chinese_thoughts"]
        cells = (
            f"{greedy['accuracy']:.1%}", f"{low:.1%} – {high:.1%}", f"{warm['accuracy']:.1%}",
            "–" if share is None else f"{share:.0%}", f"{greedy['tokens']:.1f}", f"{greedy['well_formed']:.0%}",
            f"{greedy['truncated']:.0%}",
        )  # fmt: skip
        rows.append(f"<tr><th>{NAMES[key]}</th>" + "".join(f'<td class="n">{cell}</td>' for cell in cells) + "</tr>")
    heads = "".join(f'<th class="n">{name}</th>' for name in head)
    return f"<table><thead><tr><th></th>{heads}</tr></thead>{''.join(rows)}</table>"


def _gain(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    text = f"{100 * found['accuracy']:+.1f} points (95% interval {100 * low:+.1f} to {100 * high:+.1f})"
    if found["enough"]:
        return text
    return f"{text}, which is less than the {100 * found['wanted']:.0f} that this recipe gains on most seeds"


def _meaning(report: dict[str, Any]) -> str:
    count = report["reasoning"]["grpo"]["greedy"]["problems"]
    return (
        f'<p class="note">GRPO gained {_gain(report["gains"]["grpo"])} on {count} problems whose chains occur in no '
        f"training data. <b>What the gain is:</b> {STYLES['direct']:.0%} of the cold-start traces jump to an answer, "
        f"which this model mostly gets wrong, and {ENGLISH_THOUGHT:.0%} of the Chinese questions are thought about in "
        "English. Reinforcement can find out that going step by step pays, and in the language of the question. It "
        "teaches little new arithmetic: in the run of docs/quickstart.md whose traces all go step by step, SFT alone "
        "ended as high, and GRPO changed the language only. Greedy decoding flatters the gain; the column T = 1 is the "
        "soberer one.</p>"
    )


def _reflection(report: dict[str, Any]) -> str:
    rows = []
    for key in ("sft", "grpo"):
        found = report["reasoning"][key]["reflection"]["temperature 1"]
        cells = [found[name] for name in ("right_right", "wrong_right", "right_wrong")]
        cells += [found["wrong_wrong_same"] + found["wrong_wrong_changed"], f"{found['step_by_step']:.0%}"]
        rows.append(f"<tr><th>{NAMES[key]}</th>" + "".join(f'<td class="n">{cell}</td>' for cell in cells) + "</tr>")
    heads = "".join(
        f'<th class="n">{name}</th>'
        for name in ("right → right", "wrong → right", "right → wrong", "wrong → wrong", "step by step")
    )
    return (
        "<p>Does it correct itself? The first answer that a thought names against the last one, sampled at T = 1. In "
        f"{STYLES['checked'] * (1 - RIGHT_ATTEMPT):.0%} of the cold-start traces a wrong attempt is checked and "
        "corrected; what is wrong → right below are such corrections.</p>"
        f"<table><thead><tr><th></th>{heads}</tr></thead>{''.join(rows)}</table>"
    )


def _zero(report: dict[str, Any]) -> str:
    zero = report["zero"]
    right = zero["right"]
    share = sum(right) / len(right) if right else 0.0
    verdict = (
        "With nothing right there is nothing to reinforce: R1-Zero needs a base model that is right sometimes."
        if share < 0.01
        else "That is chance more than thought at this size."
    )
    return (
        f"<p><b>R1-Zero</b>, reinforcement on the base model without any example: {zero['samples']:,} replies in "
        f"{zero['steps']} steps, {share:.2%} of them right. {verdict} So the cold start here is "
        "built from given traces.</p>"
    )


def _samples(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> str:
    def cell(sample: dict[str, Any]) -> str:
        kind = "right" if sample["right"] else "wrong"
        return f'<td><pre>{_text(sample["text"])}</pre><span class="{kind}">{kind}</span></td>'

    rows = "".join(
        f"<tr><td>{_text(one['question'])}<br><small>answer {_text(one['answer'])}</small></td>"
        f"{cell(one)}{cell(two)}</tr>"
        for one, two in zip(before, after, strict=True)
    )
    return (
        '<table class="samples"><thead><tr><th>question</th><th>after SFT</th><th>after GRPO</th></tr></thead>'
        f"{rows}</table>"
    )


def _distillation(report: dict[str, Any]) -> str:
    return (
        f"<p>The student has {report['student_parameters'] / 1e6:.2f} million parameters and has read nothing before. "
        "It learns from replies of the model above that were checked to be right, well formed and in the right "
        f"language. Against the same student on the cold-start traces: {_gain(report['gains']['student'])}. That a "
        "student comes near its teacher, or passes it, is due to the check: it never sees the teacher's mistakes.</p>"
    )


def _times(report: dict[str, Any]) -> str:
    rows = "".join(
        f'<tr><td>{_text(name)}</td><td class="n">{seconds:.1f} s</td></tr>'
        for name, seconds in report["seconds"].items()
    )
    return f"<table>{rows}</table>"


def _figure(panels: int, draw: Callable[[Sequence[Any]], object]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * panels, 3.3), layout="constrained")
    axes = [figure.add_subplot(1, panels, i + 1) for i in range(panels)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    draw(axes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return f'<p><img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"></p>'


def _text(value: object) -> str:
    return html.escape(str(value))
