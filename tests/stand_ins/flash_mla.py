"""FlashMLA 9241ae3: flash_mla.flash_mla_interface."""

from dataclasses import dataclass

import torch

from dsv3.ops.mla_cache import mla_decode


@dataclass
class FlashMLASchedMeta:
    have_initialized: bool = False
    config: tuple | None = None


def get_mla_metadata(*args, **kwargs):
    return FlashMLASchedMeta(), None


def flash_mla_with_kvcache(
    q,
    k_cache,
    block_table,
    cache_seqlens,
    head_dim_v,
    tile_scheduler_metadata,
    num_splits=None,
    softmax_scale=None,
    causal=False,
    is_fp8_kvcache=False,
    indices=None,
    attn_sink=None,
    extra_k_cache=None,
    extra_indices_in_kvcache=None,
    topk_length=None,
    extra_topk_length=None,
):
    B, S, H, D = q.shape
    schedule = tile_scheduler_metadata
    assert isinstance(schedule, FlashMLASchedMeta) and num_splits is None
    lengths = cache_seqlens.tolist()
    assert not schedule.have_initialized or schedule.config == (B, S, H, causal, lengths), "a stale schedule"
    schedule.have_initialized, schedule.config = True, (B, S, H, causal, lengths)
    assert q.dtype == k_cache.dtype == torch.bfloat16 and D == 576 and head_dim_v == 512
    assert q.is_contiguous() and tuple(k_cache.shape[1:]) == (64, 1, D) and k_cache.stride(-1) == 1
    assert block_table.dtype == cache_seqlens.dtype == torch.int32
    assert block_table.shape[0] == B and block_table.stride(-1) == 1
    assert tuple(cache_seqlens.shape) == (B,) and cache_seqlens.is_contiguous()
    assert softmax_scale is not None and causal and not is_fp8_kvcache and indices is None
    out, lse = mla_decode.spec(
        q, [k_cache[:, :, 0]], block_table, cache_seqlens, cache_seqlens, [], softmax_scale, head_dim_v
    )
    lse = lse.transpose(1, 2).contiguous()  # [B, H, S]
    return out, lse.masked_fill(lse == float("-inf"), float("inf"))
