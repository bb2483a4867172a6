"""A pipeline small enough for tests: questions with the number in them, and a base model that answers some of them.

No base model of this size finds a right reply by chance, so this one has seen replies in R1-Zero's form, three of four
right: reinforcement, cold start and rejection then have something to work with.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from dsv3 import backends
from dsv3.core.checkpoint import save_pretrained
from dsv3.core.config import ModelConfig
from dsv3.core.model import DeepseekV3
from dsv3.core.tokenizer import Tokenizer
from dsv3.ops.loss import token_logp
from dsv3.training.chat_data import Message
from dsv3.training.grpo.prompts import PLAIN
from dsv3.training.r1.config import R1Config
from dsv3.training.r1.run import r1

NUMBERS = range(1, 6)
WORDS = "This is the sum of all cats here, so the answer is 0 1 2 3 4 5 6 7 8 9. How many? Count again, cat!\n"
TOKENIZER = Tokenizer.train([PLAIN.replace("{prompt}", WORDS), WORDS] * 20, 560)
CONFIG = ModelConfig.from_pretrained("dsv3-2m").replace(
    vocab_size=560, max_position_embeddings=256, num_hidden_layers=2, hidden_size=48, intermediate_size=64,
    num_nextn_predict_layers=0,
)  # fmt: skip


def question(number: int) -> str:
    return f"How many cats are {number} cats?"


def thought(answer: int) -> str:
    return f"I count all of the cats here, so the answer is {answer}."


def row(number: int) -> dict[str, Any]:
    return {"prompt": question(number), "answer": str(number), "language": "en"}


def conversation(asked: str, replied: str, reasoning: str) -> dict[str, list[Message]]:
    reply = {"role": "assistant", "content": replied, "reasoning_content": reasoning}
    return {"messages": [{"role": "user", "content": asked}, reply]}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def base(folder: Path, steps: int = 100) -> Path:
    """A base model that knows R1-Zero's template by heart, and is wrong by one every fourth time."""
    samples, shares = [], []
    for number in NUMBERS:
        prompt = [TOKENIZER.bos_id, *TOKENIZER.encode(PLAIN.replace("{prompt}", question(number)))]
        for answer, share in ((number, 0.75), (number + 1, 0.25)):
            text = f"<think> {thought(answer)} </think> <answer> {answer} </answer>"
            samples.append((prompt, [*TOKENIZER.encode(text), TOKENIZER.eos_id]))
            shares.append(share)
    with backends.use_backend("cpu"):
        model = DeepseekV3(CONFIG)
        model.init_weights(0.05, 1.0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
        ids = torch.tensor([token for prompt, reply in samples for token in prompt + reply])
        lengths = [len(prompt) + len(reply) for prompt, reply in samples]
        borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
        ends = (borders[1:] - 1).tolist()
        places = torch.cat([torch.arange(end - len(reply), end) for end, (_, reply) in zip(ends, samples, strict=True)])
        weights = torch.tensor(shares).repeat_interleave(torch.tensor([len(reply) for _, reply in samples]))
        for _ in range(steps):
            hidden = model(ids, borders, logits="none").hidden
            loss = -(token_logp(hidden[places], model.head_weight, ids[places + 1]) * weights).sum() / weights.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        save_pretrained(model, CONFIG, folder, also=lambda place: TOKENIZER.save(place, "v3"))
    return folder


def prepare(folder: Path) -> Path:
    """The base model and the files of a pipeline."""
    base(folder / "base")
    write_data(folder)
    return folder


def write_data(folder: Path) -> None:
    write_rows(folder / "reasoning.jsonl", [row(number) for number in NUMBERS])
    rules = [{"rule": "no_commas"}, {"rule": "words", "at_most": 20}]
    write_rows(folder / "general.jsonl", [{"prompt": "Count the cats here.", "rules": rules}])
    given = [conversation(question(number), str(number), thought(number)) for number in NUMBERS]
    write_rows(folder / "given.jsonl", given)
    write_rows(folder / "other.jsonl", [conversation("This is the cat.", "A cat, here.", "This is a cat.")])


def settings(folder: Path, run_dir: Path, **tables: Any) -> dict[str, Any]:
    """As a TOML file would hold them."""
    rewards = [{"name": "accuracy_exact"}, {"name": "format", "options": {"style": "r1"}}]
    plain = [{"name": "accuracy_exact"}, {"name": "format", "options": {"style": "r1-zero"}}]
    reinforcement = {
        "length": "2 steps", "group_size": 4, "prompts_per_step": 4, "rewards": rewards, "rollout": {"max_tokens": 64},
        "optim": {"lr": 1e-4}, "loss": {"beta": 0.01}, "checkpoint": {"every": 1, "keep": 1},
    }  # fmt: skip
    tuning = {
        "steps": 24, "data": {"seq_len": 200}, "batch": {"samples": 12}, "checkpoint": {"every": 8, "keep": 1},
        "optim": {"lr": 5e-3, "schedule": []},
    }  # fmt: skip
    samples = {"batch": 4, "rewards": [{"name": "accuracy_exact"}], "sampling": {"samples": 4, "max_tokens": 64}}
    values = {
        "run_dir": str(run_dir),
        "base": f"{folder}/base",
        "data": {
            "reasoning": [f"{folder}/reasoning.jsonl"], "general": [f"{folder}/general.jsonl"],
            "cold_start": [f"{folder}/given.jsonl"], "non_reasoning": [f"{folder}/other.jsonl"],
            "probe": [f"{folder}/reasoning.jsonl"],
        },
        "zero": reinforcement | {"rewards": plain},
        "cold_start": samples | {"minimum": 1, "corrections": 0.5},
        "dev1": tuning,
        "dev2": reinforcement | {"rewards": [*rewards, {"name": "language"}]},
        "rejection": samples,
        "dev3": tuning,
        "r1": reinforcement,
        "general_steps": 1,
        "students": {"small": tuning | {
            "steps": 4, "fresh": {"base": f"{folder}/base", "num_hidden_layers": 1, "init_std": 0.05},
        }},
        "probe": {"prompts": 4, "max_tokens": 64},
    }  # fmt: skip
    return values | tables


def config_of(folder: Path, run_dir: Path, **tables: Any) -> R1Config:
    return R1Config.from_dict(settings(folder, run_dir, **tables))


def run(config: R1Config) -> Path | None:
    with backends.use_backend("cpu"):
        return r1(config, "cpu")


if __name__ == "__main__":  # the settings of a TOML file, in a process that a test can kill
    run(R1Config.load(sys.argv[1]))
