"""Reading a checkpoint: check everything that the headers tell, then fill the model one tensor at a time.

Peak memory is the model plus one tensor: a parameter on the meta device is allocated when its turn comes, and bytes are
read straight into it where the dtype is the same. Names, shapes and dtypes of all files are checked before the first
byte of a weight is read, values (finite?) while they pass by.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..ops.formats import BLOCK, E4M3, num_blocks
from .config import ModelConfig
from .fp8_checkpoint import all_finite, dequantize_into, require_block_edges, wants_power_of_two
from .names import HFTensor, by_parameter, hf_tensors, parameter_shape
from .safetensors_file import StoredTensor, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Checkpoint:
    """The tensors of a directory in the Hugging Face format: where each lies, and how to read it."""

    def __init__(self, directory: str | Path) -> None:
        """Reads the headers of all files. Errors: UserError in one line for whatever is missing or damaged."""
        self.directory = Path(directory)
        self.tensors: dict[str, StoredTensor] = {}
        for path in _shards(self.directory):
            for stored in read_header(path):
                if stored.name in self.tensors:
                    first = self.tensors[stored.name].path.name
                    raise UserError(f"{path}: tensor {stored.name} is in {first} already; keep one of them")
                self.tensors[stored.name] = stored

    def check(self, config: ModelConfig, parameters: Iterable[str] | None = None) -> None:
        """Hold the headers against the configuration: nothing missing, mis-shaped, of a wrong dtype, or unexpected.

        parameters: our names of those that will be read; all where None. A tensor of `config` that fills none of them
            is expected, but not demanded.
        """
        wanted = None if parameters is None else set(parameters)
        expected: set[str] = set()
        missing: list[str] = []
        for tensor in hf_tensors(config):
            expected.add(tensor.name)
            stored = self.tensors.get(tensor.name)
            if stored is not None and stored.dtype == E4M3:
                expected.add(tensor.scale_name)
            if wanted is not None and tensor.param not in wanted:
                continue
            if stored is not None:
                self._check_one(tensor, stored)
            elif not tensor.copy:
                missing.append(tensor.name)
        if missing:
            mtp = f"model.layers.{config.num_hidden_layers}."
            hint = "; num_nextn_predict_layers = 0 leaves the MTP modules out" if missing[0].startswith(mtp) else ""
            raise UserError(f"{self.directory}: missing tensor {_first_of(missing)}{hint}")
        # inv_freq: a table that early exports of the family (Kimi-K2) stored; it follows from the configuration.
        extra = [n for n in self.tensors if n not in expected and not n.endswith(".rotary_emb.inv_freq")]
        if extra:
            raise UserError(
                f"{self.directory}: unexpected tensor {_first_of(extra)}; config.json describes no such tensor"
            )

    def _check_one(self, tensor: HFTensor, stored: StoredTensor) -> None:
        _check_shape(stored, tensor.shape)
        if stored.dtype != E4M3:
            return
        if len(tensor.shape) != 2:
            raise UserError(f"{stored.path}: tensor {tensor.name} is FP8, which only matrices can be")
        scale = self.tensors.get(tensor.scale_name)
        if scale is None:
            raise UserError(f"{self.directory}: missing tensor {tensor.scale_name}, the scales of the FP8 weight")
        _check_shape(scale, tensor.scale_shape)

    def narrow(self, tensor: HFTensor, dim: int, start: int, length: int) -> HFTensor:
        """From now on `tensor` is but its rows (dim 0) or columns (dim 1) `start` to `start + length`, scales included.

        Returns it with that shape. UserError where this would cut through FP8 blocks.
        """
        stored = self.tensors[tensor.name]
        if stored.dtype == E4M3:
            require_block_edges(f"{stored.path}: tensor {tensor.name}", tensor.shape[dim], start, length)
            blocks = start // BLOCK, num_blocks(length)
            self.tensors[tensor.scale_name] = self.tensors[tensor.scale_name].narrow(dim, *blocks)
        self.tensors[tensor.name] = stored.narrow(dim, start, length)
        return replace(tensor, shape=self.tensors[tensor.name].shape)

    def dtype(self, tensor: HFTensor) -> torch.dtype:
        """The dtype in which `tensor` is stored."""
        return self.tensors[tensor.name].dtype

    def weight(self, tensor: HFTensor) -> Tensor:
        """The values of `tensor` on the CPU, as stored."""
        return self.tensors[tensor.name].read()

    def scale(self, tensor: HFTensor) -> Tensor:
        """The block scales of an FP8 tensor, float32 [ceil(N/128), ceil(K/128)]."""
        return self.tensors[tensor.scale_name].read().float()

    def read_into(self, out: Tensor, tensor: HFTensor) -> None:
        """Fill `out` (of the tensor's shape, any device) in its dtype: FP8 stays if `out` is FP8, else is dequantised.

        Errors: UserError for values that are not finite, in the file or in the dtype of `out`.
        """
        stored = self.tensors[tensor.name]
        if stored.dtype == out.dtype and out.device.type == "cpu" and out.is_contiguous():
            stored.read(out)
        elif stored.dtype == E4M3 != out.dtype:
            staging = torch.empty_like(out, device="cpu")
            dequantize_into(out if out.device.type == "cpu" else staging, self.weight(tensor), self.scale(tensor))
            if out.device.type != "cpu":
                out.copy_(staging)
        else:
            out.copy_(stored.read())
        if not all_finite(out):
            raise UserError(f"{stored.path}: tensor {tensor.name} has values that are not finite as {out.dtype}")


@torch.no_grad()
def load_into(
    model: nn.Module,
    directory: str | Path,
    *,
    config: ModelConfig | None = None,
    dtype: torch.dtype | None = None,
    fp8: Literal["keep", "dequantize"] = "dequantize",
    device: torch.device | str | None = None,
    part: Callable[[Checkpoint, HFTensor], HFTensor | None] | None = None,
) -> None:
    """Fill `model`, whose parameters may be on the meta device, from a directory in the Hugging Face format.

    config: what the checkpoint is; `model.config` where None. Parts that the model was built without (MTP modules, a
        range of layers) are passed over.
    dtype: of all parameters but the gate's bias (float32). None: of a parameter on meta the stored one (bfloat16 for
        FP8 that is dequantised), of any other its own.
    fp8: "keep" hands FP8 weights and their scales to `module.load_fp8(weight, scale, power_of_two)` of modules that
        have it; everything else, and gate and up projections of which one ends inside a block, is dequantised.
    device: of all parameters; None: where each is, and the CPU for those on meta.
    part: what a model that is spread over processes takes of a tensor: the tensor, a part of it (`Checkpoint.narrow`),
        or None.

    Errors: UserError, one line, naming the tensor or file that is missing, cut short, mis-shaped, unexpected or not
        finite.
    """
    config = model.config if config is None else config  # type: ignore[assignment]
    assert isinstance(config, ModelConfig)
    slots = _Slots(model)
    groups = {name: tensors for name, tensors in _groups(config, slots).items() if name in slots.current}
    checkpoint = Checkpoint(directory)
    checkpoint.check(config, {tensor.param for tensors in groups.values() for tensor in tensors})
    if part is not None:
        groups = {
            name: [mine for tensor in tensors if (mine := part(checkpoint, tensor)) is not None]
            for name, tensors in groups.items()
        }
    for name, tensors in groups.items():
        old, shape = slots.current[name], parameter_shape(tensors)
        if tuple(old.shape) != shape:
            raise UserError(
                f"{directory}: config.json wants {name} of shape {list(shape)}, the model has {list(old.shape)}"
            )
        place = torch.device(device) if device is not None else old.device
        place = torch.device("cpu") if place.type == "meta" else place
        originals = [tensor for tensor in tensors if not tensor.copy]
        module = slots.module(name)
        if fp8 == "keep" and hasattr(module, "load_fp8") and _stays_fp8(checkpoint, originals):
            module.load_fp8(*_read_fp8(checkpoint, originals, shape, place), wants_power_of_two(config))
            continue
        if old.dtype == E4M3:
            raise ValueError(f"{name} is FP8 already; load other weights into a new model")
        if tensors[0].kind == "bias":
            target = torch.float32
        else:
            target = dtype or (_stored_dtype(checkpoint, originals) if old.is_meta else old.dtype)
        if old.device == place and old.dtype == target and old.is_contiguous():
            filled = old.detach()
        else:
            filled = torch.empty(shape, dtype=target, device=place)
            slots.replace(name, filled)
        for tensor in originals:
            checkpoint.read_into(tensor.of(filled), tensor)
        for tensor in tensors:
            if tensor.copy and tensor.name in checkpoint.tensors:
                _check_copy(checkpoint, tensor, filled)
    left = [name for name, value in model.state_dict(keep_vars=True).items() if value is not None and value.is_meta]
    if left:
        raise RuntimeError(f"no tensor of the checkpoint fills {_first_of(left)}")


class _Slots:
    """The parameters and buffers of a model by name, tied ones under each of their names."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.current: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self.current |= dict(model.named_buffers(remove_duplicate=False))
        self._names: dict[int, list[str]] = {}
        for name, tensor in self.current.items():
            self._names.setdefault(id(tensor), []).append(name)

    def module(self, name: str) -> Any:
        return self.model.get_submodule(name.rpartition(".")[0])

    def replace(self, name: str, value: Tensor) -> None:
        old = self.current[name]
        new = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
        for each in self._names[id(old)]:
            setattr(self.module(each), each.rpartition(".")[2], new)
            self.current[each] = new


def _groups(config: ModelConfig, slots: _Slots) -> dict[str, list[HFTensor]]:
    """by_parameter, and a head of its own for a pipeline stage that has the tied head but not the embedding."""
    groups = by_parameter(config)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if config.tie_word_embeddings and slots.current.get(head) is not slots.current.get(embedding):
        groups[head] = [tensor for tensor in groups[embedding] if tensor.name == embedding]
    return groups


def _stored_dtype(checkpoint: Checkpoint, tensors: list[HFTensor]) -> torch.dtype:
    """The narrowest dtype that holds all of them; what is FP8 in the file counts as bfloat16."""
    dtypes = [checkpoint.dtype(tensor) for tensor in tensors]
    return reduce(torch.promote_types, [torch.bfloat16 if dtype == E4M3 else dtype for dtype in dtypes])


def _stays_fp8(checkpoint: Checkpoint, tensors: list[HFTensor]) -> bool:
    """FP8 throughout, and no block would cross from one stacked projection into the next."""
    whole_blocks = tensors[0].parts == 1 or tensors[0].shape[0] % BLOCK == 0
    return tensors[0].kind == "linear" and whole_blocks and all(checkpoint.dtype(tensor) == E4M3 for tensor in tensors)


def _read_fp8(
    checkpoint: Checkpoint, tensors: list[HFTensor], shape: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    blocks = tensors[0].scale_shape
    weight = torch.empty(shape, dtype=E4M3, device=device)
    scale = torch.empty((*shape[:-2], blocks[0] * tensors[0].parts, blocks[1]), device=device)
    for tensor in tensors:
        checkpoint.read_into(tensor.of(weight), tensor)
        values = checkpoint.scale(tensor)
        if not all_finite(values):
            raise UserError(f"{checkpoint.directory}: tensor {tensor.scale_name} has values that are not finite")
        tensor.of(scale).copy_(values)
    return weight, scale


def _check_copy(checkpoint: Checkpoint, tensor: HFTensor, parameter: Tensor) -> None:
    """The model shares what the checkpoint stores twice: that loses nothing only if both are equal."""
    copied = torch.empty_like(parameter, device="cpu")
    checkpoint.read_into(copied, tensor)
    if not torch.equal(copied, parameter.cpu()):
        raise UserError(
            f"{checkpoint.directory}: tensor {tensor.name} is not equal to {tensor.param}, which dsv3 shares with it"
        )


def _check_shape(stored: StoredTensor, shape: tuple[int, ...]) -> None:
    if stored.shape != shape:
        raise UserError(
            f"{stored.path}: tensor {stored.name} has the shape {list(stored.shape)}; config.json wants {list(shape)}"
        )


def _shards(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; give one in the Hugging Face format")
    index = directory / INDEX
    if not index.exists():
        single = directory / SINGLE
        paths = [single] if single.exists() else sorted(directory.glob("*.safetensors"))
        if not paths:
            raise UserError(f"{directory}: no *.safetensors files there; give a directory in the Hugging Face format")
        return paths
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        paths = [directory / name for name in sorted(set(weight_map.values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: damaged ({error!r}); fetch the file again") from None
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: missing, but {INDEX} names it; fetch the file")
    return paths


def _first_of(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
