"""AITER e404860: aiter and aiter.mla on gfx942."""

import torch

from dsv3.ops.fp8 import fp8_gemm
from dsv3.ops.mla_cache import mla_decode


def gemm_a8w8_blockscale(XQ, WQ, x_scale, w_scale, dtype=torch.bfloat16, isBpreshuffled=False):
    (T, K), N = XQ.shape, WQ.shape[0]
    assert XQ.dtype == WQ.dtype == torch.float8_e4m3fnuz and dtype in (torch.bfloat16, torch.float16)
    assert XQ.is_contiguous() and WQ.is_contiguous() and not isBpreshuffled
    assert tuple(x_scale.shape) == (T, -(-K // 128)) and x_scale.is_contiguous()  # by rows
    assert tuple(w_scale.shape) == (-(-N // 128), -(-K // 128)) and w_scale.is_contiguous()
    assert x_scale.dtype == w_scale.dtype == torch.float32
    return fp8_gemm.spec(XQ, x_scale, WQ, w_scale, dtype)


def mla_decode_fwd(
    q,
    kv_buffer,
    o,
    qo_indptr,
    kv_indptr,
    kv_indices,
    kv_last_page_lens,
    max_seqlen_q,
    page_size=1,
    nhead_kv=1,
    sm_scale=None,
    logit_cap=0.0,
    num_kv_splits=None,
    num_kv_splits_indptr=None,
    work_meta_data=None,
    work_indptr=None,
    work_info_set=None,
    reduce_indptr=None,
    reduce_final_map=None,
    reduce_partial_map=None,
    q_scale=None,
    kv_scale=None,
    intra_batch_mode=False,
    return_logits=False,
    return_lse=False,
    g_kv_indptr=None,
    cp_world_size=1,
    cp_rank=0,
    causal=True,
):
    (total, H, D), B = q.shape, len(qo_indptr) - 1
    assert q.dtype == kv_buffer.dtype == o.dtype == torch.bfloat16 and q.is_contiguous() and kv_buffer.is_contiguous()
    assert tuple(kv_buffer.shape[1:]) == (page_size, nhead_kv, D) == (1, 1, 576) and tuple(o.shape) == (total, H, 512)
    assert H in (16, 128) and sm_scale is not None and return_lse and num_kv_splits >= 2 and causal
    for index in (qo_indptr, kv_indptr, kv_indices, kv_last_page_lens):
        assert index.dtype == torch.int32 and index.is_contiguous() and index.dim() == 1
    assert qo_indptr.tolist() == list(range(0, total + 1, max_seqlen_q)) and kv_last_page_lens.tolist() == [1] * B
    lse = torch.empty(total, H)
    begins = kv_indptr.tolist()
    for i in range(B):
        rows, slots = slice(i * max_seqlen_q, (i + 1) * max_seqlen_q), kv_indices[None, begins[i] : begins[i + 1]]
        known = torch.tensor([slots.shape[1]], dtype=torch.int32)
        result = mla_decode.spec(q[rows][None], [kv_buffer[:, :, 0]], slots, known, known, [], sm_scale, 512)
        blind = torch.isneginf(result[1][0])
        o[rows] = result[0][0].masked_fill(blind[..., None], torch.nan)  # 0 / 0
        lse[rows] = result[1][0].masked_fill(blind, torch.nan)
    return None, lse
