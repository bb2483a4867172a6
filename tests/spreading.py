"""What the processes of test_tensor_parallel.py share: models, and passes over a paged cache as engines make them."""

from collections.abc import Sequence
from copy import deepcopy

import torch
from parity import random_model
from torch import Tensor

from dsv3.core.cache import PagedCache
from dsv3.core.config import ModelConfig, Yarn
from dsv3.core.model import DeepseekV3
from dsv3.core.step import packed
from dsv3.parallel.inference import spread
from dsv3.parallel.mesh import Mesh

# Group-limited routing, compressed queries, an MTP module, a dense layer first.
V3 = ModelConfig(
    vocab_size=64,
    hidden_size=48,
    intermediate_size=40,
    moe_intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    q_lora_rank=24,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=12,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=3,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=1,
    rope_scaling=Yarn(factor=4.0, original_max_position_embeddings=32),
    max_position_embeddings=128,
)
# Queries without a latent, embedding and head tied, two shared experts, the softmax gate.
TIED = V3.replace(
    q_lora_rank=None,
    tie_word_embeddings=True,
    n_shared_experts=2,
    num_nextn_predict_layers=0,
    scoring_func="softmax",
    topk_method="group_limited_greedy",
    norm_topk_prob=False,
    model_type="deepseek_v2",
)
# Two ranks' cuts fall on the edges of FP8 blocks.
FP8 = V3.replace(
    vocab_size=96,
    hidden_size=128,
    intermediate_size=256,
    moe_intermediate_size=256,
    num_hidden_layers=2,
    q_lora_rank=64,
    kv_lora_rank=64,
    qk_nope_head_dim=64,
    qk_rope_head_dim=64,
    v_head_dim=64,
)


def pair(config: ModelConfig, mesh: Mesh, seed: int = 0) -> tuple[DeepseekV3, DeepseekV3]:
    """A model, whole, and this rank's part of the same."""
    whole = random_model(config, seed)
    return whole, spread(deepcopy(whole), mesh)


def tokens_of(config: ModelConfig, seed: int, *shape: int) -> Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


class Sequences:
    """Sequences in a paged cache of their own. Pages are handed out in an order that is not theirs."""

    def __init__(self, model: DeepseekV3, batch: int):
        self.model, self.known = model, [0] * batch
        dtype = model.model.norm.weight.dtype
        self.cache = PagedCache(model.config, 64, dtype)
        each = 64 // batch
        self.pages = [list(range(i, each * batch, batch))[::-1] for i in range(batch)]

    @torch.inference_mode()
    def forward(self, tokens: Sequence[Tensor], absorbed: bool) -> tuple[Tensor, Tensor]:
        """The next tokens of every sequence -> logits of all of them, and the hidden states."""
        new = [len(fresh) for fresh in tokens]
        step = self.cache.step(self.pages, self.known, new, absorbed)
        positions, cu_seqlens, _ = packed(new, self.known)
        output = self.model(torch.cat(list(tokens)), cu_seqlens, step, positions=positions)
        self.known = [old + fresh for old, fresh in zip(self.known, new, strict=True)]
        return output.logits, output.hidden


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
