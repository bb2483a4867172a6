"""A fine-tuning run that is killed, stopped or run by two processes ends as if nothing had happened."""

import signal
import time
from pathlib import Path

import finetuning
import pretraining as tiny
import pytest
import torch
from safetensors.torch import load_file

from dsv3.training.checkpointing import verify
from dsv3.training.metrics import read_metrics
from dsv3.training.sft.config import SftConfig

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetuning.prepare(tmp_path_factory.mktemp("sft"))


def command(config: SftConfig, processes: int = 0) -> list[str]:
    return tiny.command("train", "sft", finetuning.write(config), processes=processes)


@pytest.mark.parametrize("lora", [0, 4])
def test_a_run_killed_twice_ends_as_the_uninterrupted_one(data: Path, tmp_path: Path, lora: int) -> None:
    options = ("steps=30", "checkpoint.every=3", "ema_decay=0.9", "data.held_out=0.1", "eval.every=7",
               "batch.samples=0", "batch.tokens=512", f"lora.rank={lora}")  # fmt: skip
    tiny.finish(command(finetuning.config_of(data, tmp_path / "whole", *options)))
    expected = tiny.outcome(tmp_path / "whole")
    killed = command(finetuning.config_of(data, tmp_path / "killed", *options))
    log = tmp_path / "killed" / "metrics.jsonl"
    for steps in (5, 14):  # between two checkpoints, each time
        process = tiny.start(killed)
        while process.poll() is None and len(read_metrics(log)) < steps:
            time.sleep(0.002)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was not killed before its end"
    tiny.finish(killed)
    assert tiny.differences(tiny.outcome(tmp_path / "killed"), expected) == []
    for name in ("model", "model-ema", *(["adapter", "adapter-ema"] if lora else [])):
        for file in (tmp_path / "whole" / name).glob("*.safetensors"):
            assert (tmp_path / "killed" / name / file.name).read_bytes() == file.read_bytes()


def test_a_signal_saves_a_checkpoint_and_exits_0(data: Path, tmp_path: Path) -> None:
    process = tiny.start(command(finetuning.config_of(data, tmp_path / "run", "steps=100000", "optim.schedule=[]")))
    tiny.wait_for_line(process, "step 1/")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped by SIGTERM before step" in err
    saved = verify(tiny.newest_checkpoint(tmp_path / "run"))
    assert saved.step == len(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("batch", [(), ("batch.samples=0", "batch.tokens=512", "batch.normalise=samples")])
def test_two_processes_learn_what_one_does(data: Path, tmp_path: Path, batch: tuple[str, ...]) -> None:
    options = ("balance.alpha=0.01", "balance.gamma=0.001", "data.held_out=0.2", *batch)
    for name, processes in (("one", 0), ("two", 2)):
        tiny.finish(command(finetuning.config_of(data, tmp_path / name, *options), processes))
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "balance_loss", "grad_norm", "validation/held-out"):
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=1e-3), key
        assert (a["tokens"], a["batch_learnt"]) == (b["tokens"], b["batch_learnt"])
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0.05, atol=2e-3)


def test_an_error_in_the_data_ends_all_processes_with_one_line(data: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "robot", "content": "x"}]}\n')
    argv = command(finetuning.config_of(data, tmp_path / "run", f'data.train=["{bad}"]'), processes=2)
    process = tiny.start(argv)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert f"dsv3: error: {bad}, line 1: message 0 has the unknown role 'robot'" in err
