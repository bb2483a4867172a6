"""Rows times weights: the kernels behind every product, FP8 or real, of one weight or of one per expert.

    out[r] = a[r] b[e]^T    for the rows r of expert e

`persistent_product_kernel` reads tiles through tensor descriptors (TMA on Hopper), in as many programs as the chip has
units: while one writes a tile, it loads the next. For many rows.
`product_kernel` reads through pointers: any strides, FP8 that the chip does not multiply, few rows. It may put the rows
on the short side of the matrix instruction (SWAP), and split long sums: `sum_splits_kernel` adds what the splits leave,
in order, so that results do not depend on timing.

FP8: the sum over each 128 of K, which Hopper's matrix unit holds in some 14 bits, is scaled and added in float32.
SCALES says what a scale of b covers: "blocks" of 128 x 128 (weights), "rows" of 1 x 128 (gradients); "none" is for real
numbers.
"""

import triton.language as tl

from .fp8_bits import half_of_e4m3
from .grid import on_one_chiplet, tile_at, tile_of_segments, zero_rows
from .runtime import device_function, kernel


@kernel
def persistent_product_kernel(
    a, sa, b, sb, out, bounds, R, N, K, experts, a_row, b_expert, b_row, sa_row, sa_block, sb_expert, sb_row, sb_block,
    BM: tl.constexpr, BN: tl.constexpr, EXTRA: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr, EXPERTS: tl.constexpr, SCALES: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """a [R, K], b [experts, N, K] (TRANSPOSED: stored as [experts, K, N]) -> out [R, N].

    bounds i32 [experts + 1] of the sorted rows of each expert, EXPERTS a power of two >= experts; or None: all rows are
    of one. EXTRA: columns of a second sum (FP8 with "blocks" only). They are multiplied while the first BN are scaled
    and added, and share the rows that were loaded.
    """
    tl.static_assert(SCALES == "none" or BK == 128)
    tl.static_assert(SCALES != "blocks" or BN <= BK)
    tl.static_assert(EXTRA == 0 or (SCALES == "blocks" and ((BN + EXTRA) % BK == 0 or (BN == BK and 2 * EXTRA == BK))))
    a_tiles = tl.make_tensor_descriptor(a, [R, K], [a_row, 1], [BM, BK])
    if TRANSPOSED:
        b_tiles = tl.make_tensor_descriptor(b, [experts, K, N], [b_expert, b_row, 1], [1, BK, BN])
    else:
        b_tiles = tl.make_tensor_descriptor(b, [experts, N, K], [b_expert, b_row, 1], [1, BN, BK])
    if EXTRA:
        b_extra = tl.make_tensor_descriptor(b, [experts, N, K], [b_expert, b_row, 1], [1, EXTRA, BK])
    if bounds is None:
        out_tiles = tl.make_tensor_descriptor(out, [R, N], [N, 1], [BM, BN])
        if EXTRA:
            out_extra = tl.make_tensor_descriptor(out, [R, N], [N, 1], [BM, EXTRA])
        tiles_m = tl.cdiv(R, BM)
    else:
        index = tl.arange(0, EXPERTS)
        begins = tl.load(bounds + index, mask=index < experts, other=0)
        ends = tl.load(bounds + index + 1, mask=index < experts, other=0)
        tiles = (ends - begins + BM - 1) // BM
        tiles_to = tl.cumsum(tiles, 0)
        origins = begins - (tiles_to - tiles) * BM  # where its rows would begin if all tiles were its own
        tiles_m = tl.sum(tiles)
    tiles_n = tl.cdiv(N, BN + EXTRA)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
        tile_m, tile_n = tile_at(tile, tiles_m, tiles_n, GROUP)
        if bounds is None:
            expert, first, end = tile_m * 0, tile_m * BM, R
        else:
            expert = tl.sum((tiles_to <= tile_m).to(tl.int32))
            first = tl.sum(tl.where(index == expert, origins, 0)) + tile_m * BM
            end = tl.sum(tl.where(index == expert, ends, 0))
        column = tile_n * (BN + EXTRA)
        extra = column + BN
        if EXTRA:  # of 128 + 64 columns every other time the 64 come first: so none crosses a block of scales
            swapped = column % BK != 0
            extra, column = tl.where(swapped, column, extra), tl.where(swapped, column + EXTRA, column)
        row = first + tl.arange(0, BM)
        of_expert = expert.to(tl.int64) * sb_expert
        total = tl.zeros((BM, BN), dtype=tl.float32)
        if EXTRA:
            total_extra = tl.zeros((BM, EXTRA), dtype=tl.float32)
        for block in range(tl.cdiv(K, BK)):
            if SCALES != "none":  # loaded first: the matrix unit works while they come
                of_row = tl.load(sa + row.to(tl.int64) * sa_row + block * sa_block, mask=row < end, other=0.0)
                s = sb + of_expert + block * sb_block
            if SCALES == "rows":
                at = column + tl.arange(0, BN)
                of_column = tl.load(s + at * sb_row, mask=at < N, other=0.0)
            if SCALES == "blocks":
                scale = of_row * tl.load(s + column // BK * sb_row, mask=column < N, other=0.0)
                if EXTRA:
                    scale_extra = of_row * tl.load(s + extra // BK * sb_row, mask=extra < N, other=0.0)
            x = a_tiles.load([first, block * BK])
            if TRANSPOSED:
                y = tl.reshape(b_tiles.load([expert, block * BK, column]), (BK, BN))
            else:
                y = tl.reshape(b_tiles.load([expert, column, block * BK]), (BN, BK)).T
            if SCALES == "none":
                total = tl.dot(x, y, total)
            elif SCALES == "rows":
                total += tl.dot(x, y) * of_row[:, None] * of_column[None, :]
            else:
                total += tl.dot(x, y) * scale[:, None]
                if EXTRA:
                    y_extra = tl.reshape(b_extra.load([expert, extra, block * BK]), (EXTRA, BK))
                    total_extra += tl.dot(x, y_extra.T) * scale_extra[:, None]
        if bounds is None:
            out_tiles.store([first, column], total.to(out.dtype.element_ty))
            if EXTRA:
                out_extra.store([first, extra], total_extra.to(out.dtype.element_ty))
        else:  # the expert may end within the tile
            store_tile(out, total, first, end, column, N, BM, BN)
            if EXTRA:
                store_tile(out, total_extra, first, end, extra, N, BM, EXTRA)
    if bounds is not None:
        zero_rows(out, tl.load(bounds + experts), R, N, 1024)


@device_function
def store_tile(out, values, first, end, column, N, BM: tl.constexpr, BN: tl.constexpr):
    """values [BM, BN] into out [.., N] from row `first` and `column` on, for the rows below `end`."""
    row, at = first + tl.arange(0, BM), column + tl.arange(0, BN)
    place = out + row.to(tl.int64)[:, None] * N + at[None, :]
    tl.store(place, values.to(out.dtype.element_ty), mask=(row < end)[:, None] & (at < N)[None, :])


@kernel
def product_kernel(
    a, sa, b, sb, out, bounds, R, N, K, experts, capacity, splits,
    a_row, b_expert, b_row, b_k, sa_row, sa_block, sb_expert, sb_row, sb_block,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SWAP: tl.constexpr,
    EXPERTS: tl.constexpr, SCALES: tl.constexpr, DECODE: tl.constexpr, EVEN: tl.constexpr, ACROSS: tl.constexpr,
    CHIPLETS: tl.constexpr,
):  # fmt: skip
    """a [R, K], b [experts, N, K] of any strides -> out [R, N], or f32 [splits, R, N], partial sums.

    bounds: None, all rows are of one expert; i32 [experts + 1] of the sorted rows of each, EXPERTS a power of two >
    experts; or, with EXPERTS 0, i32 [experts]: how many of its `capacity` rows each expert uses. Rows of no expert
    become 0. EVEN: K is a multiple of BK. ACROSS: b's neighbours in memory are those along N.
    """
    tl.static_assert(SCALES == "none" or BK == 128)
    tl.static_assert(SCALES != "blocks" or BN <= BK)
    tiles_n = tl.cdiv(N, BN)
    programs = tl.num_programs(0)
    place = on_one_chiplet(tl.program_id(0), programs, CHIPLETS)
    tile_m, tile_n = tile_at(place, programs // tiles_n, tiles_n, GROUP)
    if bounds is None:
        expert, first, end = tile_m * 0, tile_m * BM, R
        used = end
    elif EXPERTS:
        expert, first, end = tile_of_segments(tile_m, bounds, R, experts, BM, EXPERTS)
        used = tl.where(expert < experts, end, 0)
    else:
        tiles = tl.cdiv(capacity, BM)
        expert = tile_m // tiles
        first, end = expert * capacity + tile_m % tiles * BM, (expert + 1) * capacity
        used = expert * capacity + tl.load(bounds + expert)
    column = tile_n * BN
    share = tl.cdiv(tl.cdiv(K, BK), splits)
    begin = tl.program_id(1) * share
    stop = tl.where(first < used, tl.minimum(begin + share, tl.cdiv(K, BK)), 0)

    # Offsets within a tile fit into 32 bits. Rows beyond the last are the last one again, which needs no masks; but
    # along neighbours it would keep the compiler from loading many at once.
    k, n = tl.arange(0, BK), tl.arange(0, BN)
    x_row, y_row = tl.minimum(tl.arange(0, BM), used - 1 - first), tl.minimum(n, N - 1 - column)
    x_at = x_row[:, None] * a_row + k[None, :]
    y_at = k[:, None] * b_k + n[None, :] * b_row if ACROSS else y_row[:, None] * b_row + k[None, :] * b_k
    x_first = a + first.to(tl.int64) * a_row + begin * BK
    y_first = b + expert.to(tl.int64) * b_expert + column.to(tl.int64) * b_row + (begin * BK).to(tl.int64) * b_k
    if SCALES != "none":
        sa_first = sa + first.to(tl.int64) * sa_row
        sb_first = sb + expert.to(tl.int64) * sb_expert
    total = tl.zeros((BN, BM) if SWAP else (BM, BN), dtype=tl.float32)
    for block in range(begin, stop):
        if SCALES != "none":
            of_row = tl.load(sa_first + block * sa_block + x_row * sa_row)
        if SCALES == "rows":
            of_column = tl.load(sb_first + block * sb_block + (column + y_row) * sb_row)
        if SCALES == "blocks":
            of_row = of_row * tl.load(sb_first + block * sb_block + column // BK * sb_row)
        nothing: tl.constexpr = 0 if DECODE else 0.0
        rest = K - block * BK
        x = tl.load(x_first + x_at) if EVEN else tl.load(x_first + x_at, mask=(k < rest)[None, :], other=nothing)
        if ACROSS:
            y = tl.load(y_first + y_at, mask=(k < rest)[:, None] & (n < N - column)[None, :], other=nothing)
        elif EVEN:
            y = tl.load(y_first + y_at).T
        else:
            y = tl.load(y_first + y_at, mask=(k < rest)[None, :], other=nothing).T
        x_first, y_first = x_first + BK, y_first + BK * b_k
        if DECODE:
            x, y = half_of_e4m3(x), half_of_e4m3(y)
        if SCALES == "none":
            if SWAP:
                total = tl.dot(y.T, x.T, total, input_precision="ieee")
            else:
                total = tl.dot(x, y, total, input_precision="ieee")
        elif SWAP:
            part = tl.dot(y.T, x.T) * of_row[None, :]
            total += part * of_column[:, None] if SCALES == "rows" else part
        else:
            part = tl.dot(x, y) * of_row[:, None]
            total += part * of_column[None, :] if SCALES == "rows" else part
    if SWAP:
        total = total.T
    total = tl.where((first + tl.arange(0, BM) < used)[:, None], total, 0.0)
    store_tile(out + tl.program_id(1).to(tl.int64) * R * N, total, first, end, column, N, BM, BN)


@kernel
def sum_splits_kernel(parts, out, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """parts f32 [SPLITS, size] -> out [size], summed in order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + at + split * size, mask=at < size, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)


@kernel
def transpose_kernel(x, out, rows, columns, x_batch, x_row, SIDE: tl.constexpr):
    """Bytes x [B, rows, columns] -> out [B, columns, rows]."""
    row = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    column = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    batch = tl.program_id(2).to(tl.int64)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    values = tl.load(x + batch * x_batch + row.to(tl.int64)[:, None] * x_row + column[None, :], mask=mask, other=0)
    place = out + batch * rows * columns + column.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(place, values.T, mask=mask.T)


@kernel
def widen_kernel(x, out, size, BLOCK: tl.constexpr):
    """Bytes of E4M3 -> float16, one after the other."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, half_of_e4m3(tl.load(x + at, mask=at < size, other=0)), mask=at < size)
