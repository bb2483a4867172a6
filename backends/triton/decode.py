"""Decoding over the latent cache: a tile of latents is read once, and is keys and values of all heads.

Split by the device. The tiles of all sequences stand in one line that is cut into as many equal shares as there are
workers, whatever the lengths; a worker computes what its share holds of each sequence. A sequence within one share is
finished there. Of the others every worker leaves its part and the part's log-sum-exp, which a second kernel merges in
the order of the shares: results do not depend on timing. The host knows only shapes, so a step can be captured. The
shares are a sum over the lengths, which costs a program less than reading a plan would: mla_decode_plan stays what its
specification is, and is not read.
"""

import math

import torch
import triton.language as tl
from torch import Tensor

from ...ops.mla_cache import mla_decode
from .latent_cache import latent_dim, read_latents, readable, row_format
from .operands import is_real
from .runtime import device_function, gpu_kernel, kernel, launch, power_of_two
from .tables import tile
from .target import current_target

LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2.0))
LOWEST = tl.constexpr(-1e30)  # a maximum to begin with: unlike -inf it may be subtracted from itself


@device_function
def tiles_of(lens, B, workers, BP: tl.constexpr, BT: tl.constexpr):
    """Tiles of each sequence i32 [BP], their sum, and the tiles of a share."""
    sequence = tl.arange(0, BP)
    tiles = (tl.load(lens + sequence, mask=sequence < B, other=0) + (BT - 1)) // BT
    total = tl.sum(tiles, 0)
    return tiles, total, tl.maximum((total + workers - 1) // workers, 1)


@kernel
def mla_decode_kernel(
    q, pages, table, lens, out, lse, part, part_lse, scale_log2, B, S, H, W, page,
    R: tl.constexpr, ROPE: tl.constexpr, RP: tl.constexpr, ROPE_P: tl.constexpr, TILES: tl.constexpr,
    TILE: tl.constexpr, DECODE: tl.constexpr, BP: tl.constexpr, NARROW: tl.constexpr, WHOLE: tl.constexpr,
    EVEN: tl.constexpr, BH: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """BH of the S x H query rows of every sequence, over one share of the tiles.

    q [B, S, H, R + ROPE] -> out [B, S, H, R], lse [B, S, H] of sequences within the share. A share cuts through two
    sequences at most, the first and the last: their parts are part f32 [2 x workers, S x H, R], part_lse (base 2).
    WHOLE: a page holds a whole number of tiles. EVEN: S x H is a multiple of BH.
    """
    dtype: tl.constexpr = q.dtype.element_ty if NARROW else tl.float32
    worker, rows = tl.program_id(1), S * H
    row = tl.program_id(0) * BH + tl.arange(0, BH)
    column, rope_column = tl.arange(0, RP), tl.arange(0, ROPE_P)
    is_row = tl.full((BH,), True, tl.int1) if EVEN else row < rows
    q_mask, rope_mask = is_row[:, None], is_row[:, None]
    if RP != R:
        q_mask = q_mask & (column < R)[None, :]
    if ROPE_P != ROPE:
        rope_mask = rope_mask & (rope_column < ROPE)[None, :]

    tiles, total, per = tiles_of(lens, B, tl.num_programs(1), BP, BT)
    ends = tl.cumsum(tiles, 0)
    begin, end = worker * per, tl.minimum(worker * per + per, total)
    first = tl.sum((ends <= begin).to(tl.int32), 0)
    behind = tl.sum((ends - tiles < end).to(tl.int32), 0)
    start = tl.sum(tl.where(ends <= begin, tiles, 0), 0)
    for b in range(first, behind):
        length = tl.load(lens + b)
        count = (length + (BT - 1)) // BT
        low, high = tl.maximum(begin - start, 0), tl.minimum(end - start, count)
        if low < high:
            own = row + (length >> 31)  # as a number of this sequence: nothing of its addresses outlives it
            first_row = tl.cast(b, tl.int64) * rows
            query = q + first_row * (R + ROPE) + own[:, None] * (R + ROPE)
            q_latent = tl.load(query + column[None, :], mask=q_mask, other=0.0).to(dtype)
            q_rope = tl.load(query + R + rope_column[None, :], mask=rope_mask, other=0.0).to(dtype)
            seen = length - S + 1 + row // H
            largest = tl.full((BH,), LOWEST, tl.float32)
            sums = tl.zeros((BH,), tl.float32)
            acc = tl.zeros((BH, RP), tl.float32)
            entries = table + tl.cast(b, tl.int64) * W
            entry = tl.load(entries + low * BT // page)
            for t in range(low, high):
                token = t * BT + tl.arange(0, BT)
                there = token < length
                if WHOLE:
                    slot, offset = entry.to(tl.int64) * page + t * BT % page, tl.arange(0, BT)
                    # Known ahead: where an address must be read first, the pipeline holds one tile less in flight.
                    entry = tl.load(entries + (t + 1) * BT // page, mask=t + 1 < high, other=0)
                else:
                    slot = 0
                    offset = tl.load(entries + token // page, mask=there, other=0).to(tl.int64) * page + token % page
                latent, rope = read_latents(pages, slot, offset, there, R, ROPE, RP, ROPE_P, TILES, TILE, DECODE, dtype)
                logits = tl.dot(q_rope, tl.trans(rope), input_precision="ieee") * scale_log2
                if t * BT < length:  # always; without a branch Triton has half of the warps repeat the other half
                    logits += tl.dot(q_latent, tl.trans(latent), input_precision="ieee") * scale_log2
                logits = tl.where(token[None, :] < seen[:, None], logits, float("-inf"))
                above = tl.maximum(largest, tl.max(logits, 1))
                p = tl.exp2(logits - above[:, None])
                fade = tl.exp2(largest - above)
                sums = sums * fade + tl.sum(p, 1)
                acc = tl.dot(p.to(dtype), latent, acc * fade[:, None], input_precision="ieee")
                largest = above
            blind = sums == 0
            sums = tl.where(blind, 1.0, sums)
            acc = acc / sums[:, None]
            logsum = tl.where(blind, float("-inf"), largest + tl.log2(sums))
            if high - low == count:
                place = out + first_row * R + (own[:, None] * R + column[None, :])
                tl.store(place, acc.to(out.dtype.element_ty), mask=q_mask)
                tl.store(lse + first_row + row, logsum * LN_2, mask=is_row)
            else:
                first_row = (2 * worker + (low == 0).to(tl.int32)).to(tl.int64) * rows
                part_of_row = part + first_row * R + (own[:, None] * R + column[None, :])
                tl.store(part_of_row, acc, mask=q_mask)
                tl.store(part_lse + first_row + row, logsum, mask=is_row)
        start += count


@kernel
def mla_decode_merge_kernel(
    lens, part, part_lse, out, lse, B, workers,
    R: tl.constexpr, RP: tl.constexpr, BP: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """One query row of one sequence: the parts that workers left of it, PARTS at most, CHUNK of them at a time."""
    row, b, rows = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    tiles, _, per = tiles_of(lens, B, workers, BP, BT)
    sequence = tl.arange(0, BP)
    start = tl.sum(tl.where(sequence < b, tiles, 0), 0)
    count = tl.sum(tl.where(sequence == b, tiles, 0), 0)
    first = start // per
    parts = tl.where(count > 0, (start + count - 1) // per - first + 1, 0)
    if parts != 1:
        column, every = tl.arange(0, RP), tl.arange(0, PARTS)
        base = tl.cast(first, tl.int64) * 2  # every share goes on with the sequence but the one where it begins
        at = (base + 2 * every + (every == 0)) * rows + row
        logsums = tl.load(part_lse + at, mask=every < parts, other=float("-inf"))
        largest = tl.maximum(tl.max(logsums, 0), LOWEST)
        total = tl.sum(tl.exp2(logsums - largest), 0)
        logsum = largest + tl.log2(tl.where(total == 0, 1.0, total))
        acc = tl.zeros((RP,), tl.float32)
        for chunk in range(0, parts, CHUNK):
            index = chunk + tl.arange(0, CHUNK)
            one = (base + 2 * index + (index == 0)) * rows + row
            weight = tl.exp2(tl.load(part_lse + one, mask=index < parts, other=float("-inf")) - logsum)
            mask = (index < parts)[:, None] & (column < R)[None, :]
            acc += tl.sum(weight[:, None] * tl.load(part + one[:, None] * R + column[None, :], mask=mask, other=0.0), 0)
        place = b.to(tl.int64) * rows + row
        tl.store(out + place * R + column, acc.to(out.dtype.element_ty), mask=column < R)
        tl.store(lse + place, tl.where(total == 0, float("-inf"), logsum * LN_2))


# Launchers -----------------------------------------------------------------------------------------------------------


def _decodes(
    q: Tensor, cache: list[Tensor], table: Tensor, lens: Tensor, lens_cpu: Tensor, plan: list[Tensor], scale: float,
    kv_lora_rank: int,
) -> bool:  # fmt: skip
    pages = cache[0]
    return is_real(q) and readable(pages, kv_lora_rank) and q.shape[3] == latent_dim(pages, kv_lora_rank)


def _table_of(q: torch.dtype, cache: torch.dtype) -> str:
    """Whose tiles: products of 16 bits, FP8 times its scale being bfloat16; of float32 where the two differ."""
    if cache == torch.uint8:
        return "mla_decode_fp8" if q == torch.bfloat16 else "mla_decode_f32"
    return "mla_decode" if q == cache != torch.float32 else "mla_decode_f32"


@gpu_kernel(mla_decode, _decodes)
def mla_decode_triton(
    q: Tensor, cache: list[Tensor], table: Tensor, lens: Tensor, lens_cpu: Tensor, plan: list[Tensor], scale: float,
    kv_lora_rank: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (B, S, H, _), (_, page, _), R = q.shape, cache[0].shape, kv_lora_rank
    pages, form = row_format(cache[0], R, least=16)
    name = _table_of(q.dtype, cache[0].dtype)
    shape = dict(tile(name, rows=S * H))
    BT, blocks = shape["BT"], -(-S * H // shape["BH"])
    workers = current_target().units * shape.pop("PER_UNIT") // blocks
    workers = max(1, min(workers, B * -(-table.shape[1] * page // BT)))
    out, lse = q.new_empty(B, S, H, R), q.new_empty(B, S, H, dtype=torch.float32)
    part = q.new_empty(2 * workers, S * H, R, dtype=torch.float32)
    part_lse = q.new_empty(2 * workers, S * H, dtype=torch.float32)
    table, lens, BP = table.contiguous(), lens.contiguous(), power_of_two(B)
    launch(
        mla_decode_kernel, (blocks, workers), q.contiguous(), pages, table, lens, out, lse, part, part_lse,
        scale * LOG2_E, B, S, H, table.shape[1], page, BP=BP, NARROW=name != "mla_decode_f32",
        WHOLE=page % BT == 0, EVEN=S * H % shape["BH"] == 0, enable_fp_fusion=True, **form, **shape,
    )  # fmt: skip
    launch(
        mla_decode_merge_kernel, (S * H, B), lens, part, part_lse, out, lse, B, workers, R=R, RP=form["RP"], BP=BP,
        PARTS=power_of_two(workers), BT=BT, enable_fp_fusion=True, **tile("mla_decode_merge"),
    )  # fmt: skip
    return out, lse
