"""Low-rank adaptation (Hu et al. 2021): the weights stay as they are, and W x becomes W x + alpha/r B A x.

A [r, K] starts random, B [N, r] at zero, so training starts from the model itself. What is adapted are projections of
attention, of dense layers and of shared experts; routed experts are not. The base may be float or FP8: its products and
the gradients through it are then those of FP8, and it is never dequantised.

Saved adapters are PEFT's: `adapter_config.json`, and in `adapter_model.safetensors` two tensors for each projection as
transformers names them. Gate and up projection, one matrix of ours, are two there and have an A each. `save_pretrained`
of an adapted model writes the sum, W + alpha/r B A; an FP8 base is then quantised anew (or written as bfloat16).
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..core.config import ModelConfig
from ..core.files import atomic_directory
from ..core.linear import Linear, Stamp, version
from ..core.model import DeepseekV3
from ..core.names import HFTensor, by_parameter
from ..errors import UserError
from ..ops.weight import Quantized, Weight, linear
from .settings import Count, Positive, Section

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
OWNED = (ADAPTER, ADAPTER_CONFIG, "README.md", "tokenizer.json", "tokenizer_config.json")
PEFT_PREFIX = "base_model.model."  # its own two wrappers around a model
SAMPLED = 2**16  # bytes at either end of a file that base_digest reads


@dataclass(frozen=True)
class LoraSection(Section):
    """Train adapters in place of the model. rank: 0 trains the model itself.

    targets: which projections, by the end of their name in transformers; `*` stands for any characters.
    fp8: keep a base of FP8 as it is, or dequantise it on load. merge: what the finished model is: base and adapters
    summed, in the formats of the base (FP8 again where it was) or all in bfloat16; "none" leaves the adapter alone.
    """

    rank: Count = 0
    alpha: Positive = 32.0
    targets: tuple[str, ...] = ("self_attn.*", "mlp.shared_experts.*")
    fp8: Literal["keep", "dequantize"] = "keep"
    merge: Literal["as-base", "bf16", "none"] = "as-base"


class LoraLinear(Linear):
    """A Linear with adapters beside its weight, which it takes over as it is.

    lora_A [P r, K], lora_B [N, r]; rows of band p of the weight, of which there are P (gate and up), meet rows of band
    p of A.
    """

    def __init__(self, base: Linear, parts: int, rank: int, alpha: float, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.weight = base.weight
        self.register_buffer("weight_scale_inv", base.weight_scale_inv)
        self.power_of_two_scales, self._packed = base.power_of_two_scales, base._packed
        self.parts, self.rank, self.alpha = parts, rank, alpha
        rows, columns = base.weight.shape
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.zeros(parts * rank, columns, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(rows, rank, device=device, dtype=dtype))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def fp8_input(self, x: Tensor) -> None:
        """The adapters read real numbers."""

    def forward(self, x: Tensor | Quantized) -> Tensor:
        assert isinstance(x, Tensor)
        low = linear(x, Weight(self.lora_A.to(x.dtype)))  # [..., P r]
        bands = zip(low.chunk(self.parts, -1), self.lora_B.to(x.dtype).chunk(self.parts, 0), strict=True)
        added = [linear(part.contiguous(), Weight(rows)) for part, rows in bands]
        return super().forward(x) + self.scale * (added[0] if self.parts == 1 else torch.cat(added, -1))

    def delta(self) -> Tensor:
        """What the adapters add to the weight, f32 [N, K]."""
        bands = zip(self.lora_B.float().chunk(self.parts, 0), self.lora_A.float().chunk(self.parts, 0), strict=True)
        return self.scale * torch.cat([rows @ low for rows, low in bands])

    def merged(self) -> Tensor:
        return super().dequantized(torch.float32) + self.delta()

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The sum, for absorbed attention, which has no product to add the adapters' to."""
        return self.merged().to(dtype)

    def stamp(self) -> Stamp:
        return (*super().stamp(), (self.lora_A, version(self.lora_A)), (self.lora_B, version(self.lora_B)))


def attach(model: DeepseekV3, settings: LoraSection, dtype: torch.dtype, seed: int) -> list[str]:
    """Freeze `model` and put adapters beside the projections that `settings` name. Returns the names of these.

    dtype: of the adapters. seed: of A, which is the same for every way of choosing the other projections.
    UserError for a pattern that names no projection, and for one that names half of a gate and up projection.
    """
    chosen = _chosen(model.config, settings.targets)
    model.requires_grad_(False)
    for name, tensors in chosen.items():
        adapted = _replace(model, name, len(tensors), settings.rank, settings.alpha, dtype)
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        bound = math.sqrt(1 / adapted.lora_A.shape[1])  # Kaiming's uniform with a = sqrt(5), as the reference has it
        start = torch.empty(adapted.lora_A.shape).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            adapted.lora_A.copy_(start)
    return list(chosen)


def adapters(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """The adapted projections by their names in the model."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear))


def save_adapter(
    model: DeepseekV3, directory: str | Path, base: str, also: Callable[[Path], None] | None = None
) -> None:
    """Write the adapters for PEFT, as float32 or bfloat16 as they are; they replace those that are there.

    base: name or directory of the model that they belong to. also: writes a tokenizer beside them.
    """
    tensors: dict[str, Tensor] = {}
    names: list[str] = []
    rank, alpha = 0, 0.0
    groups = by_parameter(model.config)
    for name, module in adapters(model):
        rank, alpha = module.rank, module.alpha
        lows, rows = module.lora_A.detach().chunk(module.parts), module.lora_B.detach().chunk(module.parts)
        for part, low, high in zip(groups[f"{name}.weight"], lows, rows, strict=True):
            hf = part.name.removesuffix(".weight")
            names.append(hf)
            tensors[f"{PEFT_PREFIX}{hf}.lora_A.weight"] = low.cpu().contiguous()
            tensors[f"{PEFT_PREFIX}{hf}.lora_B.weight"] = high.cpu().contiguous()
    if not names:
        raise UserError("the model has no adapters to save: train with lora.rank above 0")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": _shortest(model.config, names),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
    }
    needed = sum(tensor.nbytes for tensor in tensors.values())
    with atomic_directory(directory, OWNED, needed) as place:
        save_file(tensors, place / ADAPTER, metadata={"format": "pt"})
        (place / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if also is not None:
            also(place)


def load_adapter(model: DeepseekV3, directory: str | Path, dtype: torch.dtype) -> list[str]:
    """Freeze `model` and put the adapters of `directory` (`save_adapter`, or PEFT's) beside its projections.

    Returns the names of these. UserError for what is damaged, or belongs to another model.
    """
    place = Path(directory)
    try:
        config = json.loads((place / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        tensors = load_file(place / ADAPTER)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{place}: cannot be read as a LoRA adapter ({error})") from None
    for option in ("use_rslora", "use_dora", "fan_in_fan_out"):
        if config.get(option):
            raise UserError(f"{place}: {option} is set, which is another kind of adapter than dsv3 reads")
    model.requires_grad_(False)
    names = []
    for name, parts in _candidates(model.config).items():
        hf = [f"{PEFT_PREFIX}{part.name.removesuffix('.weight')}" for part in parts]
        found = [name for name in hf if f"{name}.lora_A.weight" in tensors]
        if not found:
            continue
        if found != hf:
            raise UserError(f"{place}: has {found[0]} but not its other half; gate and up projection go together")
        adapted = _replace(model, name, len(parts), rank, alpha, dtype)
        for side, into in (("lora_A", adapted.lora_A), ("lora_B", adapted.lora_B)):
            values = torch.cat([tensors.pop(f"{part}.{side}.weight") for part in hf])
            if values.shape != into.shape:
                raise UserError(f"{place}: {name} has {side} {list(values.shape)}, this model needs {list(into.shape)}")
            with torch.no_grad():
                into.copy_(values)
        names.append(name)
    if tensors or not names:
        other = next(iter(tensors), "nothing")
        raise UserError(f"{place}: holds {other}, which is no adapter of a projection of this model")
    return names


def base_digest(directory: str | Path) -> str:
    """What the weights of a directory are, told by names, sizes and both ends of its files: a run that keeps adapters
    only goes on beside the same base."""
    digest = hashlib.sha256()
    for path in sorted(Path(directory).glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            digest.update(file.read(SAMPLED))
            file.seek(max(0, size - SAMPLED))
            digest.update(file.read(SAMPLED))
    return digest.hexdigest()


def _candidates(config: ModelConfig) -> dict[str, list[HFTensor]]:
    """Our names of the projections that can be adapted -> their tensors, one, or gate and up. MTP modules, which
    transformers does not have, cannot."""
    modules = tuple(f"model.layers.{i}." for i in range(config.num_hidden_layers, config.num_layers_with_mtp))
    return {
        name.removesuffix(".weight"): tensors
        for name, tensors in by_parameter(config).items()
        if tensors[0].kind == "linear" and tensors[0].expert is None and not name.startswith(modules)
    }


def _chosen(config: ModelConfig, patterns: Sequence[str]) -> dict[str, list[HFTensor]]:
    candidates = _candidates(config)
    wanted: set[str] = set()
    names = [tensor.name.removesuffix(".weight") for tensors in candidates.values() for tensor in tensors]
    for pattern in patterns:
        found = {name for name in names if fnmatch(name, pattern) or fnmatch(name, f"*.{pattern}")}
        if not found:
            known = ", ".join(sorted({name.split(".", 3)[3] for name in names}))
            raise UserError(f"lora.targets: {pattern!r} names no projection that can be adapted; there are {known}")
        wanted |= found
    chosen = {}
    for name, tensors in candidates.items():
        parts = [tensor.name.removesuffix(".weight") for tensor in tensors]
        inside = [part for part in parts if part in wanted]
        if inside and inside != parts:
            raise UserError(f"lora.targets: {inside[0]} is one matrix with {' and '.join(parts)}; name both or neither")
        if inside:
            chosen[name] = tensors
    return chosen


def _replace(model: nn.Module, name: str, parts: int, rank: int, alpha: float, dtype: torch.dtype) -> LoraLinear:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    base = getattr(owner, leaf)
    if isinstance(base, LoraLinear):
        raise UserError(f"{name} has an adapter already")
    adapted = LoraLinear(base, parts, rank, alpha, dtype)
    setattr(owner, leaf, adapted)
    return adapted


def _shortest(config: ModelConfig, names: Sequence[str]) -> list[str]:
    """PEFT adapts every module whose name ends in one of its targets: the part behind the layer's number, where all
    modules of that part are adapted, else the whole name."""
    every: dict[str, set[str]] = {}
    for tensors in _candidates(config).values():
        for tensor in tensors:
            name = tensor.name.removesuffix(".weight")
            every.setdefault(name.split(".", 3)[3], set()).add(name)
    chosen = set(names)
    short = {part for part, modules in every.items() if modules <= chosen}
    return sorted(short | {name for name in names if name.split(".", 3)[3] not in short})
