"""A pre-training run small enough for tests: its data, its settings, and ways to run it.

As a script, `pretraining.py CONFIG.toml` runs it as `dsv3 train pretrain` does and notes in RUN_DIR/order-RANK.tsv
which samples this process trained on.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dsv3 import backends
from dsv3.core.tokenizer import Tokenizer
from dsv3.training.config import PretrainConfig
from dsv3.training.data.loader import BatchStream
from dsv3.training.data.prepare import prepare
from dsv3.training.data.sources import Document, MemorySource
from dsv3.training.metrics import read_metrics
from dsv3.training.pretrain import pretrain

VOCABULARY = 400
CONTEXT = 64
TIMED = ("tokens_per_second", "mfu")  # what two equal runs may differ in


def texts(count: int = 60) -> list[str]:
    return [f"def f{n}(x):\n    return x + {n}\n\n" + "a cat is a cat;\n\n" * (n % 7) for n in range(count)]


def prepare_data(folder: Path) -> Path:
    """`folder`/tokenizer and `folder`/data/code."""
    tokenizer = Tokenizer.train(texts(), VOCABULARY)
    tokenizer.save(folder / "tokenizer")
    documents = [Document(str(n), text) for n, text in enumerate(texts())]
    prepare([MemorySource("code", documents)], tokenizer, folder / "data", validation_fraction=0.2)
    return folder


def config_of(data: Path, run_dir: Path, *overrides: str) -> PretrainConfig:
    """The settings of a run on what `prepare_data` left in `data`: all parts of the recipe, as small as they get."""
    path = run_dir.with_suffix(".toml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"""
        run_dir = "{run_dir}"
        length = "6 steps"
        tokenizer = "{data}/tokenizer"
        init_std = 0.05
        ema_decay = 0.9
        [model]
        base = "dsv3-2m"
        vocab_size = {VOCABULARY}
        hidden_size = 32
        intermediate_size = 40
        moe_intermediate_size = 16
        num_hidden_layers = 2
        max_position_embeddings = {CONTEXT}
        [data]
        sources = {{ "{data}/data/code" = 1 }}
        validation = {{ code = "{data}/data/code" }}
        seq_len = 32
        split_rate = 0.1
        [optim]
        lr = 3e-3
        warmup_steps = 3
        schedule = [{{ shape = "cosine", until = "100%", lr = 1e-4 }}]
        [batch]
        sequences = 4
        micro_batch = 4
        [eval]
        batches = 1
        [checkpoint]
        every = 2
        keep = 2
    """)
    return PretrainConfig.load(path, overrides)


def write(config: PretrainConfig) -> Path:
    path = Path(config.run_dir).with_suffix(".toml")
    path.write_text(config.to_toml())
    return path


def run(data: Path, run_dir: Path, *overrides: str) -> list[dict[str, Any]]:
    """Train in this process, on the CPU; returns what was logged."""
    with backends.use_backend("cpu"):
        pretrain(config_of(data, run_dir, *overrides), "cpu")
    return read_metrics(run_dir / "metrics.jsonl")


def newest_checkpoint(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / (run_dir / "checkpoints" / "latest").read_text().strip()


def outcome(run_dir: Path) -> dict[str, Any]:
    """What must not depend on interruptions: the last checkpoint's tensors as bytes, the log, and the samples."""
    checkpoint = newest_checkpoint(run_dir)
    result: dict[str, Any] = {"step": json.loads((checkpoint / "state.json").read_text())}
    for file in sorted(checkpoint.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            result[f"{file.stem} {name}"] = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    records = read_metrics(run_dir / "metrics.jsonl")
    result["log"] = [{key: value for key, value in record.items() if key not in TIMED} for record in records]
    samples = run_dir / "samples.tsv"
    return result | {"samples": samples.read_text() if samples.exists() else ""}


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Names of the parts in which two outcomes differ."""
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def command(*argv: object, processes: int = 0) -> list[str]:
    """The command line that runs `dsv3 ARGV`, under torchrun on so many processes if any are asked for."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes else []
    return [sys.executable, *torchrun, "-m", "dsv3", *map(str, argv), "--backend", "cpu"]


def start(argv: list[str], **options: Any) -> subprocess.Popen[str]:
    """A process with one thread, so that its sums have one order, and its stderr to read."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env=environment, **options)


def finish(argv: list[str]) -> str:
    """Run a command to its end, which must be a good one. Returns what it said to the person."""
    process = start(argv)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return err


def wait_for_line(process: subprocess.Popen[str], pattern: str) -> str:
    """Read the process's stderr up to a line in which `pattern` is found."""
    assert process.stderr is not None
    read = []
    for line in process.stderr:
        if re.search(pattern, line):
            return line
        read.append(line)
    raise AssertionError(f"{process.args} ended with {process.wait()} before a line with {pattern!r}:\n{''.join(read)}")


def _noting(directory: Path) -> None:
    """Have every training batch leave a line "first sample, count" in the order's file of this process."""
    batch, rank = BatchStream.batch, os.environ.get("RANK", "0")

    def noted(self: BatchStream, first: int, count: int) -> Any:
        with open(directory / f"order-{rank}.tsv", "a") as file:
            file.write(f"{first}\t{count}\n")
        return batch(self, first, count)

    BatchStream.batch = noted  # type: ignore[method-assign]


if __name__ == "__main__":
    from dsv3 import cli

    directory = Path(PretrainConfig.load(sys.argv[1]).run_dir)
    directory.mkdir(parents=True, exist_ok=True)
    _noting(directory)
    sys.exit(cli.main(["train", "pretrain", sys.argv[1], "--backend", "cpu"]))
