"""Writing tokens into the latent cache, reading them out again, and what decoding shares of it.

A token is a row of memory: R numbers and r more, or the bytes that stand for them (ops/mla_cache.py). A program moves
some rows whole, so that every row is read and written in pieces of 16 bytes.
"""

import torch
import triton.language as tl
from torch import Tensor

from ...ops.formats import BLOCK, E4M3, FP8_MAX, num_blocks
from ...ops.mla_cache import fp8_latent_bytes, fp8_latent_rank, mla_cache_gather, mla_cache_write
from .fp8_bits import read_fp8, write_fp8
from .operands import by_rows, is_real
from .quantize import storage
from .runtime import device_function, gpu_kernel, kernel, launch, power_of_two
from .tables import tile

E4M3_LARGEST = tl.constexpr(FP8_MAX[E4M3])


@device_function
def read_latents(
    pages, first, row, there, R: tl.constexpr, ROPE: tl.constexpr, RP: tl.constexpr, ROPE_P: tl.constexpr,
    TILES: tl.constexpr, TILE: tl.constexpr, DECODE: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Rows first (i64) + row [n] of a cache -> latents [n, RP], rotary parts [n, ROPE_P] in TYPE; 0 where not `there`.

    TILES: scales of a row, 0 for a cache of real numbers; each is of TILE values. RP, ROPE_P: powers of two that hold
    R and ROPE. DECODE: see `read_fp8`.
    """
    column, rope_column = tl.arange(0, RP), tl.arange(0, ROPE_P)
    mask, rope_mask = there[:, None], there[:, None]
    if RP != R:
        mask = mask & (column < R)[None, :]
    if ROPE_P != ROPE:
        rope_mask = rope_mask & (rope_column < ROPE)[None, :]
    if TILES == 0:
        place = pages + first * (R + ROPE) + row[:, None] * (R + ROPE)
        latent = tl.load(place + column[None, :], mask=mask, other=0.0)
        rope = tl.load(place + R + rope_column[None, :], mask=rope_mask, other=0.0)
    else:
        BYTES: tl.constexpr = R + 4 * TILES + 2 * ROPE
        GROUPS: tl.constexpr = RP // TILE
        start = pages + first * BYTES
        values = read_fp8(start + row[:, None] * BYTES + column[None, :], mask, DECODE)
        group = tl.arange(0, GROUPS)
        scales = start.to(tl.pointer_type(tl.float32), bitcast=True) + row[:, None] * (BYTES // 4) + R // 4
        scale = tl.load(scales + group[None, :], mask=there[:, None] & (group < TILES)[None, :], other=0.0)
        values = tl.reshape(values, (row.shape[0], GROUPS, TILE))
        latent = tl.reshape(values * tl.expand_dims(scale, 2), (row.shape[0], RP))
        ropes = (
            start.to(tl.pointer_type(tl.bfloat16), bitcast=True) + row[:, None] * (BYTES // 2) + (R // 2 + 2 * TILES)
        )
        rope = tl.load(ropes + rope_column[None, :], mask=rope_mask, other=0.0)
    return latent.to(TYPE), rope.to(TYPE)


@kernel
def mla_cache_write_kernel(
    latent, slots, pages, T, latent_row,
    R: tl.constexpr, ROPE: tl.constexpr, RP: tl.constexpr, ROPE_P: tl.constexpr, TILES: tl.constexpr,
    TILE: tl.constexpr, DECODE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """latent [T, R + ROPE] -> rows slots[t] of the cache; a program ROWS of them."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column, rope_column, there = tl.arange(0, RP), tl.arange(0, ROPE_P), token < T
    mask = there[:, None] & (column < R)[None, :]
    rope_mask = there[:, None] & (rope_column < ROPE)[None, :]
    row = tl.load(slots + token, mask=there, other=0).to(tl.int64)[:, None]
    source = latent + token.to(tl.int64)[:, None] * latent_row
    values = tl.load(source + column[None, :], mask=mask, other=0.0).to(tl.float32)
    rope = tl.load(source + R + rope_column[None, :], mask=rope_mask, other=0.0).to(tl.float32)
    if TILES == 0:
        real = pages.dtype.element_ty
        tl.store(pages + row * (R + ROPE) + column[None, :], values.to(real), mask=mask)
        tl.store(pages + row * (R + ROPE) + R + rope_column[None, :], rope.to(real), mask=rope_mask)
    else:
        BYTES: tl.constexpr = R + 4 * TILES + 2 * ROPE
        GROUPS: tl.constexpr = RP // TILE
        tiles = tl.reshape(values, (ROWS, GROUPS, TILE))
        # The largest of a tile passes over NaN, of which the specification makes a scale of 1.
        is_nan = tl.max((tiles != tiles).to(tl.int32), 2) != 0
        largest = tl.max(tl.abs(tiles), 2)
        scale = tl.div_rn(largest, tl.full(largest.shape, E4M3_LARGEST, tl.float32))
        scale = tl.where((scale > 0) & ~is_nan, scale, 1.0)
        scaled = tl.div_rn(tiles, tl.broadcast_to(tl.expand_dims(scale, 2), tiles.shape))
        clamped = tl.minimum(tl.maximum(scaled, -E4M3_LARGEST), E4M3_LARGEST)
        scaled = tl.where(scaled != scaled, scaled, clamped)
        write_fp8(pages + row * BYTES + column[None, :], tl.reshape(scaled, (ROWS, RP)), mask, DECODE)
        group = tl.arange(0, GROUPS)
        scales = pages.to(tl.pointer_type(tl.float32), bitcast=True) + row * (BYTES // 4) + R // 4
        tl.store(scales + group[None, :], scale, mask=there[:, None] & (group < TILES)[None, :])
        ropes = pages.to(tl.pointer_type(tl.bfloat16), bitcast=True) + row * (BYTES // 2) + (R // 2 + 2 * TILES)
        tl.store(ropes + rope_column[None, :], rope.to(tl.bfloat16), mask=rope_mask)


@kernel
def mla_cache_gather_kernel(
    pages, table, lens, cu_seqlens, out, B, W, page, total,
    R: tl.constexpr, ROPE: tl.constexpr, RP: tl.constexpr, ROPE_P: tl.constexpr, TILES: tl.constexpr,
    TILE: tl.constexpr, DECODE: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out [total, R + ROPE]; a program ROWS of them. STEPS: halvings that find one of B sequences."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # The first sequence that ends behind the row, B where none does: below `low` all end before, from `high` on none.
    low, high = tl.zeros((ROWS,), tl.int32), tl.zeros((ROWS,), tl.int32) + B
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        before = (tl.load(cu_seqlens + 1 + middle, mask=middle < B, other=0) <= place) & (low < high)
        low, high = tl.where(before, middle + 1, low), tl.where(before, high, middle)
    owned = (place < total) & (low < B)
    token = place - tl.load(cu_seqlens + low, mask=owned, other=0)
    there = owned & (token < tl.load(lens + low, mask=owned, other=0)) & (token >= 0)
    entry = tl.load(table + low.to(tl.int64) * W + token // page, mask=there, other=0).to(tl.int64)
    row = entry * page + token % page
    latent, rope = read_latents(pages, 0, row, there, R, ROPE, RP, ROPE_P, TILES, TILE, DECODE, out.dtype.element_ty)
    column, rope_column, mask = tl.arange(0, RP)[None, :], tl.arange(0, ROPE_P)[None, :], (place < total)[:, None]
    target = out + place.to(tl.int64)[:, None] * (R + ROPE)
    tl.store(target + column, latent, mask=mask & (column < R))
    tl.store(target + R + rope_column, rope, mask=mask & (rope_column < ROPE))


# Launchers -----------------------------------------------------------------------------------------------------------


def latent_dim(pages: Tensor, kv_lora_rank: int) -> int:
    """R + r of the latents that a row of this cache holds."""
    if pages.dtype != torch.uint8:
        return pages.shape[2]
    return kv_lora_rank + (pages.shape[2] - fp8_latent_bytes(kv_lora_rank, 0)) // 2


def readable(pages: Tensor, kv_lora_rank: int) -> bool:
    """Do kernels read this cache? The parts of a row of bytes must lie where their types may lie."""
    if not pages.is_contiguous() or not 0 < kv_lora_rank <= latent_dim(pages, kv_lora_rank):
        return False
    if pages.dtype == torch.uint8:
        aligned = kv_lora_rank % 4 == 0 and pages.shape[2] % 4 == 0 and pages.storage_offset() % 4 == 0
        return aligned and (kv_lora_rank <= BLOCK or kv_lora_rank % BLOCK == 0)
    return is_real(pages)


def row_format(pages: Tensor, kv_lora_rank: int, least: int = 1) -> tuple[Tensor, dict[str, int | bool]]:
    """A cache as kernels take it, and what they must know of its rows; blocks measure `least` at least."""
    R, RP = kv_lora_rank, power_of_two(kv_lora_rank, least)
    rope = latent_dim(pages, R) - R
    if pages.dtype != torch.uint8:
        return pages, {
            "R": R, "ROPE": rope, "RP": RP, "ROPE_P": power_of_two(rope, least), "TILES": 0, "TILE": RP,
            "DECODE": False,
        }  # fmt: skip
    values, decode = storage(pages.view(E4M3))
    return values, {
        "R": R, "ROPE": rope, "RP": RP, "ROPE_P": power_of_two(rope, least), "TILES": num_blocks(R),
        "TILE": min(RP, BLOCK), "DECODE": decode,
    }  # fmt: skip


def _rank(pages: Tensor, latent: Tensor) -> int:
    """kv_lora_rank. A row of real numbers may be cut in two anywhere: at the largest power of two within it."""
    if pages.dtype == torch.uint8:
        return fp8_latent_rank(latent.shape[1], pages.shape[2])
    return 1 << ((latent.shape[1] - 1).bit_length() - 1)


def _writes(cache: list[Tensor], slots: Tensor, latent: Tensor) -> bool:
    if not is_real(latent) or latent.shape[1] < 2:
        return False
    R = _rank(cache[0], latent)
    return readable(cache[0], R) and latent.shape[1] == latent_dim(cache[0], R)


@gpu_kernel(mla_cache_write, _writes)
def mla_cache_write_triton(cache: list[Tensor], slots: Tensor, latent: Tensor) -> None:
    T = latent.shape[0]
    latent = by_rows(latent)
    pages, rows = row_format(cache[0], _rank(cache[0], latent))
    shape = tile("mla_cache_write", T=T)
    launch(
        mla_cache_write_kernel, (-(-T // shape["ROWS"]),), latent, slots.contiguous(), pages, T, latent.stride(0),
        **rows, **shape,
    )  # fmt: skip


def _gathers(
    cache: list[Tensor], table: Tensor, lens: Tensor, cu_seqlens: Tensor, total: int, kv_lora_rank: int
) -> bool:
    return readable(cache[0], kv_lora_rank)


@gpu_kernel(mla_cache_gather, _gathers)
def mla_cache_gather_triton(
    cache: list[Tensor], table: Tensor, lens: Tensor, cu_seqlens: Tensor, total: int, kv_lora_rank: int
) -> Tensor:
    pages, rows = row_format(cache[0], kv_lora_rank)
    B, W = table.shape
    dtype = torch.bfloat16 if cache[0].dtype == torch.uint8 else cache[0].dtype
    out = pages.new_empty(total, rows["R"] + rows["ROPE"], dtype=dtype)
    shape = tile("mla_cache_gather", total=total)
    launch(
        mla_cache_gather_kernel, (-(-total // shape["ROWS"]),), pages, table.contiguous(), lens.contiguous(),
        cu_seqlens.contiguous(), out, B, W, cache[0].shape[1], total, STEPS=B.bit_length(), **rows, **shape,
    )  # fmt: skip
    return out
