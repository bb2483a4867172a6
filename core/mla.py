"""Multi-head latent attention (report, section 2.1.1): all heads' keys and values come from one small latent per token.

Two equal forms. *Explicit*: expand the latent to keys and values and attend as usual; for training and prefill.
*Absorbed*: move the expansion matrices to the query and the output, so that all heads attend to the latents themselves
(one key head of R + r, one value head of R); for decoding, where reading the cache is what costs.

Shape letters: T tokens, D hidden, H heads, n and r the un-rotated and rotated part of a query or key head, v of a value
head, R the latent (kv_lora_rank).
"""

import torch
from torch import Tensor, nn

from ..ops.gemm import batched_gemm
from ..ops.general import rope
from ..ops.mla import mla_attention
from ..ops.weight import Quantized
from .cache import CacheStep
from .config import ModelConfig
from .linear import Linear, Stamp, same
from .norm import LATENT_NORM_EPS, RMSNorm
from .rope import softmax_scale
from .step import Step


class MLA(nn.Module):
    """x [T, D] -> [T, D]. Parameter names are those of the published checkpoints."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.config, self.layer, self.scale = config, layer, softmax_scale(config)
        hidden, heads = config.hidden_size, config.num_attention_heads

        def matrix(out: int, inp: int) -> Linear:
            return Linear((out, inp), device, dtype)

        if config.q_lora_rank is None:
            self.q_proj = matrix(heads * config.qk_head_dim, hidden)
        else:
            self.q_a_proj = matrix(config.q_lora_rank, hidden)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS, device, dtype)
            self.q_b_proj = matrix(heads * config.qk_head_dim, config.q_lora_rank)
        self.kv_a_proj_with_mqa = matrix(config.latent_dim, hidden)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS, device, dtype)
        self.kv_b_proj = matrix(heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank)
        self.o_proj = matrix(hidden, heads * config.v_head_dim)
        self._absorb: tuple[Stamp, Tensor, Tensor] | None = None

    def refresh(self) -> None:
        """Make anew what was made of earlier weights, where it lies: captured steps know its address."""
        if self._absorb is None:
            return
        kept = self._absorb[1:]
        with torch.inference_mode():
            fresh = self._cut(kept[0].dtype)
            if any(old.shape != new.shape or old.device != new.device for old, new in zip(kept, fresh, strict=True)):
                self._absorb = None  # the weight was cut or moved: its next reader makes them
                return
            for old, new in zip(kept, fresh, strict=True):
                old.copy_(new)
        self._absorb = self.kv_b_proj.stamp(), *kept

    def derived(self) -> tuple[Tensor, ...]:
        """What was made of the weights and is kept."""
        return () if self._absorb is None else self._absorb[1:]

    def readers(self) -> tuple[Linear, ...]:
        """The products that read x."""
        return self.kv_a_proj_with_mqa, self.q_proj if self.config.q_lora_rank is None else self.q_a_proj

    def forward(self, x: Tensor | Quantized, step: Step) -> Tensor:
        c = self.config
        q_nope, q_rope = self._queries(x).split_with_sizes([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        q_rope = self._rotate(q_rope, step)  # [T, H, r]
        latent, k_rope = self.kv_a_proj_with_mqa(x).split_with_sizes([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        latent = self.kv_a_layernorm(latent)  # [T, R]
        k_rope = self._rotate(k_rope, step)  # [T, r], one head for all

        if step.cache is None:
            lengths = (step.cu_seqlens, step.max_len)
            heads = self._explicit(q_nope, q_rope, latent, k_rope, lengths, lengths)
        else:
            step.cache.append(self.layer, torch.cat([latent, k_rope], -1))
            if step.cache.parts is None:
                heads = self._over_cache(q_nope, q_rope, step.cache, step.cu_seqlens, step.max_len)
            else:
                parts = [
                    self._over_cache(q_nope[part.rows], q_rope[part.rows], part.cache, part.cu_seqlens, part.max_len)
                    for part in step.cache.parts
                ]
                heads = torch.cat(parts)
        return self.o_proj(heads.flatten(1))

    def _queries(self, x: Tensor | Quantized) -> Tensor:
        if self.config.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm.for_readers(self.q_a_proj(x), (self.q_b_proj,)))
        return q.view(q.shape[0], self.config.num_attention_heads, self.config.qk_head_dim)

    def _rotate(self, x: Tensor, step: Step) -> Tensor:
        if not self.config.rope_interleave:  # these weights give the pairs' first halves, then their second halves
            x = x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        return rope(x, step.positions, step.rope_table)

    def _over_cache(self, q_nope: Tensor, q_rope: Tensor, cache: CacheStep, cu_seqlens: Tensor, max_len: int) -> Tensor:
        """Attention of new tokens over all that is stored of their sequences -> [T, H, v]."""
        if cache.absorbed:
            return self._absorbed(q_nope, q_rope, cache)
        stored, cu_seqlens_k, longest = cache.gather(self.layer)
        latent, k_rope = stored.to(q_nope.dtype).split([self.config.kv_lora_rank, self.config.qk_rope_head_dim], -1)
        return self._explicit(q_nope, q_rope, latent, k_rope, (cu_seqlens, max_len), (cu_seqlens_k, longest))

    def _explicit(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        queries: tuple[Tensor, int],
        keys: tuple[Tensor, int],
    ) -> Tensor:
        """Attention of the new tokens' queries over `latent` [Tk, R] and `k_rope` [Tk, r] -> [T, H, v].

        queries, keys: cu_seqlens i32 [B+1] and the longest sequence.
        """
        c = self.config
        kv = self.kv_b_proj(latent).view(-1, c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim)
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        q = torch.cat([q_nope, q_rope], -1)
        out, _ = mla_attention(q, k_nope, k_rope, v, queries[0], keys[0], queries[1], keys[1], self.scale, True)
        return out

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, cache: CacheStep) -> Tensor:
        up_k, up_v = self._expansions(q_nope.dtype)  # [H, R, n], [H, v, R]
        q_latent = batched_gemm(q_nope.transpose(0, 1), up_k).transpose(0, 1)  # [T, H, R]
        out = cache.decode(self.layer, torch.cat([q_latent, q_rope], -1), self.scale)  # [T, H, R]
        return batched_gemm(out.transpose(0, 1), up_v).transpose(0, 1)

    def _expansions(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """kv_b_proj cut into the keys' part [H, R, n] and the values' [H, v, R]; kept while no gradient is wanted."""
        keep = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if keep and self._absorb is not None:
            stamp, up_k, up_v = self._absorb
            if same(stamp, self.kv_b_proj.stamp()) and up_k.dtype == dtype:
                return up_k, up_v
        up_k, up_v = self._cut(dtype)
        if keep:
            # Copies always: a view would be of the weight, and `refresh` writes into them.
            up_k, up_v = (part.clone(memory_format=torch.contiguous_format) for part in (up_k, up_v))
            self._absorb = self.kv_b_proj.stamp(), up_k, up_v
        return up_k, up_v

    def _cut(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        c = self.config
        heads = self.kv_b_proj.dequantized(dtype).view(c.num_attention_heads, -1, c.kv_lora_rank)
        up_k, up_v = heads.split([c.qk_nope_head_dim, c.v_head_dim], 1)
        return up_k.transpose(1, 2), up_v
