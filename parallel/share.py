"""What one rank holds of a model: decided once, for parameters in memory, tensors of a checkpoint, and plans.

Rows (outputs) are cut where a rank goes on with its own outputs: queries and key-value expansions by heads, gate and up
projections each by itself, embedding and head by vocabulary. Columns (inputs) are cut in the product that follows,
whose results are then summed over the ranks. Routed experts stay whole, and each lies on one rank. All else (norms,
gates, projections to latents, eh_proj) every rank holds.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.checkpoint_read import Checkpoint
from ..core.config import ModelConfig
from ..core.names import HFTensor, hf_tensors
from ..errors import UserError
from ..ops.formats import BLOCK
from .mesh import Mesh

ROWS, COLUMNS = 0, 1
CUT = {
    "embed_tokens": ROWS,
    "lm_head": ROWS,
    "q_proj": ROWS,
    "q_b_proj": ROWS,
    "kv_b_proj": ROWS,
    "gate_up_proj": ROWS,
    "o_proj": COLUMNS,
    "down_proj": COLUMNS,
}


@dataclass(frozen=True)
class Cut:
    """Piece `index` of `count` equal ones of dimension `dim`, of which there are `bands` that are cut alike."""

    dim: int
    index: int
    count: int
    bands: int = 1

    def span(self, size: int) -> tuple[int, int]:
        """Start and length of the piece of a band of this size. `Share` has made sure that it divides."""
        length = size // self.count
        return self.index * length, length

    def of(self, whole: Tensor) -> Tensor:
        """The piece of a parameter, in memory of its own."""
        banded = whole.unflatten(self.dim, (self.bands, -1))
        piece = banded.narrow(self.dim + 1, *self.span(banded.shape[self.dim + 1])).flatten(self.dim, self.dim + 1)
        return piece.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class RankBytes:
    """Bytes of the parameters that one rank holds. rest: norms, gates, and what MTP modules have besides a block."""

    embedding_and_head: int = 0
    attention: int = 0
    dense: int = 0
    shared_experts: int = 0
    routed_experts: int = 0
    rest: int = 0

    @property
    def total(self) -> int:
        return sum(vars(self).values())


class Share:
    """The part of a model of `config` that this rank of `mesh` holds.

    UserError where the model does not divide: heads, vocabulary and feed-forward widths by tp, experts by all ranks.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh):
        self.config, self.mesh = config, mesh
        sizes = {"attention heads": config.num_attention_heads, "tokens of the vocabulary": config.vocab_size}
        if not all(config.is_moe_layer(i) for i in range(config.num_layers_with_mtp)):
            sizes["columns of the dense layers (intermediate_size)"] = config.intermediate_size
        if config.n_shared_experts:
            sizes["columns of the shared experts"] = config.n_shared_experts * config.moe_intermediate_size
        for what, size in sizes.items():
            if size % mesh.tp:
                raise UserError(
                    f"tp = {mesh.tp} does not divide the {size} {what} of this model; {_take(size, mesh.tp)}"
                )
        experts = config.n_routed_experts
        if experts % mesh.size:
            raise UserError(
                f"the {experts} routed experts of this model do not divide over tp x dp = {mesh.size} processes; "
                + _take(experts, mesh.size)
            )

    @property
    def attention_config(self) -> ModelConfig:
        """The model as attention and cache see it on this rank: with a share of the heads."""
        return self.config.replace(num_attention_heads=self.config.num_attention_heads // self.mesh.tp)

    @property
    def experts(self) -> range:
        """The routed experts of this rank."""
        each = self.config.n_routed_experts // self.mesh.size
        return range(self.mesh.rank * each, (self.mesh.rank + 1) * each)

    def cut(self, name: str) -> Cut | None:
        """How the parameter of this name is cut; None where every rank holds all of it."""
        if ".experts." in name:
            return Cut(0, self.mesh.rank, self.mesh.size)
        module = name.split(".")[-2]
        if module not in CUT or self.mesh.tp == 1:
            return None
        return Cut(CUT[module], self.mesh.tp_rank, self.mesh.tp, bands=2 if module == "gate_up_proj" else 1)

    def held(self, tensor: HFTensor) -> HFTensor | None:
        """A tensor of the checkpoint as this rank holds it: shape and number of the expert; None where it does not."""
        if tensor.expert is not None:
            mine = tensor.expert in self.experts
            return replace(tensor, expert=tensor.expert - self.experts.start) if mine else None
        cut = self.cut(tensor.param)
        if cut is None:
            return tensor
        shape = list(tensor.shape)
        shape[cut.dim] = cut.span(shape[cut.dim])[1]
        return replace(tensor, shape=tuple(shape))

    def read(self, checkpoint: Checkpoint, tensor: HFTensor) -> HFTensor | None:
        """`part` of `load_into`: `held`, and from now on `checkpoint` reads no more than that of it."""
        cut = None if tensor.expert is not None else self.cut(tensor.param)
        if cut is None or tensor.name not in checkpoint.tensors:  # (which a copy need not be)
            return self.held(tensor)
        return checkpoint.narrow(tensor, cut.dim, *cut.span(tensor.shape[cut.dim]))

    def bytes(self, dtype: torch.dtype = torch.bfloat16, fp8: bool = False) -> RankBytes:
        """What this rank's parameters take in memory. fp8: of a checkpoint in FP8 that stays so; dtype: of the rest."""
        sizes: dict[str, int] = {}
        for tensor in hf_tensors(self.config):
            held = None if tensor.copy else self.held(tensor)
            if held is None:
                continue
            size = math.prod(held.shape) * (4 if held.kind == "bias" else dtype.itemsize)
            if fp8 and held.kind == "linear" and (held.parts == 1 or held.shape[0] % BLOCK == 0):
                size = math.prod(held.shape) + 4 * math.prod(held.scale_shape)
            part = _part_of(tensor.param)
            sizes[part] = sizes.get(part, 0) + size
        return RankBytes(**sizes)

    def absorbed_bytes(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """What decoding keeps beside the parameters: the expansions of its heads, dequantised (`MLA._expansions`)."""
        config = self.attention_config
        each = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim) * config.kv_lora_rank
        return config.num_layers_with_mtp * each * dtype.itemsize


def _part_of(param: str) -> str:
    for text, part in (
        ("embed_tokens", "embedding_and_head"),
        ("lm_head", "embedding_and_head"),
        (".self_attn.", "attention"),
        (".shared_experts.", "shared_experts"),
        (".experts.", "routed_experts"),
        (".mlp.gate.", "rest"),
        (".mlp.", "dense"),
    ):
        if text in param:
            return part
    return "rest"


def _take(size: int, wanted: int) -> str:
    below = max(count for count in range(1, wanted) if size % count == 0)
    above = next(count for count in range(wanted, size + 1) if size % count == 0) if wanted < size else None
    return f"{below} would do" + (f", or {above}" if above else "")
