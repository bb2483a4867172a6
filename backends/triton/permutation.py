"""Moving tokens to their experts and back: a stable counting sort of (token, choice) pairs, and copies of wide rows.

The sort counts in blocks of pairs; then every block finds where its pairs go, from the counts of the blocks before it
and the ranks within itself: in integers, the same whatever the order of programs. The copies read a token once and
write its k rows, or read its k rows and write their sum.
"""

import torch
import triton.language as tl
from torch import Tensor

from ...ops.formats import E4M3, FP8_MAX, num_blocks
from ...ops.moe import (
    permute,
    permute_quantize,
    permuted_rows,
    unpermute,
    unpermute_backward,
    unpermute_backward_w,
)
from .fp8_bits import as_fp8
from .operands import as_rows, is_real
from .quantize import SIDE, knows, quantized, scales_like, storage
from .runtime import device_function, gpu_kernel, kernel, launch
from .runtime import power_of_two as padded
from .tables import tile
from .target import current_target

MOST_EXPERTS = 1024  # counters of a program
FEW_BLOCKS = 4  # of pairs: every program counts them by itself, which saves a launch when decoding


@kernel
def count_kernel(idx, counts, pairs, EP: tl.constexpr, BLOCK: tl.constexpr):
    """idx i32 [pairs] -> counts i32 [blocks, EP]: how many pairs of each block chose each expert."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(idx + pair, mask=pair < pairs, other=0)
    count = tl.histogram(expert, EP, mask=pair < pairs)
    tl.store(counts + tl.program_id(0) * EP + tl.arange(0, EP), count)


@kernel
def place_kernel(
    idx, counts, row_map, offsets, filled, pairs, blocks, E,
    ALIGN: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr, BATCH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """idx i32 [pairs], counts as count_kernel's or None -> row_map i32 [pairs]; offsets i32 [E + 1], where segments
    begin; filled i32 [E], where their rows without a token begin. A program places one block of pairs."""
    block, expert, place = tl.program_id(0), tl.arange(0, EP), tl.arange(0, BLOCK)
    if counts is None:
        total, before = tl.zeros((EP,), tl.int32), tl.zeros((EP,), tl.int32)
        for one in range(blocks):
            of_one = one * BLOCK + place
            count = tl.histogram(tl.load(idx + of_one, mask=of_one < pairs, other=0), EP, mask=of_one < pairs)
            total += count
            before += tl.where(one < block, count, 0)
    else:
        totals, befores = tl.zeros((BATCH, EP), tl.int32), tl.zeros((BATCH, EP), tl.int32)
        for first in range(0, blocks, BATCH):
            some = first + tl.arange(0, BATCH)
            of_some = tl.load(counts + some[:, None] * EP + expert[None, :], mask=(some < blocks)[:, None], other=0)
            totals += of_some
            befores += tl.where((some < block)[:, None], of_some, 0)
        total, before = tl.sum(totals, 0), tl.sum(befores, 0)
    aligned = (total + (ALIGN - 1)) // ALIGN * ALIGN
    ends = tl.cumsum(aligned, 0)
    begins = ends - aligned
    if block == 0:
        tl.store(offsets, 0)
        tl.store(offsets + 1 + expert, ends, mask=expert < E)
        tl.store(filled + expert, begins + total, mask=expert < E)

    pair = block * BLOCK + place
    known = pair < pairs
    mine = tl.load(idx + pair, mask=known, other=0)
    rank = tl.zeros((BLOCK,), tl.int32)  # how many pairs before it in its block chose the same expert
    for first in range(0, BLOCK, WIDTH):
        other = first + tl.arange(0, WIDTH)
        theirs = tl.load(idx + block * BLOCK + other, mask=block * BLOCK + other < pairs, other=-1)
        same = (theirs[:, None] == mine[None, :]) & (other[:, None] < place[None, :])
        rank += tl.sum(same.to(tl.int32), 0)
    tl.store(row_map + pair, tl.gather(begins + before, mine, 0) + rank, mask=known)


@device_function
def is_empty(row, rows, offsets, filled, marks, E, EP: tl.constexpr):
    """Which rows hold no token: those between `filled` and the next segment and behind the last; or those unmarked."""
    if marks is not None:
        empty = tl.load(marks + row, mask=row < rows, other=1) == 0
    else:
        SOME: tl.constexpr = EP if EP < 64 else 64
        within = tl.zeros(row.shape, tl.int32)
        for first in range(0, EP, SOME):
            expert = first + tl.arange(0, SOME)
            begins = tl.load(offsets + expert, mask=expert < E, other=0)
            ends = tl.load(filled + expert, mask=expert < E, other=0)
            within += tl.sum(((begins[None, :] <= row[:, None]) & (row[:, None] < ends[None, :])).to(tl.int32), 1)
        empty = within == 0
    return empty & (row < rows)


@device_function
def spread(
    x, w, row_map, out, T, D, x_row, program, slice, K: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Copy a slice of TOKENS tokens to their rows, times their weights if there are any."""
    token = program.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = slice * BLOCK + tl.arange(0, BLOCK)
    mask = (token < T)[:, None] & (column < D)[None, :]
    values = tl.load(x + token[:, None] * x_row + column[None, :], mask=mask)
    for j in tl.static_range(K):
        row = tl.load(row_map + token * K + j, mask=token < T, other=0).to(tl.int64)
        copied = values
        if w is not None:
            weight = tl.load(w + token * K + j, mask=token < T, other=0.0)
            copied = (values.to(tl.float32) * weight[:, None]).to(out.dtype.element_ty)
        tl.store(out + row[:, None] * D + column[None, :], copied, mask=mask)


@kernel
def spread_kernel(
    x, w, row_map, offsets, filled, marks, out, T, rows, D, E, x_row, copying, slices,
    CLEAR: tl.constexpr, K: tl.constexpr, EP: tl.constexpr, TOKENS: tl.constexpr, EMPTY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """x [T, D] -> out [rows, D]: row row_map[t, j] is x[t], times w[t, j] if there is w; rows without a token are 0.

    The first `copying` programs copy a slice of BLOCK columns of TOKENS tokens each, the others (CLEAR: there are some)
    clear those of EMPTY rows that are empty.
    """
    program = tl.program_id(0)
    if CLEAR:
        if program < copying:
            spread(x, w, row_map, out, T, D, x_row, program // slices, program % slices, K, TOKENS, BLOCK)
        else:
            row = (program - copying).to(tl.int64) * EMPTY + tl.arange(0, EMPTY)
            empty = is_empty(row, rows, offsets, filled, marks, E, EP)
            nothing = tl.zeros((EMPTY, BLOCK), out.dtype.element_ty)
            for first in range(0, D, BLOCK):
                column = first + tl.arange(0, BLOCK)
                tl.store(out + row[:, None] * D + column[None, :], nothing, mask=empty[:, None] & (column < D)[None, :])
    else:
        spread(x, w, row_map, out, T, D, x_row, program // slices, program % slices, K, TOKENS, BLOCK)


@device_function
def spread_quantized(
    x, row_map, q, s, D, x_row, s_column, token, slice,
    K: tl.constexpr, TILES: tl.constexpr, FP8_LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    """Quantise TILES tiles of a token and copy them and their scales to its rows."""
    tiles = slice * TILES + tl.arange(0, TILES)
    column = tiles[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    values = tl.load(x + token.to(tl.int64) * x_row + column, mask=column < D, other=0.0).to(tl.float32)
    scaled, scale = quantized(values, 1, FP8_LARGEST, POWER_OF_TWO)
    narrow = as_fp8(scaled, q, DECODE)
    for j in tl.static_range(K):
        row = tl.load(row_map + token * K + j).to(tl.int64)
        tl.store(q + row * D + column, narrow, mask=column < D)
        tl.store(s + tiles.to(tl.int64) * s_column + row, scale, mask=tiles * SIDE < D)


@kernel
def spread_quantize_kernel(
    x, row_map, offsets, filled, q, s, T, rows, D, E, x_row, s_column, slices,
    CLEAR: tl.constexpr, K: tl.constexpr, EP: tl.constexpr, EMPTY: tl.constexpr, TILES: tl.constexpr,
    FP8_LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    """As spread_kernel, of quantised tokens: q [rows, D] FP8, s f32 [rows, Db] M-major; a program copies TILES tiles of
    one token. Empty rows have values 0 and scales 1."""
    program = tl.program_id(0)
    token, slice = program // slices, program % slices
    if CLEAR:
        if token < T:
            spread_quantized(
                x, row_map, q, s, D, x_row, s_column, token, slice, K, TILES, FP8_LARGEST, POWER_OF_TWO, DECODE
            )
        else:
            row = (program - T * slices).to(tl.int64) * EMPTY + tl.arange(0, EMPTY)
            empty = is_empty(row, rows, offsets, filled, None, E, EP)
            nothing = as_fp8(tl.zeros((EMPTY, TILES * SIDE), tl.float32), q, DECODE)
            ones = tl.full((TILES, EMPTY), 1.0, tl.float32)
            for first in range(0, slices):
                column = first * TILES * SIDE + tl.arange(0, TILES * SIDE)
                tl.store(q + row[:, None] * D + column[None, :], nothing, mask=empty[:, None] & (column < D)[None, :])
                tiles = first * TILES + tl.arange(0, TILES)
                into = s + tiles.to(tl.int64)[:, None] * s_column + row[None, :]
                tl.store(into, ones, mask=(tiles * SIDE < D)[:, None] & empty[None, :])
    else:
        spread_quantized(
            x, row_map, q, s, D, x_row, s_column, token, slice, K, TILES, FP8_LARGEST, POWER_OF_TWO, DECODE
        )


@kernel
def mark_kernel(row_map, marks, pairs, BLOCK: tl.constexpr):
    """marks u8 [rows]: 1 where row_map [pairs] points."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(row_map + pair, mask=pair < pairs, other=0)
    tl.store(marks + row, tl.full((BLOCK,), 1, tl.uint8), mask=pair < pairs)


@kernel
def unpermute_kernel(
    y, row_map, w, out, T, D, y_row, slices, K: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """y [R, D], row_map i32 [T, K], w f32 [T, K] or None -> out [T, D]: the sum of each token's rows, in order."""
    token = (tl.program_id(0) // slices).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = (tl.program_id(0) % slices) * BLOCK + tl.arange(0, BLOCK)
    mask = (token < T)[:, None] & (column < D)[None, :]
    total = tl.zeros((TOKENS, BLOCK), tl.float32)
    for j in tl.static_range(K):
        row = tl.load(row_map + token * K + j, mask=token < T, other=0).to(tl.int64)
        values = tl.load(y + row[:, None] * y_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if w is not None:
            values = values * tl.load(w + token * K + j, mask=token < T, other=0.0)[:, None]
        total += values
    tl.store(out + token[:, None] * D + column[None, :], total.to(out.dtype.element_ty), mask=mask)


@kernel
def unpermute_w_kernel(
    grad, y, row_map, out, D, grad_row, y_row, K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """grad [T, D], y [R, D], row_map i32 [T, K] -> out f32 [T, K]: the products of a token with its rows; a program
    a token."""
    token, choice = tl.program_id(0).to(tl.int64), tl.arange(0, KP)
    row = tl.load(row_map + token * K + choice, mask=choice < K, other=0).to(tl.int64)
    total = tl.zeros((KP, BLOCK), tl.float32)
    for first in range(0, D, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mask = (choice < K)[:, None] & (column < D)[None, :]
        of_token = tl.load(grad + token * grad_row + column, mask=column < D, other=0.0).to(tl.float32)
        values = tl.load(y + row[:, None] * y_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
        total += values * of_token[None, :]
    tl.store(out + token * K + choice, tl.sum(total, 1), mask=choice < K)


# Launchers -----------------------------------------------------------------------------------------------------------

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # rows are copied as bits, whatever they mean


def place_pairs(idx: Tensor, num_experts: int, align: int) -> tuple[Tensor, Tensor, Tensor]:
    """-> row_map i32 [T, k], offsets i32 [E + 1], filled i32 [E]."""
    idx, EP = idx.contiguous(), padded(num_experts)
    row_map, offsets, filled = torch.empty_like(idx), idx.new_empty(num_experts + 1), idx.new_empty(num_experts)
    shape = tile("place", E=EP)
    blocks, counts = max(-(-idx.numel() // shape["BLOCK"]), 1), None
    if blocks > FEW_BLOCKS:
        counting = {name: shape[name] for name in ("BLOCK", "num_warps")}
        counts = idx.new_empty(blocks, EP)
        launch(count_kernel, (blocks,), idx, counts, idx.numel(), EP=EP, **counting)
    launch(
        place_kernel, (blocks,), idx, counts, row_map, offsets, filled, idx.numel(), blocks, num_experts, ALIGN=align,
        EP=EP, **shape,
    )  # fmt: skip
    return row_map, offsets, filled


def places(idx: Tensor, num_experts: int) -> bool:
    """Does `place_pairs` take these?"""
    return idx.dtype == torch.int32 and num_experts <= MOST_EXPERTS


@gpu_kernel(permute, lambda x, idx, num_experts, align: x.element_size() in BITS and places(idx, num_experts))
def permute_triton(x: Tensor, idx: Tensor, num_experts: int, align: int) -> tuple[Tensor, Tensor, Tensor]:
    (T, D), tokens = x.shape, as_rows(x)
    row_map, offsets, filled = place_pairs(idx, num_experts, align)
    rows = permuted_rows(idx.numel(), num_experts, align)
    out, bits = x.new_empty(rows, D), BITS[x.element_size()]
    shape = tile("spread", D=D)
    slices = -(-D // shape["BLOCK"])
    copying = -(-T // shape["TOKENS"]) * slices
    clearing = 0 if align == 1 else -(-rows // shape["EMPTY"])
    launch(
        spread_kernel, (copying + clearing,), tokens.view(bits), None, row_map, offsets, filled, None,
        out.view(bits), T, rows, D, num_experts, tokens.stride(0), copying, slices, CLEAR=align > 1,
        K=idx.shape[1], EP=padded(num_experts), **shape,
    )  # fmt: skip
    return out, row_map, offsets


def _quantizes(
    x: Tensor, idx: Tensor, num_experts: int, align: int, dtype: torch.dtype = E4M3, power_of_two: bool = False
) -> bool:
    return is_real(x) and knows(dtype) and places(idx, num_experts)


@gpu_kernel(permute_quantize, _quantizes)
def permute_quantize_triton(
    x: Tensor, idx: Tensor, num_experts: int, align: int, dtype: torch.dtype, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (T, D), tokens = x.shape, as_rows(x)
    row_map, offsets, filled = place_pairs(idx, num_experts, align)
    rows = permuted_rows(idx.numel(), num_experts, align)
    q, s = x.new_empty(rows, D, dtype=dtype), scales_like(x, rows, num_blocks(D))
    shape = tile("spread_quantize", D=D)
    slices = -(-num_blocks(D) // shape["TILES"])
    clearing = 0 if align == 1 else -(-rows // shape["EMPTY"])
    launch(
        spread_quantize_kernel, (T * slices + clearing,), tokens, row_map, offsets, filled, storage(q)[0], s, T, rows,
        D, num_experts, tokens.stride(0), s.stride(1), slices, CLEAR=align > 1, K=idx.shape[1], EP=padded(num_experts),
        FP8_LARGEST=FP8_MAX[dtype], POWER_OF_TWO=power_of_two, DECODE=dtype != current_target().fp8, **shape,
    )  # fmt: skip
    return q, s, row_map, offsets


def _weighs(w: Tensor | None) -> bool:
    return w is None or w.dtype == torch.float32


@gpu_kernel(unpermute, lambda y, row_map, w: is_real(y) and row_map.dtype == torch.int32 and _weighs(w))
def unpermute_triton(y: Tensor, row_map: Tensor, w: Tensor | None) -> Tensor:
    (T, k), D, rows = row_map.shape, y.shape[1], as_rows(y)
    out = y.new_empty(T, D)
    shape = tile("unpermute", D=D)
    slices = -(-D // shape["BLOCK"])
    launch(
        unpermute_kernel, (-(-T // shape["TOKENS"]) * slices,), rows, row_map.contiguous(),
        None if w is None else w.contiguous(), out, T, D, rows.stride(0), slices, K=k, enable_fp_fusion=True, **shape,
    )  # fmt: skip
    return out


@gpu_kernel(
    unpermute_backward, lambda grad, row_map, w, rows: is_real(grad) and row_map.dtype == torch.int32 and _weighs(w)
)
def unpermute_backward_triton(grad: Tensor, row_map: Tensor, w: Tensor | None, rows: int) -> Tensor:
    (T, D), k, of_out, row_map = grad.shape, row_map.shape[1], as_rows(grad), row_map.contiguous()
    out = grad.new_empty(rows, D)
    shape = tile("spread", D=D)
    slices, marks = -(-D // shape["BLOCK"]), None
    copying = -(-T // shape["TOKENS"]) * slices
    if rows > T * k:  # else every row holds a token: pairs have rows of their own
        marks = torch.zeros(rows, dtype=torch.uint8, device=grad.device)
        marking = tile("mark")
        launch(mark_kernel, (-(-T * k // marking["BLOCK"]),), row_map, marks, T * k, **marking)
    clearing = 0 if marks is None else -(-rows // shape["EMPTY"])
    launch(
        spread_kernel, (copying + clearing,), of_out, None if w is None else w.contiguous(), row_map,
        None, None, marks, out, T, rows, D, 0, of_out.stride(0), copying, slices, CLEAR=marks is not None, K=k,
        EP=1, **shape,
    )  # fmt: skip
    return out


@gpu_kernel(unpermute_backward_w, lambda grad, y, row_map: is_real(grad, y) and row_map.dtype == torch.int32)
def unpermute_backward_w_triton(grad: Tensor, y: Tensor, row_map: Tensor) -> Tensor:
    (T, k), D, of_out, rows = row_map.shape, y.shape[1], as_rows(grad), as_rows(y)
    out = y.new_empty(T, k, dtype=torch.float32)
    launch(
        unpermute_w_kernel, (T,), of_out, rows, row_map.contiguous(), out, D, of_out.stride(0), rows.stride(0), K=k,
        KP=padded(k), enable_fp_fusion=True, **tile("unpermute_w", D=D),
    )  # fmt: skip
    return out
