"""Checkpoints of a run: exact, whole or absent, and never silently damaged."""

import errno
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dsv3.errors import UserError
from dsv3.training import checkpointing
from dsv3.training.checkpointing import Checkpoints, model_tensors, verify
from dsv3.training.config import PretrainConfig

CONFIG = PretrainConfig(seed=7)


def tensors(seed: int = 0) -> dict[str, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return {
        "model": {"w": torch.randn(4, 6, generator=g).bfloat16(), "gate.bias": torch.randn(3, generator=g)},
        "optimizer": {"steps": torch.tensor(seed, dtype=torch.float64), "exp_avg.w": torch.randn(4, 6, generator=g)},
    }


def save(checkpoints: Checkpoints, step: int) -> Path:
    return checkpoints.save(step, tensors(step), {"sequences": 16 * step}, CONFIG.to_toml())


def test_what_is_saved_comes_back_to_the_bit(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 150)
    saved = checkpoints.newest()
    assert saved is not None
    assert (saved.step, saved.state["sequences"]) == (150, 2400)
    assert PretrainConfig.from_dict(saved.config) == CONFIG
    live = tensors(0)
    saved.restore(live)
    for group, named in tensors(150).items():
        assert all(torch.equal(live[group][name], tensor) for name, tensor in named.items())
    assert (tmp_path / "latest").read_text() == "step-00000150\n"


def test_only_the_newest_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    (tmp_path / "step-00000001.tmp-elsewhere-1").mkdir()  # of writers that were killed
    (tmp_path / ".latest.tmp-1-abcd").touch()
    for step in (5, 10, 20, 100):
        save(checkpoints, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000020", "step-00000100"]
    save(checkpoints, 100)  # written again by a run that went back
    assert verify(tmp_path / "step-00000100").step == 100


def test_an_empty_place_has_no_checkpoint(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none").newest() is None


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_is_seen_and_the_checkpoint_before_is_used(tmp_path: Path, data: st.DataObject) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    newest = save(checkpoints, 2)
    file = data.draw(st.sampled_from(sorted(newest.iterdir())))
    content = bytearray(file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    said: list[str] = []
    saved = checkpoints.newest(said.append)
    if saved is not None and saved.step == 2:  # a flip may only have changed white space of the manifest
        assert file.name == "manifest.json"
        return
    assert saved is not None
    assert saved.step == 1
    assert len(said) == 1
    assert "going back to step-00000001" in said[0]
    assert "\n" not in said[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [("model.safetensors", "truncated"), ("state.json", "truncated"), ("manifest.json", "damaged")],
)
def test_a_truncated_file_is_named(tmp_path: Path, name: str, message: str) -> None:
    path = save(Checkpoints(tmp_path), 1)
    (path / name).write_bytes((path / name).read_bytes()[:-9])
    with pytest.raises(UserError, match=f"{name} is {message}"):
        verify(path)
    with pytest.raises(UserError, match="no older checkpoint verifies: remove"):
        Checkpoints(tmp_path).newest()
    (path / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        verify(path)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)

    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpointing.ShardWriter, "write", no_room)
    with pytest.raises(UserError, match="the disk is full"):
        save(checkpoints, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]
    saved = checkpoints.newest()
    assert saved is not None
    assert saved.step == 1


def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    saved = checkpoints.newest()
    assert saved is not None
    with pytest.raises(UserError, match="has no ema"):
        saved.restore({"ema": {}})
    with pytest.raises(UserError, match=r"model.safetensors: 'w' is torch.bfloat16 \[4, 6\], this run needs"):
        saved.restore({"model": {"w": torch.zeros(6, 4), "gate.bias": torch.zeros(3)}})


def test_shared_weights_are_kept_once_and_scratch_buffers_not_at_all(tmp_path: Path) -> None:
    net = nn.Module()
    net.embed, net.head, net.norm = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False), nn.BatchNorm1d(3)
    net.head.weight = net.embed.weight
    net.register_buffer("scratch", torch.zeros(2), persistent=False)
    names = model_tensors(net).keys()
    assert "embed.weight" in names
    assert "norm.running_mean" in names
    assert not {"head.weight", "scratch"} & names
