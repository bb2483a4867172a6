"""Attention with expanded keys: a sequence at a time, so that none depends on which others there are."""

import torch
from torch import Tensor

from ...ops.mla import mla_attention
from ..cpu.mla import attend
from . import NAME


@mla_attention.kernel(NAME, "sequences", checked="hardware")
def mla_attention_sequences(
    q: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    Tq, H = q.shape[:2]
    out = q.new_zeros(Tq, H, v.shape[2])
    lse = q.new_full((Tq, H), float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32))
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for q0, q1, k0, k1 in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False):
        rows, keys = slice(q0, q1), slice(k0, k1)
        ends = (torch.tensor([0, end], dtype=torch.int32) for end in (q1 - q0, k1 - k0))
        # Fresh memory: where a row begins must not depend on what stands before it.
        own = (
            part.clone(memory_format=torch.contiguous_format) for part in (q[rows], k_nope[keys], k_rope[keys], v[keys])
        )
        out[rows], lse[rows] = attend(*own, *ends, q1 - q0, k1 - k0, scale, causal)
    return out, lse
