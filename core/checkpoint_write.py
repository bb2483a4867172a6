"""Writing a checkpoint: plan all names, shapes and files first, then stream one tensor after the other to the disk.

A model and another checkpoint are both sources, so `save_pretrained` and `convert` are the same loop, and neither ever
holds more than one tensor beside what is there already. The directory appears when it is complete (`core/files.py`).
"""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..ops.formats import E4M3
from .checkpoint_read import INDEX, SINGLE, Checkpoint
from .config import ModelConfig
from .files import atomic_directory
from .fp8_checkpoint import all_finite, dequantize_into, quantization_config, quantize, wants_power_of_two
from .linear import Linear
from .names import HFTensor, hf_tensors
from .safetensors_file import ShardWriter

# What a model directory consists of: replaced when a model is saved there again. Anything else there is an error.
OWNED = ("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "README.md", "LICENSE*")
REWRITTEN = ("*.safetensors", "*.safetensors.index.json", "config.json")


class Source(Protocol):
    """Where the tensors come from."""

    def dtype(self, tensor: HFTensor) -> torch.dtype: ...

    def weight(self, tensor: HFTensor) -> Tensor: ...

    def scale(self, tensor: HFTensor) -> Tensor: ...


class _ModelSource:
    """The parameters of a model in memory, with what was added to them (`Linear.merged`)."""

    def __init__(self, model: nn.Module) -> None:
        self._linear = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
        self._tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(
            model.named_buffers(remove_duplicate=False)
        )

    def dtype(self, tensor: HFTensor) -> torch.dtype:
        return self._get(tensor.param).dtype

    def weight(self, tensor: HFTensor) -> Tensor:
        module = self._linear.get(tensor.param.removesuffix(".weight"))
        values = self._get(tensor.param)
        return self._part(tensor, tensor.param, values if module is None else module.merged(), tensor.shape)

    def scale(self, tensor: HFTensor) -> Tensor:
        name = tensor.param.removesuffix("weight") + "weight_scale_inv"
        return self._part(tensor, name, self._get(name), tensor.scale_shape)

    def _part(self, tensor: HFTensor, name: str, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        part = tensor.of(values).detach()
        if tuple(part.shape) != shape:
            raise UserError(f"{name}: the model's is for {list(part.shape)}, the configuration says {list(shape)}")
        return part.cpu().contiguous()

    def _get(self, name: str) -> Tensor:
        if name not in self._tensors or self._tensors[name].is_meta:
            raise UserError(f"{name}: the model has no values for it; load or initialise it before saving")
        return self._tensors[name]


class _CheckpointSource:
    """The tensors of a directory; copies that it does without come from what they repeat."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        self._checkpoint = checkpoint
        self._original = {tensor.param: tensor for tensor in hf_tensors(config) if not tensor.copy}

    def _find(self, tensor: HFTensor) -> HFTensor:
        return tensor if tensor.name in self._checkpoint.tensors else self._original[tensor.param]

    def dtype(self, tensor: HFTensor) -> torch.dtype:
        return self._checkpoint.dtype(self._find(tensor))

    def weight(self, tensor: HFTensor) -> Tensor:
        return self._checkpoint.weight(self._find(tensor))

    def scale(self, tensor: HFTensor) -> Tensor:
        return self._checkpoint.scale(self._find(tensor))


def save_pretrained(
    model: nn.Module,
    config: ModelConfig,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    fp8: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    also: Callable[[Path], None] | None = None,
) -> None:
    """Write `model` in the Hugging Face format: per-expert names, MTP layers with their copies of embedding and head.

    dtype: of the file, but for the gate's bias (float32); None: each parameter as it is, FP8 weights with their scales.
        With a dtype, FP8 weights are dequantised, unless `fp8`.
    fp8: quantise every projection that the published checkpoints quantise, with 128 x 128 block scales.
    max_shard_bytes: a file is closed before it would grow beyond this.
    also: called with the directory before it is moved to its place, to write the tokenizer and the like. Small files of
        a model that is there already (its tokenizer, say) are kept unless this writes them anew.

    The directory replaces one that is there in a single step, and only if that holds nothing but a model. Errors:
    UserError for a full disk, a foreign file in `directory`, and parameters that are missing or not finite.
    """
    _write(_ModelSource(model), config, Path(directory), dtype, fp8, max_shard_bytes, Path(directory), also)


def convert(
    source: str | Path,
    config: ModelConfig,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    fp8: bool = False,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Rewrite the checkpoint at `source` in another format, without building the model; see save_pretrained.

    Memory: one tensor. The tokenizer and other small files come along.
    """
    checkpoint = Checkpoint(source)
    checkpoint.check(config)
    origin = _CheckpointSource(checkpoint, config)
    _write(origin, config, Path(directory), dtype, fp8, max_shard_bytes, checkpoint.directory, None)


@dataclass(frozen=True)
class _Piece:
    """What one tensor of the model becomes in a file: itself, and its scales if it is FP8."""

    tensor: HFTensor
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]]

    @property
    def dtype(self) -> torch.dtype:
        return self.entries[self.tensor.name][0]

    @property
    def nbytes(self) -> int:
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.entries.values())

    def produce(self, source: Source, power_of_two: bool) -> dict[str, Tensor]:
        tensor, weight, scale = self.tensor, source.weight(self.tensor), None
        if weight.dtype == E4M3:
            scale = source.scale(tensor)
            if self.dtype != E4M3:
                wide = torch.empty(tensor.shape, dtype=self.dtype)
                dequantize_into(wide, weight, scale)
                weight, scale = wide, None
        elif self.dtype == E4M3:
            weight, scale = quantize(weight, power_of_two)
        made = {tensor.name: weight.to(self.dtype)} | ({} if scale is None else {tensor.scale_name: scale})
        for name, values in made.items():
            if not all_finite(values):
                raise UserError(f"{name}: has values that are not finite as {self.dtype}; nothing was saved")
        return made


def _piece(tensor: HFTensor, stored: torch.dtype, dtype: torch.dtype | None, fp8: bool) -> _Piece:
    if tensor.kind == "bias":
        target = torch.float32
    elif tensor.kind == "linear" and (fp8 or (stored == E4M3 and dtype is None)):
        target = E4M3
    else:
        target = dtype or (torch.bfloat16 if stored == E4M3 else stored)
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {tensor.name: (target, tensor.shape)}
    if target == E4M3:
        entries[tensor.scale_name] = (torch.float32, tensor.scale_shape)
    return _Piece(tensor, entries)


@torch.no_grad()
def _write(
    source: Source,
    config: ModelConfig,
    directory: Path,
    dtype: torch.dtype | None,
    fp8: bool,
    max_shard_bytes: int,
    small_files: Path,
    also: Callable[[Path], None] | None,
) -> None:
    pieces = [_piece(t, source.dtype(t), dtype, fp8) for t in hf_tensors(config) if t.stored]
    shards: list[list[_Piece]] = [[]]
    size = 0
    for piece in pieces:
        if shards[-1] and size + piece.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.nbytes
    total = sum(piece.nbytes for piece in pieces)
    power_of_two = wants_power_of_two(config)
    with atomic_directory(directory, OWNED, total) as temporary:
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            _write_shard(temporary / name, shard, source, power_of_two)
            weight_map |= dict.fromkeys((entry for piece in shard for entry in piece.entries), name)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            _write_json(temporary / INDEX, index)
        _write_config(temporary / "config.json", config, pieces)
        for file in sorted(small_files.iterdir()) if small_files.is_dir() else []:
            if any(file.match(pattern) for pattern in OWNED) and not any(file.match(pattern) for pattern in REWRITTEN):
                shutil.copy2(file, temporary)
        if also is not None:
            also(temporary)


def _write_shard(path: Path, pieces: list[_Piece], source: Source, power_of_two: bool) -> None:
    writer = ShardWriter(path, {name: entry for piece in pieces for name, entry in piece.entries.items()})
    try:
        for piece in pieces:
            for name, values in piece.produce(source, power_of_two).items():
                writer.write(name, values)
    finally:
        writer.close()


def _write_config(path: Path, config: ModelConfig, pieces: list[_Piece]) -> None:
    values = config.to_dict()
    values.pop("quantization_config", None)
    values["torch_dtype"] = values["dtype"] = str(pieces[0].dtype).removeprefix("torch.")  # the embedding's
    linear = [piece for piece in pieces if piece.tensor.kind == "linear"]
    wide = [piece.tensor.name.removesuffix(".weight") for piece in linear if piece.dtype != E4M3]
    if len(wide) < len(linear):
        values["quantization_config"] = quantization_config(config, wide)
    _write_json(path, values)


def _write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
