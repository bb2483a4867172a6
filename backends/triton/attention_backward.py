"""Attention in its expanded form, backward: the probabilities are computed again, from the logits and their lse.

Four kernels, none of which adds to memory that others write, so that a result is the same every time:

1. delta = sum(grad_out * out) - grad_lse of every query and head, by head as the next two want it.
2. Keys: a program owns a tile of keys of one head and goes over the queries that see it, for the gradients of k_nope
   and v, and for its head's share of k_rope's.
3. Queries: a program owns a tile of queries of one head and goes over the keys that it sees.
4. k_rope: the heads' shares are added up, in their order.

The shares are f32 [H, Tk, r]: in V3 as much memory as the gradient of k_nope. A program that took several heads one
after another would need less of it, but the registers, of which the sums of one head take most, would not do.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...ops.mla import mla_attention_backward
from .attention import (
    LOG2_E,
    attends,
    find_tile,
    head_sizes,
    load_rows,
    most_tiles,
    sequences_of,
    source_of,
    store_rows,
    visible_to,
    with_descriptors,
)
from .operands import by_rows
from .runtime import device_function, gpu_kernel, kernel, launch
from .tables import tile


@kernel
def attention_delta_kernel(
    grad_out, out, lse, grad_lse, delta, Tq, grad_row, grad_head, out_row, out_head, lse_row, grad_lse_row, scale,
    V: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """grad_out, out [Tq, H, V], lse, grad_lse [Tq, H] -> delta f32 [2, H, Tq], from where the sums of the logits and of
    the probabilities' gradients start: -lse / scale, but -inf, which makes all probabilities zeros, for queries that
    see nothing; grad_lse - sum(grad_out * out)."""
    head = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * ROWS
    row = start + tl.arange(0, ROWS)
    grad = load_rows(grad_out + head * grad_head, start, Tq, grad_row, V, ROWS, DV, True, False)
    value = load_rows(out + head * out_head, start, Tq, out_row, V, ROWS, DV, True, False)
    total = tl.sum(grad.to(tl.float32) * value.to(tl.float32), 1)
    mask = row < Tq
    if grad_lse is not None:
        total -= tl.load(grad_lse + row.to(tl.int64) * grad_lse_row + head, mask=mask, other=0.0)
    seen = tl.load(lse + row.to(tl.int64) * lse_row + head, mask=mask, other=0.0)
    place = delta + head * Tq + row
    tl.store(place, tl.where(seen == float("-inf"), seen, -seen / scale), mask=mask)
    tl.store(place + tl.num_programs(1).to(tl.int64) * Tq, -total, mask=mask)


@device_function
def add_queries(
    of_nope, of_rope, of_v, k_nope, k_rope, v, q_nope, q_rope, grad_out, lse, delta, start, queries, first, shift,
    q_row, grad_row, scale,
    NOPE: tl.constexpr, ROPE: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, MASKED: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """What one block of queries adds to the gradients of a tile of keys, k_nope's and k_rope's without the scale.

    scale: to base 2. MASKED: query i sees key j where j <= i + shift; first: of the tile's keys.
    """
    row = start + tl.arange(0, BM)
    q_nope = load_rows(q_nope, start, queries, q_row, NOPE, BM, k_nope.shape[1], True, TMA)
    q_rope = load_rows(q_rope, start, queries, q_row, ROPE, BM, k_rope.shape[1], True, TMA)
    grad_out = load_rows(grad_out, start, queries, grad_row, V, BM, v.shape[1], True, TMA)
    lse = tl.load(lse + row, mask=row < queries, other=float("-inf"))
    delta = tl.load(delta + row, mask=row < queries, other=0.0)
    block: tl.constexpr = (k_nope.shape[0], BM)
    logits = tl.dot(k_nope, tl.trans(q_nope), tl.broadcast_to(lse[None, :], block), input_precision="ieee")
    logits = tl.dot(k_rope, tl.trans(q_rope), logits, input_precision="ieee")
    p = tl.exp2(logits * scale)
    if MASKED:
        key = first + tl.arange(0, k_nope.shape[0])
        p = tl.where(key[:, None] <= (row + shift)[None, :], p, 0.0)
    p = p.to(grad_out.dtype)  # and no longer in float32: registers
    of_v = tl.dot(p, grad_out, of_v, input_precision="ieee")
    of_p = tl.dot(v, tl.trans(grad_out), tl.broadcast_to(delta[None, :], block), input_precision="ieee")
    of_logits = (p.to(tl.float32) * of_p).to(q_nope.dtype)
    of_nope = tl.dot(of_logits, q_nope, of_nope, input_precision="ieee")
    of_rope = tl.dot(of_logits, q_rope, of_rope, input_precision="ieee")
    return of_nope, of_rope, of_v


@kernel
def attention_keys_kernel(
    grad_out, q, k_nope, k_rope, v, delta, of_nope, shares, of_v, cu_q, cu_k, Tq, Tk, B, scale, scale_2,
    grad_row, grad_head, q_row, q_head, k_row, k_head, r_row, v_row, v_head,
    NOPE: tl.constexpr, ROPE: tl.constexpr, V: tl.constexpr, DN: tl.constexpr, DR: tl.constexpr, DV: tl.constexpr,
    CAUSAL: tl.constexpr, SEQUENCES: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A tile of keys of a head -> of_nope [Tk, H, NOPE], of_v [Tk, H, V] and the head's share of k_rope's gradient, f32
    [H, Tk, ROPE]. delta f32 [2, H, Tq]; scale_2: the scale to base 2."""
    head, H = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    sequence, first, found = find_tile(cu_k, B, BN, SEQUENCES, False)
    q_start, k_start = tl.load(cu_q + sequence), tl.load(cu_k + sequence)
    queries, keys = tl.load(cu_q + sequence + 1) - q_start, tl.load(cu_k + sequence + 1) - k_start
    first, queries, keys = tl.where(found, first, 0), tl.where(found, queries, 0), tl.where(found, keys, 0)
    shift = keys - queries
    if CAUSAL:  # the first query that sees a key of the tile, and the first that sees all, in whole blocks from there
        begin = tl.minimum(tl.maximum(first - shift, 0), queries)
        all_seen = tl.minimum(tl.maximum(first + BN - 1 - shift, 0), queries)
        middle = begin + tl.cdiv(all_seen - begin, BM) * BM
    else:
        begin, middle = 0, 0

    k_nope += k_start.to(tl.int64) * k_row + head * k_head
    k_rope += k_start.to(tl.int64) * r_row
    v += k_start.to(tl.int64) * v_row + head * v_head
    k_nope_tile = load_rows(k_nope, first, keys, k_row, NOPE, BN, DN, True, False)
    k_rope_tile = load_rows(k_rope, first, keys, r_row, ROPE, BN, DR, True, False)
    v_tile = load_rows(v, first, keys, v_row, V, BN, DV, True, False)
    q += q_start.to(tl.int64) * q_row + head * q_head
    q_nope = source_of(q, queries, q_row, NOPE, BM, DN, TMA)
    q_rope = source_of(q + NOPE, queries, q_row, ROPE, BM, DR, TMA)
    grad_out += q_start.to(tl.int64) * grad_row + head * grad_head
    grad = source_of(grad_out, queries, grad_row, V, BM, DV, TMA)
    lse = delta + head * Tq + q_start
    delta = lse + H.to(tl.int64) * Tq
    nope_sum = tl.zeros((BN, DN), tl.float32)
    rope_sum = tl.zeros((BN, DR), tl.float32)
    v_sum = tl.zeros((BN, DV), tl.float32)
    # Whatever would be hoisted out of these loops would take registers of the sums.
    for start in tl.range(begin, middle, BM, disable_licm=TMA):
        nope_sum, rope_sum, v_sum = add_queries(
            nope_sum, rope_sum, v_sum, k_nope_tile, k_rope_tile, v_tile, q_nope, q_rope, grad, lse, delta, start,
            queries, first, shift, q_row, grad_row, scale_2, NOPE, ROPE, V, BM, True, TMA,
        )  # fmt: skip
    for start in tl.range(middle, queries, BM, disable_licm=TMA):
        nope_sum, rope_sum, v_sum = add_queries(
            nope_sum, rope_sum, v_sum, k_nope_tile, k_rope_tile, v_tile, q_nope, q_rope, grad, lse, delta, start,
            queries, first, shift, q_row, grad_row, scale_2, NOPE, ROPE, V, BM, False, TMA,
        )  # fmt: skip
    of_nope += head * NOPE
    of_v += head * V
    store_rows(of_nope + k_start.to(tl.int64) * H * NOPE, nope_sum * scale, first, keys, H * NOPE, NOPE)
    store_rows(of_v + k_start.to(tl.int64) * H * V, v_sum, first, keys, H * V, V)
    store_rows(shares + (head * Tk + k_start) * ROPE, rope_sum * scale, first, keys, ROPE, ROPE)
    for start in range(tl.load(cu_k + B) + tl.program_id(0) * BN, Tk, tl.num_programs(0) * BN):
        store_rows(of_nope, tl.zeros((BN, DN), tl.float32), start, Tk, H * NOPE, NOPE)
        store_rows(of_v, tl.zeros((BN, DV), tl.float32), start, Tk, H * V, V)


@device_function
def add_keys(
    of_nope, of_rope, q_nope, q_rope, grad_out, lse, delta, k_nope, k_rope, v, start, keys, last,
    k_row, r_row, v_row, scale,
    NOPE: tl.constexpr, ROPE: tl.constexpr, V: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """What one block of keys adds to the gradient of a tile of queries, without the scale; else as `attend`."""
    k_nope = load_rows(k_nope, start, keys, k_row, NOPE, BN, q_nope.shape[1], MASKED, TMA)
    k_rope = load_rows(k_rope, start, keys, r_row, ROPE, BN, q_rope.shape[1], MASKED, TMA)
    v = load_rows(v, start, keys, v_row, V, BN, grad_out.shape[1], MASKED, TMA)
    block: tl.constexpr = (q_nope.shape[0], BN)
    logits = tl.dot(q_nope, tl.trans(k_nope), tl.broadcast_to(lse[:, None], block), input_precision="ieee")
    logits = tl.dot(q_rope, tl.trans(k_rope), logits, input_precision="ieee")
    p = tl.exp2(logits * scale)
    if MASKED:
        key = start + tl.arange(0, BN)
        seen = key[None, :] <= last[:, None] if CAUSAL else (key < keys)[None, :]
        p = tl.where(seen, p, 0.0)
    of_p = tl.dot(grad_out, tl.trans(v), tl.broadcast_to(delta[:, None], block), input_precision="ieee")
    of_logits = (p * of_p).to(k_nope.dtype)
    of_nope = tl.dot(of_logits, k_nope, of_nope, input_precision="ieee")
    of_rope = tl.dot(of_logits, k_rope, of_rope, input_precision="ieee")
    return of_nope, of_rope


@kernel
def attention_queries_kernel(
    grad_out, q, k_nope, k_rope, v, delta, of_q, cu_q, cu_k, Tq, B, scale, scale_2,
    grad_row, grad_head, q_row, q_head, k_row, k_head, r_row, v_row, v_head,
    NOPE: tl.constexpr, ROPE: tl.constexpr, V: tl.constexpr, DN: tl.constexpr, DR: tl.constexpr, DV: tl.constexpr,
    CAUSAL: tl.constexpr, SEQUENCES: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A tile of queries of a head -> of_q [Tq, H, NOPE + ROPE]. delta f32 [2, H, Tq]; scale_2: the scale to base 2."""
    head, H = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    sequence, first, found = find_tile(cu_q, B, BM, SEQUENCES, True)
    q_start, k_start = tl.load(cu_q + sequence), tl.load(cu_k + sequence)
    queries, keys = tl.load(cu_q + sequence + 1) - q_start, tl.load(cu_k + sequence + 1) - k_start
    first, queries, keys = tl.where(found, first, 0), tl.where(found, queries, 0), tl.where(found, keys, 0)
    every, some = visible_to(first, queries, keys, BM, BN, CAUSAL)

    q += q_start.to(tl.int64) * q_row + head * q_head
    grad_out += q_start.to(tl.int64) * grad_row + head * grad_head
    k_nope = source_of(k_nope + k_start.to(tl.int64) * k_row + head * k_head, keys, k_row, NOPE, BN, DN, TMA)
    k_rope = source_of(k_rope + k_start.to(tl.int64) * r_row, keys, r_row, ROPE, BN, DR, TMA)
    v = source_of(v + k_start.to(tl.int64) * v_row + head * v_head, keys, v_row, V, BN, DV, TMA)
    q_nope = load_rows(q, first, queries, q_row, NOPE, BM, DN, True, False)
    q_rope = load_rows(q + NOPE, first, queries, q_row, ROPE, BM, DR, True, False)
    grad = load_rows(grad_out, first, queries, grad_row, V, BM, DV, True, False)
    row = first + tl.arange(0, BM)
    last = row + (keys - queries)
    place = delta + head * Tq + q_start + row
    lse = tl.load(place, mask=row < queries, other=float("-inf"))
    shift_of = tl.load(place + H.to(tl.int64) * Tq, mask=row < queries, other=0.0)
    nope_sum = tl.zeros((BM, DN), tl.float32)
    rope_sum = tl.zeros((BM, DR), tl.float32)
    for start in range(0, every, BN):
        nope_sum, rope_sum = add_keys(
            nope_sum, rope_sum, q_nope, q_rope, grad, lse, shift_of, k_nope, k_rope, v, start, keys, last,
            k_row, r_row, v_row, scale_2, NOPE, ROPE, V, BN, CAUSAL, False, TMA,
        )  # fmt: skip
    for start in range(every, some, BN):
        nope_sum, rope_sum = add_keys(
            nope_sum, rope_sum, q_nope, q_rope, grad, lse, shift_of, k_nope, k_rope, v, start, keys, last,
            k_row, r_row, v_row, scale_2, NOPE, ROPE, V, BN, CAUSAL, True, TMA,
        )  # fmt: skip
    width = H * (NOPE + ROPE)
    of_q += head * (NOPE + ROPE)
    mine = of_q + q_start.to(tl.int64) * width
    store_rows(mine, nope_sum * scale, first, queries, width, NOPE)
    store_rows(mine + NOPE, rope_sum * scale, first, queries, width, ROPE)
    for start in range(tl.load(cu_q + B) + tl.program_id(0) * BM, Tq, tl.num_programs(0) * BM):
        store_rows(of_q, tl.zeros((BM, DN), tl.float32), start, Tq, width, NOPE)
        store_rows(of_q + NOPE, tl.zeros((BM, DR), tl.float32), start, Tq, width, ROPE)


@kernel
def attention_rope_kernel(
    shares, of_rope, cu_k, Tk, B, H, ROPE: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr
):  # fmt: skip
    """shares f32 [H, Tk, ROPE] -> their sum, of_rope [Tk, ROPE]; zeros behind the last sequence."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    owned = place < tl.load(cu_k + B).to(tl.int64) * ROPE
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, H, HEADS):
        head = first + tl.arange(0, HEADS)
        mine = shares + head.to(tl.int64)[:, None] * Tk * ROPE + place[None, :]
        total += tl.sum(tl.load(mine, mask=(head < H)[:, None] & owned[None, :], other=0.0), 0)
    tl.store(of_rope + place, total.to(of_rope.dtype.element_ty), mask=place < tl.cast(Tk, tl.int64) * ROPE)


# Launcher ------------------------------------------------------------------------------------------------------------


@gpu_kernel(
    mla_attention_backward,
    lambda grad_out, grad_lse, q, k_nope, k_rope, v, out, lse, cu_q, cu_k, max_q, max_k, scale, causal: (
        attends(q, k_nope, k_rope, v, cu_q, scale) and grad_out.dtype == q.dtype and lse.dtype == torch.float32
    ),
)
def mla_attention_backward_triton(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (Tq, H, _), (Tk, r), B = q.shape, k_rope.shape, len(cu_seqlens_q) - 1
    q, k_nope, k_rope, v, grad_out, out, lse = (by_rows(x) for x in (q, k_nope, k_rope, v, grad_out, out, lse))
    grad_lse = None if grad_lse is None else by_rows(grad_lse)
    heads = head_sizes(k_nope, k_rope, v)
    bits = 8 * q.itemsize

    delta = q.new_empty(2, H, Tq, dtype=torch.float32)
    rows = tile("attention_delta")
    launch(
        attention_delta_kernel, (-(-Tq // rows["ROWS"]), H), grad_out, out, lse, grad_lse, delta, Tq,
        *grad_out.stride()[:2], *out.stride()[:2], lse.stride(0), 0 if grad_lse is None else grad_lse.stride(0),
        scale, V=heads["V"], DV=heads["DV"], enable_fp_fusion=True, **rows,
    )  # fmt: skip

    strides = (
        *grad_out.stride()[:2], *q.stride()[:2], *k_nope.stride()[:2], k_rope.stride(0), *v.stride()[:2]
    )  # fmt: skip
    common: dict[str, Any] = {"CAUSAL": causal, "enable_fp_fusion": True, **heads}
    shape = with_descriptors(tile("attention_keys", bits=bits), q, q[..., heads["NOPE"] :], grad_out)
    of_nope, of_v = q.new_empty(k_nope.shape), q.new_empty(v.shape)
    shares = q.new_empty(H, Tk, r, dtype=torch.float32)
    launch(
        attention_keys_kernel, (most_tiles(Tk, B, shape["BN"]), H), grad_out, q, k_nope, k_rope, v, delta, of_nope,
        shares, of_v, cu_seqlens_q, cu_seqlens_k, Tq, Tk, B, scale, scale * LOG2_E, *strides,
        SEQUENCES=sequences_of(cu_seqlens_k), **common, **shape,
    )  # fmt: skip

    of_q = q.new_empty(q.shape)
    shape = with_descriptors(tile("attention_queries", bits=bits), k_nope, k_rope, v)
    launch(
        attention_queries_kernel, (most_tiles(Tq, B, shape["BM"]), H), grad_out, q, k_nope, k_rope, v, delta, of_q,
        cu_seqlens_q, cu_seqlens_k, Tq, B, scale, scale * LOG2_E, *strides, SEQUENCES=sequences_of(cu_seqlens_q),
        **common, **shape,
    )  # fmt: skip

    of_rope = q.new_empty(Tk, r)
    block = tile("attention_rope")
    launch(
        attention_rope_kernel, (-(-Tk * r // block["BLOCK"]),), shares, of_rope, cu_seqlens_k, Tk, B, H, ROPE=r,
        enable_fp_fusion=True, **block,
    )  # fmt: skip
    return of_q, of_nope, of_rope, of_v
