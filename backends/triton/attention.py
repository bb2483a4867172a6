"""Attention in its expanded form, forward: softmax(q k^T) v within each sequence, online, in one pass over the keys.

A program owns a tile of queries of one head. It reads the keys that all its queries see without masks, then those on
the diagonal and at the sequence's end with masks. Logits are two products, q_nope k_nope^T + q_rope k_rope^T: the
rotary key stays [Tk, r] in memory, and its tiles are shared by all heads' programs through the cache. Which sequence a
tile belongs to is found on the device: the grid is an upper bound, and the programs beyond it find nothing to do.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...ops.mla import mla_attention
from .operands import by_rows, is_real
from .runtime import device_function, gpu_kernel, kernel, launch, power_of_two
from .tables import tile

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)


@device_function
def find_tile(cu_seqlens, B, SIDE: tl.constexpr, SEQUENCES: tl.constexpr, LAST_FIRST: tl.constexpr):
    """program_id(0) -> (sequence, first row within it, is there a tile at all?) of tiles of SIDE rows.

    The sequences take turns, each from its first tile or, LAST_FIRST, from its last: the tiles with most work, which
    are at that end under a causal mask, start first, and short ones fill the gaps at the end.
    """
    index = tl.program_id(0)
    if SEQUENCES == 1:
        tiles = tl.cdiv(tl.load(cu_seqlens + 1) - tl.load(cu_seqlens), SIDE)
        place = tiles - 1 - index if LAST_FIRST else index
        return 0, place * SIDE, index < tiles
    else:
        at = tl.arange(0, SEQUENCES)
        starts = tl.load(cu_seqlens + at, mask=at < B, other=0)
        ends = tl.load(cu_seqlens + at + 1, mask=at < B, other=0)
        upto = tl.cumsum((ends - starts + SIDE - 1) // SIDE, 0)
        tiles = tl.max(upto, 0)
        place = index % B * (tiles // B) + tl.minimum(index % B, tiles % B) + index // B
        if LAST_FIRST:
            place = tiles - 1 - place
        passed = upto <= place
        sequence = tl.minimum(tl.sum(passed.to(tl.int32), 0), B - 1)
        return sequence, (place - tl.max(tl.where(passed, upto, 0), 0)) * SIDE, index < tiles


@device_function
def source_of(base, end, stride, COLUMNS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr):
    """What `load_rows` reads base [end, COLUMNS] from: the pointer, TMA: a descriptor, which ends where `end` says."""
    if TMA:
        return tl.make_tensor_descriptor(base, [tl.maximum(end, 1), COLUMNS], [stride, 1], [ROWS, WIDTH])
    else:
        return base


@device_function
def load_rows(
    base, start, end, stride, COLUMNS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Rows start .. start + ROWS of base [end, COLUMNS] as [ROWS, WIDTH]; zeros beyond COLUMNS, MASKED: beyond end."""
    if TMA:
        return base.load([start, 0])
    else:
        row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
        place = base + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + column[None, :])
        inside = (column < COLUMNS)[None, :]
        if MASKED:
            within = (row < end - start)[:, None]
            return tl.load(place, mask=within if COLUMNS == WIDTH else within & inside, other=0.0)
        elif COLUMNS == WIDTH:
            return tl.load(place)
        else:
            return tl.load(place, mask=inside, other=0.0)


@device_function
def store_rows(base, values, start, end, stride, COLUMNS: tl.constexpr):
    """Write [ROWS, WIDTH] over rows start .. start + ROWS of base [end, COLUMNS]."""
    row, column = tl.arange(0, values.shape[0]), tl.arange(0, values.shape[1])
    place = base + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + column[None, :])
    mask = (row < end - start)[:, None] & (column < COLUMNS)[None, :]
    tl.store(place, values.to(base.dtype.element_ty), mask=mask)


@device_function
def visible_to(first, queries, keys, SIDE: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr):
    """(keys that every query of a tile sees, in whole blocks; keys that one of them sees) for first .. first + SIDE."""
    if CAUSAL:
        shift = keys - queries
        some = tl.maximum(tl.minimum(first + SIDE, queries) + shift, 0)
        return tl.maximum(first + shift + 1, 0) // BLOCK * BLOCK, some
    else:
        return keys // BLOCK * BLOCK, keys


@device_function
def attend(
    total, weight, top, q_nope, q_rope, k_nope, k_rope, v, start, keys, last, k_row, r_row, v_row, scale,
    NOPE: tl.constexpr, ROPE: tl.constexpr, V: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One block of keys: total [BM, dv] of weighted values, weight [BM] of the probabilities, top [BM] logit so far.

    scale: to base 2. last [BM]: the last key that a query sees.
    """
    k_nope = load_rows(k_nope, start, keys, k_row, NOPE, BN, q_nope.shape[1], MASKED, TMA)
    k_rope = load_rows(k_rope, start, keys, r_row, ROPE, BN, q_rope.shape[1], MASKED, TMA)
    logits = tl.dot(q_nope, tl.trans(k_nope), input_precision="ieee")
    logits = tl.dot(q_rope, tl.trans(k_rope), logits, input_precision="ieee")
    if MASKED:
        key = start + tl.arange(0, BN)
        seen = key[None, :] <= last[:, None] if CAUSAL else (key < keys)[None, :]
        logits = tl.where(seen, logits, float("-inf"))
    highest = tl.maximum(top, tl.max(logits, 1) * scale)
    reference = tl.where(highest == float("-inf"), 0.0, highest) if MASKED else highest
    p = tl.exp2(logits * scale - reference[:, None])
    fade = tl.exp2(top - reference)
    weight = weight * fade + tl.sum(p, 1)
    v = load_rows(v, start, keys, v_row, V, BN, total.shape[1], MASKED, TMA)
    total = tl.dot(p.to(v.dtype), v, total * fade[:, None], input_precision="ieee")
    return total, weight, highest


@kernel
def attention_kernel(
    q, k_nope, k_rope, v, out, lse, cu_q, cu_k, Tq, B, scale,
    q_row, q_head, k_row, k_head, r_row, v_row, v_head,
    NOPE: tl.constexpr, ROPE: tl.constexpr, V: tl.constexpr, DN: tl.constexpr, DR: tl.constexpr, DV: tl.constexpr,
    CAUSAL: tl.constexpr, SEQUENCES: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A tile of queries of a head. q [Tq, H, NOPE + ROPE], k_nope [Tk, H, NOPE], k_rope [Tk, ROPE], v [Tk, H, V] ->
    out [Tq, H, V], lse f32 [Tq, H]; scale: of the logits, to base 2."""
    head, H = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    sequence, first, found = find_tile(cu_q, B, BM, SEQUENCES, True)
    q_start, k_start = tl.load(cu_q + sequence), tl.load(cu_k + sequence)
    queries, keys = tl.load(cu_q + sequence + 1) - q_start, tl.load(cu_k + sequence + 1) - k_start
    first, queries, keys = tl.where(found, first, 0), tl.where(found, queries, 0), tl.where(found, keys, 0)
    every, some = visible_to(first, queries, keys, BM, BN, CAUSAL)

    q += q_start.to(tl.int64) * q_row + head * q_head
    k_nope = source_of(k_nope + k_start.to(tl.int64) * k_row + head * k_head, keys, k_row, NOPE, BN, DN, TMA)
    k_rope = source_of(k_rope + k_start.to(tl.int64) * r_row, keys, r_row, ROPE, BN, DR, TMA)
    v = source_of(v + k_start.to(tl.int64) * v_row + head * v_head, keys, v_row, V, BN, DV, TMA)
    q_nope = load_rows(q, first, queries, q_row, NOPE, BM, DN, True, False)
    q_rope = load_rows(q + NOPE, first, queries, q_row, ROPE, BM, DR, True, False)
    row = first + tl.arange(0, BM)
    last = row + (keys - queries)
    total = tl.zeros((BM, DV), tl.float32)
    weight = tl.zeros((BM,), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    for start in range(0, every, BN):
        total, weight, top = attend(
            total, weight, top, q_nope, q_rope, k_nope, k_rope, v, start, keys, last, k_row, r_row, v_row, scale,
            NOPE, ROPE, V, BN, CAUSAL, False, TMA,
        )  # fmt: skip
    for start in range(every, some, BN):
        total, weight, top = attend(
            total, weight, top, q_nope, q_rope, k_nope, k_rope, v, start, keys, last, k_row, r_row, v_row, scale,
            NOPE, ROPE, V, BN, CAUSAL, True, TMA,
        )  # fmt: skip
    blind = weight == 0.0
    weight = tl.where(blind, 1.0, weight)
    out += head * V
    lse += head
    store_rows(out + q_start.to(tl.int64) * H * V, total / weight[:, None], first, queries, H * V, V)
    place = lse + (q_start + row).to(tl.int64) * H
    tl.store(place, tl.where(blind, float("-inf"), (top + tl.log2(weight)) * LN_2), mask=row < queries)

    # What lies behind the last sequence is shared out among the programs.
    for start in range(tl.load(cu_q + B) + tl.program_id(0) * BM, Tq, tl.num_programs(0) * BM):
        store_rows(out, tl.zeros((BM, DV), tl.float32), start, Tq, H * V, V)
        behind = start + tl.arange(0, BM)
        tl.store(lse + behind.to(tl.int64) * H, tl.full((BM,), float("-inf"), tl.float32), mask=behind < Tq)


# Launchers -----------------------------------------------------------------------------------------------------------


def attends(q: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> bool:
    """Do the kernels take these? One dtype of 16 or 32 bits, heads of at most V3's sizes, for which the tiles are made.

    The scale must be positive: the largest logit is looked for before it is scaled.
    """
    n, r, dv = k_nope.shape[2], k_rope.shape[1], v.shape[2]
    same = q.dtype == k_nope.dtype == k_rope.dtype == v.dtype
    return same and is_real(q) and n <= 128 and r <= 64 and dv <= 128 and len(cu_seqlens) > 1 and scale > 0


def head_sizes(k_nope: Tensor, k_rope: Tensor, v: Tensor) -> dict[str, int]:
    """The sizes of a head, and those of its blocks."""
    n, r, dv = k_nope.shape[2], k_rope.shape[1], v.shape[2]
    blocks = {name: power_of_two(size, 16) for name, size in (("DN", n), ("DR", r), ("DV", dv))}
    return {"NOPE": n, "ROPE": r, "V": dv, **blocks}


def with_descriptors(shape: dict[str, Any], *tensors: Tensor) -> dict[str, Any]:
    """The tile with TMA settled: where its row asks for descriptors and all that they describe begins at 16 bytes."""
    steps = [step * x.itemsize for x in tensors for step in x.stride()[:-1]]  # 0 where a gradient is expanded
    fit = all(step > 0 and step % 16 == 0 for step in steps) and all(x.data_ptr() % 16 == 0 for x in tensors)
    return {**shape, "TMA": shape.get("TMA", False) and fit}


def most_tiles(T: int, B: int, side: int) -> int:
    """No T rows in B sequences make more tiles."""
    return T // side + B


def sequences_of(cu_seqlens: Tensor) -> int:
    """How many sequences `find_tile` looks at, at once: few different numbers, for each of which there is a kernel."""
    sequences = len(cu_seqlens) - 1
    return 1 if sequences == 1 else power_of_two(sequences, 128)


@gpu_kernel(mla_attention, lambda q, k_nope, k_rope, v, cu_q, cu_k, max_q, max_k, scale, causal: attends(
    q, k_nope, k_rope, v, cu_q, scale
))  # fmt: skip
def mla_attention_triton(
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
    (Tq, H, _), B = q.shape, len(cu_seqlens_q) - 1
    q, k_nope, k_rope, v = (by_rows(x) for x in (q, k_nope, k_rope, v))
    out, lse = q.new_empty(Tq, H, v.shape[2]), q.new_empty(Tq, H, dtype=torch.float32)
    shape = with_descriptors(tile("attention", bits=8 * q.itemsize, max_q=max_q), k_nope, k_rope, v)
    launch(
        attention_kernel, (most_tiles(Tq, B, shape["BM"]), H), q, k_nope, k_rope, v, out, lse, cu_seqlens_q,
        cu_seqlens_k, Tq, B, scale * LOG2_E, *q.stride()[:2], *k_nope.stride()[:2], k_rope.stride(0), *v.stride()[:2],
        CAUSAL=causal, SEQUENCES=sequences_of(cu_seqlens_q), enable_fp_fusion=True,
        **head_sizes(k_nope, k_rope, v), **shape,
    )  # fmt: skip
    return out, lse
