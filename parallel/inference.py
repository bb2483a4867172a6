"""A model spread over processes for inference: tensor parallelism within a group, experts over all ranks.

    mesh = Mesh.over_world(tp=2, dp=4)
    model = load_spread(directory, mesh, dtype=torch.bfloat16)
    model(tokens, ...)      # on every rank of a group, with the group's tokens; logits are complete on each
    idle(model)             # on the ranks of a group that has none, meanwhile

With dp > 1 all groups run their passes at the same time, as tokens of one visit experts of the other. `model.config`
is the rank's: it has a share of the heads (for the cache); all else in it is the whole model's.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from ..core.checkpoint import load_into
from ..core.config import ModelConfig
from ..core.linear import Linear
from ..core.mla import MLA
from ..core.model import DeepseekV3
from ..core.moe import MLP, LocalDispatcher, MoE
from ..errors import UserError
from .expert import ExchangeDispatcher, PartialDispatcher
from .mesh import Mesh
from .share import Share
from .tensor import VocabularyParallelEmbedding, cut_module, gather_behind, sum_behind


def spread(model: DeepseekV3, mesh: Mesh) -> DeepseekV3:
    """Make `model`, whole, on the meta device or with its weights, this rank's part of it, and return it.

    Before `pack`. UserError where the model does not divide, or a cut would go through FP8 blocks.
    """
    share = Share(model.config, mesh)
    if mesh.size == 1:
        return model
    if mesh.tp > 1:
        _spread_ends(model, share)
    for name, module in list(model.named_modules()):
        if name not in ("lm_head", "model.embed_tokens"):
            cut_module(module, name, share)
        if isinstance(module, MLA) and mesh.tp > 1:
            module.config = share.attention_config
            sum_behind(module, mesh.tp_group)
        elif isinstance(module, MLP) and mesh.tp > 1 and (mesh.dp > 1 or not name.endswith("shared_experts")):
            sum_behind(module, mesh.tp_group)
        elif isinstance(module, MoE):
            _spread_experts(module, share)
    model.config = share.attention_config
    return model


def load_spread(
    directory: str | Path,
    mesh: Mesh,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    fp8: Literal["keep", "dequantize"] = "keep",
) -> DeepseekV3:
    """This rank's part of the model in `directory`. Of the files, no more is read than that, and the headers.

    dtype, fp8: as in DeepseekV3.from_pretrained. device: the CPU by default.
    """
    config = ModelConfig.from_pretrained(directory)
    if not Path(directory).is_dir():
        raise UserError(f"{directory}: a preset has a shape but no weights; give a directory with a checkpoint")
    model = spread(DeepseekV3(config, device="meta"), mesh)
    part = Share(config, mesh).read
    load_into(model, directory, config=config, dtype=dtype, fp8=fp8, device=device or "cpu", part=part)
    return model.eval()


def exchange_within(model: DeepseekV3, capacity: int | None) -> None:
    """How tokens travel to their experts in the next passes, the same on every rank; no effect without dp.

    None: as many as there are, which the host waits for. A number: within shapes that a bound gives, the most tokens
    that any group brings to a pass.
    """
    for moe in _moes(model):
        if isinstance(moe.dispatcher, ExchangeDispatcher):
            moe.dispatcher.capacity = capacity


def idle(model: DeepseekV3, mtp_depth: int | None = None) -> None:
    """Take part in the others' pass without a token of one's own: compute with this rank's experts what they send.

    mtp_depth: in a pass through that MTP module; None: through the main layers.
    """
    weight = model.model.embed_tokens.weight
    config, device = model.config, weight.device
    nothing = torch.empty(0, config.hidden_size, dtype=weight.dtype, device=device)
    chosen = torch.empty(0, config.num_experts_per_tok, dtype=torch.int32, device=device)
    weights = torch.empty(0, config.num_experts_per_tok, device=device)
    layers = model.layer_range if mtp_depth is None else [config.num_hidden_layers + mtp_depth]
    for layer in layers:
        moe = model.block(layer).mlp
        if isinstance(moe, MoE) and isinstance(moe.dispatcher, ExchangeDispatcher):
            moe.dispatcher(nothing, chosen, weights, moe.experts)


def _moes(model: nn.Module) -> Iterator[MoE]:
    return (module for module in model.modules() if isinstance(module, MoE))


def _spread_ends(model: DeepseekV3, share: Share) -> None:
    """Embedding and head by vocabulary. A tied head becomes a module of its own, which shares the embedding's rows."""
    mesh, embedding = share.mesh, model.model.embed_tokens
    cut_module(embedding, "model.embed_tokens", share)
    if hasattr(model, "lm_head"):
        cut_module(model.lm_head, "lm_head", share)
    else:
        model.lm_head = Linear(tuple(embedding.weight.shape), "meta")
        model.lm_head.weight = embedding.weight
    first = mesh.tp_rank * embedding.weight.shape[0]
    model.model.embed_tokens = VocabularyParallelEmbedding(embedding, first, mesh.tp_group)
    gather_behind(model.lm_head, mesh)


def _spread_experts(moe: MoE, share: Share) -> None:
    mesh = share.mesh
    align = moe.dispatcher.align if isinstance(moe.dispatcher, LocalDispatcher) else 1
    if mesh.dp > 1:
        moe.dispatcher = ExchangeDispatcher(share.config.n_routed_experts, mesh, align)
    else:  # routed and shared experts leave a part of the sum each, and one all-reduce is enough for both
        moe.dispatcher = PartialDispatcher(share.experts, align)
        sum_behind(moe, mesh.tp_group)
