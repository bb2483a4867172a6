"""What is wrong with a pre-training run is said in one line, with exit code 2, and nothing that was there is lost."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pretraining as tiny
import pytest

from dsv3 import backends, cli
from dsv3.core.tokenizer import Tokenizer
from dsv3.training import checkpointing
from dsv3.training.checkpointing import verify
from dsv3.training.metrics import MetricsLog, read_metrics

pytestmark = pytest.mark.slow  # whole runs, with their checkpoints and logs


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.prepare_data(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    with backends.use_backend("cpu"):
        yield


def error_of(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The line that a run ends with; others before it, of what went well, are no errors."""
    capsys.readouterr()
    assert cli.main(["train", "pretrain", *map(str, argv), "--backend", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert [line for line in lines if "rror" in line or "Traceback" in line] == lines[-1:]
    assert lines[-1].startswith("dsv3: error: ")
    return lines[-1].removeprefix("dsv3: error: ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rate=1", "unknown key optim.learning_rate"),
        ("optim.warmup_step=1", "unknown key optim.warmup_step; did you mean optim.warmup_steps?"),
        ("model.hiden_size=64", "unknown key model.hiden_size; did you mean model.hidden_size?"),
        ("lenght=5", "unknown key lenght; did you mean length?"),
        ("optim.lr=fast", "optim.lr must be a number, not 'fast'"),
        ("batch.sequences=0", "batch.sequences must be at least 1"),
        ("length=10 weeks", "length must read like"),
        ("model.base=dsv3-3m", "dsv3-3m"),
        ("model.num_experts_per_tok=99", "num_experts_per_tok"),
        ("model.vocab_size=300", "the tokenizer has 400 tokens, model.vocab_size is 300: raise it"),
        ("data.seq_len=65", "data.seq_len is 65, the model's context 64: shorten it"),
        ("data.sources={}", "data.sources is empty"),
        ('data.sources={"no/such/data" = 1}', "no/such/data holds no prepared source (no manifest.json): prepare it"),
        ("tokenizer=no/such/tokenizer", "no/such/tokenizer"),
        ('tokenizer=""', "tokenizer is not set"),
        ("balance.gamma_until=5 miles", "balance.gamma_until must read like"),
        ("precision=fp8", "precision must be one of fp32, bf16, not 'fp8'"),
        ("optim.lr", "override 'optim.lr' must read key=value"),
    ],
)
def test_wrong_settings_are_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    config = tiny.write(tiny.config_of(data, tmp_path / "run"))
    assert message in error_of(capsys, config, override)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_settings_file_that_is_not_there_or_not_toml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot read settings nothing.toml: No such file or directory" in error_of(capsys, "nothing.toml")
    message = error_of(capsys, "nothing")
    assert message.startswith("nothing: no such file, and no shipped configuration (example, moonlight-small, quickst")
    (tmp_path / "bad.toml").write_text("length = = 3\n")
    assert str(tmp_path / "bad.toml") in error_of(capsys, tmp_path / "bad.toml")
    assert "Is a directory" in error_of(capsys, tmp_path)


def test_data_of_another_tokenizer_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Tokenizer.train(["other words, other pieces\n"] * 9, 380).save(tmp_path / "other")
    config = tiny.write(tiny.config_of(data, tmp_path / "run"))
    message = error_of(capsys, config, f"tokenizer={tmp_path}/other")
    assert f"{data}/data/code was prepared with another tokenizer than {tmp_path}/other: prepare it again" in message


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_corrupt_shard_is_named(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    shutil.copytree(data, tmp_path / "copy")
    shard = tmp_path / "copy" / "data" / "code" / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[99] ^= 1
    if damage == "delete":
        shard.unlink()
    else:
        shard.write_bytes(content if damage == "flip" else content[:-7])
    message = error_of(capsys, tiny.write(tiny.config_of(tmp_path / "copy", tmp_path / "run")))
    assert f"shard {shard} is {'missing' if damage == 'delete' else 'damaged'}" in message
    assert "prepare the data again" in message


def test_a_run_directory_that_cannot_be_one(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    message = error_of(capsys, tiny.write(tiny.config_of(data, tmp_path / "run")), f"run_dir={tmp_path / 'file'}")
    assert message == f"run_dir {tmp_path / 'file'} cannot be made (File exists): choose another"
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_goes_on_under_its_own_settings_only(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.write(tiny.config_of(data, tmp_path / "run", "length=2 steps"))
    assert cli.main(["train", "pretrain", str(config), "--backend", "cpu"]) == 0
    for override in ("seed=1", "model.hidden_size=48", "data.seq_len=16", "precision=bf16", "ema_decay=0.5"):
        message = error_of(capsys, config, override)
        assert f"this run was started with {override.split('=')[0]} = " in message
        assert "put it back, or give the new run another run_dir" in message
    assert cli.main(["train", "pretrain", str(config), "length=3 steps", "optim.lr=1e-3", "--backend", "cpu"]) == 0
    err = capsys.readouterr().err
    assert "note: optim.lr has changed since the checkpoint" in err
    assert "note: length has changed since the checkpoint" in err
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 3


def test_data_that_has_changed_since_the_checkpoint_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.write(tiny.config_of(data, tmp_path / "run", "length=1 steps"))
    assert cli.main(["train", "pretrain", str(config), "--backend", "cpu"]) == 0
    state = tiny.newest_checkpoint(tmp_path / "run") / "state.json"
    manifest = state.with_name("manifest.json")
    other = json.loads(state.read_text()) | {"data": "other"}
    state.write_text(json.dumps(other))
    files = json.loads(manifest.read_text())["files"] | {"state.json": checkpointing._account(state)}
    manifest.write_text(json.dumps({"files": files, "sha256": checkpointing._digest(files)}))
    assert f"the data of {tmp_path / 'run'} has changed since its checkpoint: restore it" in error_of(capsys, config)


# --- a full disk ---


def fill(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, after: int) -> None:
    """From the call `after` on, `method` finds the disk full."""
    calls, real = iter(range(10**9)), getattr(owner, method)

    def full(*args: object, **named: object) -> object:
        if next(calls) >= after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **named)

    monkeypatch.setattr(owner, method, full)


def test_a_full_disk_keeps_the_checkpoint_before_and_the_run_goes_on_from_it(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.run(data, tmp_path / "whole")
    config = tiny.write(tiny.config_of(data, tmp_path / "run"))
    tensors = sum(1 for name in tiny.outcome(tmp_path / "whole") if " " in name)
    with monkeypatch.context() as patch:
        fill(patch, checkpointing.ShardWriter, "write", tensors + tensors // 2)  # in the middle of the second one
        message = error_of(capsys, config)
    assert f"{tmp_path / 'run' / 'checkpoints' / 'step-00000004'}: the disk is full" in message
    assert "make room or choose another place" in message
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["latest", "step-00000002"]
    assert verify(tiny.newest_checkpoint(tmp_path / "run")).step == 2
    assert cli.main(["train", "pretrain", str(config), "--backend", "cpu"]) == 0
    assert tiny.differences(tiny.outcome(tmp_path / "run"), tiny.outcome(tmp_path / "whole")) == []


def test_a_full_disk_under_the_log_is_one_line_too(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(monkeypatch, MetricsLog, "write", 3)
    message = error_of(capsys, tiny.write(tiny.config_of(data, tmp_path / "run")))
    assert message == f"{tmp_path / 'run'}: the disk is full; make room and run the same command to go on"
    assert verify(tiny.newest_checkpoint(tmp_path / "run")).step == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount file systems")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_is_really_full_is_one_line_too(
    data: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = small_disk / "run"
    config = tiny.write(tiny.config_of(data, run_dir, "checkpoint.keep=9"))
    assert "the disk is full" in error_of(capsys, config)
    saved = sorted((run_dir / "checkpoints").glob("step-*"))
    assert saved and all(verify(path) for path in saved)
    assert not list(run_dir.rglob("*.tmp*"))
