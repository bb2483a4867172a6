"""A run of GRPO small enough for tests: its prompts, its model, its settings, and rewards that are easy to earn."""

import json
from pathlib import Path
from typing import Any

from parity import random_model
from tiny_model import CONFIG, TOKENIZER

from dsv3 import backends
from dsv3.core.checkpoint import save_pretrained
from dsv3.parallel.data import DataParallel
from dsv3.training.grpo.config import GrpoConfig
from dsv3.training.grpo.run import GrpoRun, grpo
from dsv3.training.metrics import read_metrics
from dsv3.training.progress import Progress

SMALL = CONFIG.replace(num_nextn_predict_layers=1)
TIMED = ("time/rollout", "time/reward", "time/update", "rollout_tokens_per_second")


def low_tokens(completion_ids: list[list[int]], **rest: Any) -> list[float]:
    """The share of tokens in the lower half of the vocabulary: about 0.5 before training."""
    return [sum(token < 200 for token in ids) / len(ids) for ids in completion_ids]


def even_rows_only(completion_ids: list[list[int]], n: list[int], **rest: Any) -> list[float]:
    """Says nothing about the completions of odd rows."""
    scores = low_tokens(completion_ids)
    return [0.0 if number % 2 else score for number, score in zip(n, scores, strict=True)]


def raises(**columns: Any) -> list[float]:
    raise ValueError("no scores today")


def rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{n} + 1 = " + "a cat " * (n % 5), "answer": str(n + 1), "n": n} for n in range(count)]


def write_rows(path: Path, given: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in given))
    return path


def prepare(folder: Path, count: int = 24, chat_format: str = "v3") -> Path:
    """`folder`/model and `folder`/prompts.jsonl."""
    model = random_model(SMALL, 0)
    save_pretrained(model, SMALL, folder / "model", also=lambda place: TOKENIZER.save(place, chat_format))
    write_rows(folder / "prompts.jsonl", rows(count))
    return folder


def config_of(folder: Path, run_dir: Path, *overrides: str) -> GrpoConfig:
    path = run_dir.with_suffix(".toml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"""
        run_dir = "{run_dir}"
        model = "{folder}/model"
        length = "4 steps"
        group_size = 4
        prompts_per_step = 4
        micro_batch_tokens = 200
        log_completions = 1
        rewards = [{{ name = "reinforcing:low_tokens" }}]
        [data]
        prompts = ["{folder}/prompts.jsonl"]
        [rollout]
        max_tokens = 8
        [optim]
        lr = 3e-3
        [checkpoint]
        every = 2
        keep = 2
    """)
    return GrpoConfig.load(path, overrides)


def write(config: GrpoConfig) -> Path:
    path = Path(config.run_dir).with_suffix(".toml")
    path.write_text(config.to_toml())
    return path


def opened(config: GrpoConfig, parallel: DataParallel | None = None) -> GrpoRun:
    """A run that has not begun, to be asked for its parts."""
    with backends.use_backend("cpu"):
        run = GrpoRun(config, parallel or DataParallel(), Progress(False))
    run.directory.mkdir(parents=True, exist_ok=True)
    return run


def run(config: GrpoConfig) -> list[dict[str, Any]]:
    """Train in this process, on the CPU; returns what was logged."""
    with backends.use_backend("cpu"):
        grpo(config, "cpu")
    return read_metrics(Path(config.run_dir) / "metrics.jsonl")
