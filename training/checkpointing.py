"""Checkpoints of a training run: everything an exact resume needs, whole or not there at all, every byte accounted for.

    checkpoints/step-00000150/   model.safetensors  optimizer.safetensors  ema.safetensors   live tensors by name
                                 state.json         position in the run and whatever else the loop keeps
                                 config.toml        resolved settings
                                 manifest.json      bytes and sha256 of each of the files above, and of this list
    checkpoints/latest           name of the newest one

Random numbers of a run are derived from its seed and the step, so no generator state is kept.
"""

import hashlib
import json
import shutil
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..core.files import atomic_directory, atomic_write
from ..core.safetensors_file import ShardWriter, read_header
from ..errors import UserError
from .optim import check_tensors

MANIFEST = "manifest.json"
OWNED = ("*.safetensors", "*.json", "*.toml")


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk whose bytes are verified. state: what the loop saved; config: the settings as a dict."""

    path: Path
    step: int
    state: dict[str, Any]
    config: dict[str, Any]

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Read each group of tensors in place. UserError where names, shapes or dtypes are not those of this run."""
        for group, live in tensors.items():
            file = self.path / f"{group}.safetensors"
            if not file.exists():
                raise UserError(f"{self.path} has no {group}: it was saved by a run with other settings")
            stored = {tensor.name: tensor for tensor in read_header(file)}
            check_tensors(live, {name: (t.dtype, t.shape) for name, t in stored.items()}, str(file))
            for name, tensor in live.items():
                own = tensor.detach()
                if own.device.type == "cpu" and own.is_contiguous():
                    stored[name].read(own)
                else:
                    own.copy_(stored[name].read())


class Checkpoints:
    """The checkpoints of one run. One process writes; any may read."""

    def __init__(self, directory: str | Path, keep: int = 3) -> None:
        self.directory, self.keep = Path(directory), keep

    def save(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], config_toml: str
    ) -> Path:
        """Write the checkpoint of the run's state before `step` and delete all but the newest `keep`.

        tensors: group -> name -> float tensor of any device, one file a group. state: anything json keeps. Errors:
        UserError for a full or unwritable disk; what was there before is then untouched.
        """
        target = self.directory / f"step-{step:08d}"
        needed = sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
        with atomic_directory(target, owned=OWNED, needed=needed) as temporary:
            for group, named in tensors.items():
                _write_tensors(temporary / f"{group}.safetensors", named)
            (temporary / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
            (temporary / "config.toml").write_text(config_toml, encoding="utf-8")
            files = {file.name: _account(file) for file in sorted(temporary.iterdir())}
            (temporary / MANIFEST).write_text(json.dumps({"files": files, "sha256": _digest(files)}, indent=1))
        with atomic_write(self.directory / "latest", "w") as pointer:
            pointer.write(target.name + "\n")
        self._prune()
        return target

    def newest(self, say: Callable[[str], None] = print) -> Saved | None:
        """The newest checkpoint that verifies, or None where there is none. Tells `say` of each one passed over.

        UserError where there are checkpoints but every one of them is damaged.
        """
        damage: list[str] = []
        for path in reversed(self._list()):
            try:
                saved = verify(path)
            except UserError as error:
                damage.append(str(error))
                continue
            for line in damage:
                say(f"{line}; going back to {path.name}")
            return saved
        if damage:
            raise UserError(f"{damage[0]}; no older checkpoint verifies: remove {self.directory} to start anew")
        return None

    def _list(self) -> list[Path]:
        found = [path for path in self.directory.glob("step-*") if path.is_dir() and path.name[5:].isdigit()]
        return sorted(found, key=lambda path: int(path.name[5:]))

    def _prune(self) -> None:
        kept = self._list()
        for path in kept[: -self.keep]:
            shutil.rmtree(path)
        # Of writers that were killed; nobody else writes here.
        for path in self.directory.glob("step-*.tmp-*"):
            if path.name.split(".")[0] < kept[-1].name:
                shutil.rmtree(path)
        for path in self.directory.glob(".latest.tmp-*"):
            path.unlink()


def verify(path: Path) -> Saved:
    """Check every byte of a checkpoint. UserError names the first file that is missing, cut short or altered."""
    manifest = _read_json(path, MANIFEST)
    files = manifest.get("files", {})
    if _digest(files) != manifest.get("sha256"):
        raise UserError(f"checkpoint {path}: {MANIFEST} is damaged")
    for name, expected in files.items():
        if not (path / name).is_file():
            raise UserError(f"checkpoint {path}: {name} is missing")
        size = (path / name).stat().st_size
        if size != expected["bytes"]:
            raise UserError(
                f"checkpoint {path}: {name} is truncated or altered ({size} bytes, not {expected['bytes']})"
            )
        if _account(path / name) != expected:
            raise UserError(f"checkpoint {path}: {name} is damaged (its sha256 is not the one in {MANIFEST})")
    state = _read_json(path, "state.json")
    return Saved(path, state["step"], state, tomllib.loads((path / "config.toml").read_text(encoding="utf-8")))


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint keeps of a model: parameters, shared ones once, and persistent buffers."""
    persistent = model.state_dict(keep_vars=True)
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return {**dict(model.named_parameters()), **buffers}


def _write_tensors(path: Path, named: Mapping[str, Tensor]) -> None:
    writer = ShardWriter(path, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in named.items()})
    try:
        for name, tensor in named.items():
            writer.write(name, tensor.detach().cpu().contiguous())
    finally:
        writer.close()


def _account(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _digest(files: Any) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        values = json.loads((path / name).read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"checkpoint {path}: {name} is missing") from None
    except ValueError:
        raise UserError(f"checkpoint {path}: {name} is damaged") from None
    return values if isinstance(values, dict) else {}
