"""What a quickstart has to tell: the report, and the lines of it that a person reads."""

import platform
import shlex
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..core.generate import SamplingParams, make_rollout
from ..core.model import DeepseekV3
from ..core.tokenizer import Tokenizer
from ..grading.statistics import paired_interval
from ..ops.op import activate_backend
from ..training.config import PretrainConfig
from ..training.data.shards import TokenSet
from ..training.launch import usable_cores

VALIDATION = "validation/"
COMPLETION_TOKENS = 64
LAST = 10  # steps whose mean is the load at the end: a single step says little
WANTED = 0.10  # gain in accuracy of GRPO over SFT, and of the student over its baseline
Records = Sequence[dict[str, Any]]


def validations(records: Records) -> dict[str, list[tuple[int, float]]]:
    """Source -> (steps done, bits per byte of its held-out text) of every validation in a log; NaN if not finite.

    The first one comes after the first step, which warm-up keeps too small to matter.
    """
    found: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for key, value in record.items():
            if key.startswith(VALIDATION):
                point = (record["step"] + 1, float("nan") if value is None else value)
                found.setdefault(key.removeprefix(VALIDATION), []).append(point)
    return found


def build_report(
    out: Path,
    config: PretrainConfig,
    logs: Mapping[str, Records],
    measured: Mapping[str, dict[str, Any]],
    data: Sequence[TokenSet],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """The content of report.json; loads the base model to let it go on with the settings' prompts."""
    model, tokenizer = (
        DeepseekV3.from_pretrained(out / "pretrain" / "model", backend="auto"),
        Tokenizer.load(out / "tokenizer"),
    )
    mtp = tuple(f"model.layers.{i}." for i in range(model.config.num_hidden_layers, model.config.num_layers_with_mtp))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    student = DeepseekV3.from_pretrained(out / "student" / "model", backend="auto")
    records = logs["pretrain"]
    first, last = records[0], records[-1]
    violations = [record["max_violation"] for record in records]
    return {
        "dsv3": metadata.version("dsv3"),
        "seed": config.seed,
        "machine": machine(),
        "data": {tokens.name: {split: tokens.count(split) for split in ("train", "validation")} for tokens in data},
        "parameters": {
            "main": sum(size for name, size in sizes.items() if not name.startswith(mtp)),
            "mtp": sum(size for name, size in sizes.items() if name.startswith(mtp)),
        },
        "student_parameters": student.num_parameters(),
        "steps": last["step"] + 1,
        "tokens": last["tokens"],
        "tokens_per_second": round(last["tokens_per_second"]),
        "processes": facts["processes"],
        "skipped_steps": last["skipped_steps"],
        "loss": {"before": first["loss"], "after": last["loss"]},
        "bits_per_byte": {
            name: {"before": values[0][1], "after": values[-1][1]} for name, values in validations(records).items()
        },
        "expert_max_violation": {"peak": max(violations), "end": sum(violations[-LAST:]) / len(violations[-LAST:])},
        "completions": complete(model, tokenizer, config),
        "zero": {
            "steps": len(logs["zero"]),
            "samples": sum(record["groups"] for record in logs["zero"]) * facts["group_size"],
            "right": [record["rewards/accuracy_exact/mean"] for record in logs["zero"]],
        },
        "reasoning": dict(measured),
        "gains": {
            "grpo": gain(measured["grpo"], measured["sft"]),
            "student": gain(measured["student"], measured["baseline"]),
        },
        "seconds": facts["seconds"] | {"total": round(sum(facts["seconds"].values()), 1)},
    }


def gain(after: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Accuracy gained, greedy, with the 95 % interval over the problems, which are the same in both."""
    low, high = paired_interval(after["right"], before["right"])
    value = after["greedy"]["accuracy"] - before["greedy"]["accuracy"]
    return {"accuracy": value, "interval": [low, high], "wanted": WANTED, "enough": value >= WANTED}


def complete(model: DeepseekV3, tokenizer: Tokenizer, config: PretrainConfig) -> list[dict[str, str]]:
    """{"prompt", "text"} for each prompt of the settings: how the model goes on with it."""
    prompts = config.sample.prompts
    params = SamplingParams(
        temperature=0.6, top_p=0.95, seed=config.seed, max_tokens=COMPLETION_TOKENS, stop_token_ids=(tokenizer.eos_id,)
    )
    ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    completions = make_rollout(model).generate(ids, params)
    texts = [tokenizer.decode(completion.token_ids, skip_special=True) for completion in completions]
    return [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]


def report_lines(report: dict[str, Any], out: str) -> Iterator[str]:
    """The report for a person; `out` as the person wrote it."""
    parameters, seconds = report["parameters"], round(report["seconds"]["total"])
    yield (
        f"\nA DeepSeek-V3 of {parameters['main']:,} parameters, and {parameters['mtp']:,} in its MTP module, trained "
        f"from nothing to short chains of thought in {seconds // 60}:{seconds % 60:02d} minutes"
    )
    for name, value in report["bits_per_byte"].items():
        yield f"  held-out {name}: {value['before']:.2f} -> {value['after']:.2f} bits per byte"
    load = report["expert_max_violation"]
    yield f"  busiest expert over the mean: {load['peak']:+.0%} at the worst step -> {load['end']:+.0%} at the end"
    for name, (before, after) in {"GRPO": ("sft", "grpo"), "the student": ("baseline", "student")}.items():
        scores = [report["reasoning"][key]["greedy"]["accuracy"] for key in (before, after)]
        found = report["gains"][after]
        low, high = found["interval"]
        yield (
            f"  held-out problems right, {name}: {scores[0]:.1%} -> {scores[1]:.1%} "
            f"({100 * found['accuracy']:+.1f} points, 95% interval {100 * low:+.1f} to {100 * high:+.1f})"
            + ("" if found["enough"] else f"; {100 * WANTED:.0f} were wanted, try another --seed")
        )
    model = shlex.quote(f"{out}/model")
    yield f"\nAll of it, honestly read: {out}/report.html. Next:"
    yield f"  dsv3 chat {model}    # ask it: What is 3+7-5? It knows little else"
    yield f"  dsv3 generate {shlex.quote(f'{out}/pretrain/model')} --prompt 'import '    # the base model"


def machine() -> dict[str, Any]:
    backend = activate_backend("auto")
    return {
        "platform": platform.platform(),
        "cpu": torch.cpu.get_capabilities().get("cpu_name", platform.processor() or platform.machine()),
        "cores": usable_cores(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "backend": backend.name,
    }
