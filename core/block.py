"""One layer: attention and feed-forward, each behind a norm and beside the residual stream."""

import torch
from torch import Tensor, nn

from .config import ModelConfig
from .mla import MLA
from .moe import MLP, MoE
from .norm import RMSNorm
from .step import Step


class Block(nn.Module):
    """x [T, D] -> [T, D]. The first layers are dense, the others have experts (`ModelConfig.is_moe_layer`)."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)
        self.self_attn = MLA(config, layer, device, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)
        self.mlp: MLP | MoE = (
            MoE(config, layer, device, dtype)
            if config.is_moe_layer(layer)
            else MLP(config.hidden_size, config.intermediate_size, device, dtype)
        )

    def forward(self, x: Tensor, step: Step) -> Tensor:
        attention, mlp = self.self_attn, self.mlp
        attended = attention(self.input_layernorm.for_readers(x, attention.readers()), step)
        normed, for_readers, x = self.post_attention_layernorm.after_adding(attended, x, mlp.readers())
        return x + (mlp(normed, for_readers, step) if isinstance(mlp, MoE) else mlp(for_readers))
