"""A fine-tuning run small enough for tests: its conversations, its models, its settings."""

import json
from pathlib import Path
from typing import Any

from parity import random_model
from tiny_model import CONFIG, TOKENIZER

from dsv3 import backends
from dsv3.core.checkpoint import save_pretrained
from dsv3.training.metrics import read_metrics
from dsv3.training.sft.config import SftConfig
from dsv3.training.sft.run import sft

SMALL = CONFIG.replace(num_nextn_predict_layers=1)


def conversation(number: int) -> dict[str, Any]:
    """One, two or three replies; some longer than others."""
    turns = []
    for turn in range(1 + number % 3):
        turns.append({"role": "user", "content": f"say {number} {turn}"})
        turns.append({"role": "assistant", "content": f"cat {number}" + " and a cat" * (number * 7 % 5)})
    return {"messages": turns}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def prepare(folder: Path, count: int = 40, chat_format: str = "v3") -> Path:
    """`folder`/model, of the family, and `folder`/chats.jsonl."""
    model = random_model(SMALL, 0)
    save_pretrained(model, SMALL, folder / "model", also=lambda place: TOKENIZER.save(place, chat_format))
    write_rows(folder / "chats.jsonl", [conversation(number) for number in range(count)])
    return folder


def config_of(folder: Path, run_dir: Path, *overrides: str) -> SftConfig:
    path = run_dir.with_suffix(".toml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"""
        run_dir = "{run_dir}"
        model = "{folder}/model"
        steps = 6
        [data]
        train = ["{folder}/chats.jsonl"]
        seq_len = 128
        [batch]
        samples = 8
        micro_tokens = 200
        [optim]
        lr = 3e-3
        schedule = [{{ shape = "cosine", until = "100%", lr = 3e-4 }}]
        [checkpoint]
        every = 2
        keep = 2
    """)
    return SftConfig.load(path, overrides)


def write(config: SftConfig) -> Path:
    path = Path(config.run_dir).with_suffix(".toml")
    path.write_text(config.to_toml())
    return path


def run(config: SftConfig) -> list[dict[str, Any]]:
    """Train in this process, on the CPU; returns what was logged."""
    with backends.use_backend("cpu"):
        sft(config, "cpu")
    return read_metrics(Path(config.run_dir) / "metrics.jsonl")
