"""A run that is killed, stopped or moved to other processes goes on as if nothing had happened."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pretraining as tiny
import pytest

from dsv3.training.checkpointing import verify
from dsv3.training.config import PretrainConfig
from dsv3.training.metrics import read_metrics

READY = "new run in|going on from"
EVERYTHING = ("eval.every=7", "sample.every=5", 'sample.prompts=["def f"]', "sample.max_tokens=4", "checkpoint.every=3")
CONSTANT = ("optim.schedule=[]", "checkpoint.every=0")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.prepare_data(tmp_path_factory.mktemp("prepared"))


def command(config: PretrainConfig, processes: int = 0) -> list[str]:
    return tiny.command("train", "pretrain", tiny.write(config), processes=processes)


# --- SIGKILL ---


@pytest.mark.parametrize(
    ("kills", "steps"), [pytest.param(4, 60, id="4"), pytest.param(24, 200, id="24", marks=pytest.mark.long)]
)
def test_a_run_killed_at_random_moments_ends_as_the_uninterrupted_one(
    data: Path, tmp_path: Path, kills: int, steps: int
) -> None:
    overrides = (*EVERYTHING, f"length={steps} steps")
    process = tiny.start(command(tiny.config_of(data, tmp_path / "whole", *overrides)))
    tiny.wait_for_line(process, READY)
    began = time.monotonic()
    assert process.wait(timeout=300) == 0
    longest = 1.5 * (time.monotonic() - began) / kills
    expected = tiny.outcome(tmp_path / "whole")
    assert len(expected["log"]) == steps and len(expected["samples"].splitlines()) == steps // 5

    moments, done, runs = random.Random(kills), 0, 0
    while done < kills:  # a run that reaches its end before it was killed often enough is followed by another one
        run_dir = tmp_path / f"killed-{runs}"
        argv, runs, ended = command(tiny.config_of(data, run_dir, *overrides)), runs + 1, False
        while done < kills and not ended:
            process = tiny.start(argv)
            tiny.wait_for_line(process, READY)
            try:
                process.communicate(timeout=moments.uniform(0, longest))
                assert process.returncode == 0
                ended = True
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                done += 1
        tiny.finish(argv)
        assert tiny.differences(tiny.outcome(run_dir), expected) == []
        assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == sorted(
            path.name for path in (tmp_path / "whole" / "checkpoints").iterdir()
        )
        assert (run_dir / "model" / "model.safetensors").read_bytes() == (
            tmp_path / "whole" / "model" / "model.safetensors"
        ).read_bytes()


# --- polite signals ---


def stopped_at(run_dir: Path, err: str, name: str) -> int:
    """The step before which the run says it was stopped, once it is checked that its checkpoint is of there."""
    (line,) = [line for line in err.splitlines() if "stopped by" in line]
    step = int(line.split("before step ")[1].split(";")[0])
    assert line == f"stopped by {name} before step {step}; the checkpoint is saved, run the same command to go on"
    saved = verify(tiny.newest_checkpoint(run_dir))
    assert saved.step == step == len(read_metrics(run_dir / "metrics.jsonl"))
    return step


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_saves_a_checkpoint_and_exits_0(data: Path, tmp_path: Path, name: str) -> None:
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    process = tiny.start(command(tiny.config_of(data, stopped, *CONSTANT, "length=100000 steps")))
    tiny.wait_for_line(process, "step 1/")
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    step = stopped_at(stopped, err, name)
    assert not (stopped / "model").exists()
    if name == "SIGTERM":  # and the same command, here with an end that is near, goes on to the bit
        err = tiny.finish(command(tiny.config_of(data, stopped, *CONSTANT, f"length={step + 2} steps")))
        assert f"at step {step} of {step + 2}" in err
        tiny.finish(command(tiny.config_of(data, whole, *CONSTANT, f"length={step + 2} steps")))
        assert tiny.differences(tiny.outcome(stopped), tiny.outcome(whole)) == []


def test_a_second_ctrl_c_ends_the_run_at_once(data: Path, tmp_path: Path) -> None:
    # Batches of many micro-batches: the end of the step is far.
    slow = ("batch.sequences=4000", "batch.micro_batch=1", "length=10 steps")
    process = tiny.start(command(tiny.config_of(data, tmp_path / "run", *slow)))
    tiny.wait_for_line(process, READY)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "dsv3: interrupted\n")


def test_under_torchrun_sigterm_to_the_launcher_saves_a_checkpoint(data: Path, tmp_path: Path) -> None:
    config = tiny.config_of(data, tmp_path / "run", *CONSTANT, "length=100000 steps")
    process = tiny.start(command(config, processes=2))
    tiny.wait_for_line(process, "step 1/")
    process.terminate()
    _, err = process.communicate(timeout=90)
    step = stopped_at(tmp_path / "run", err, "SIGTERM")
    err = tiny.finish(
        command(tiny.config_of(data, tmp_path / "run", *CONSTANT, f"length={step + 1} steps"), processes=2)
    )
    assert f"at step {step} of {step + 1}" in err


# --- other numbers of processes ---


def run_noting_order(config: PretrainConfig, processes: int) -> list[tuple[int, int]]:
    """Run, and return which samples (first, count) each pass took, in the order of the samples."""
    for file in Path(config.run_dir).glob("order-*.tsv"):
        file.unlink()
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    tiny.finish([sys.executable, *torchrun, str(Path(tiny.__file__)), str(tiny.write(config))])
    files = sorted(Path(config.run_dir).glob("order-*.tsv"))
    assert len(files) == processes
    lines = [line.split("\t") for file in files for line in file.read_text().splitlines()]
    return sorted((int(first), int(count)) for first, count in lines)


def samples(passes: list[tuple[int, int]]) -> list[int]:
    return [sample for first, count in passes for sample in range(first, first + count)]


def test_a_run_moves_between_numbers_of_processes(data: Path, tmp_path: Path) -> None:
    def config(name: str, steps: int) -> PretrainConfig:
        return tiny.config_of(data, tmp_path / name, *CONSTANT, f"length={steps} steps", "eval.every=2")

    whole = run_noting_order(config("whole", 6), 1)
    parts = [run_noting_order(config("moved", steps), processes) for steps, processes in ((4, 2), (6, 1))]
    assert samples(whole) == list(range(24))
    assert samples([taken for part in parts for taken in part]) == list(range(24))
    assert parts[0] == [(first, 2) for first in range(0, 16, 2)]
    alone, moved = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "moved"))
    assert [record["step"] for record in moved] == list(range(6))
    for key in ("loss", "mtp_loss", "balance_loss", "grad_norm", "validation/code"):
        # The first step starts from equal weights; later ones from what sums in another order have made of them.
        assert moved[0][key] == pytest.approx(alone[0][key], rel=1e-6 if key != "validation/code" else 1e-4), key
        found = [record[key] for record in moved if key in record]
        assert found == pytest.approx([record[key] for record in alone if key in record], rel=1e-2), key
    assert moved[0]["expert_load"] == alone[0]["expert_load"]
    states = [json.loads((tiny.newest_checkpoint(tmp_path / n) / "state.json").read_text()) for n in ("whole", "moved")]
    assert states[0] == states[1]
