"""Which part of a product a program computes: the order of tiles, the rows of experts, and shares of a long sum."""

from functools import lru_cache

import triton.language as tl

from .runtime import device_function


@device_function
def on_one_chiplet(program, programs, CHIPLETS: tl.constexpr):
    """Number programs anew, so that those of one chiplet, which are started in turns, are neighbours.

    A chiplet (XCD of an MI300) has a cache of its own: neighbours read the same rows and columns.
    """
    each = programs // CHIPLETS
    moved = (program % CHIPLETS) * each + program // CHIPLETS
    return tl.where(program < each * CHIPLETS, moved, program)


@device_function
def tile_at(index, tiles_m, tiles_n, GROUP: tl.constexpr):
    """The place (m, n) of tile `index`: bands of GROUP rows of tiles, column by column, so that what runs at the same
    time forms a square and reads little."""
    band = index // (GROUP * tiles_n)
    height = min(tiles_m - band * GROUP, GROUP)
    within = index % (GROUP * tiles_n)
    return band * GROUP + within % height, within // height


@device_function
def tile_of_segments(tile, bounds, R, experts, BM: tl.constexpr, EXPERTS: tl.constexpr):
    """bounds i32 [experts + 1] of the sorted rows -> expert, first row, end of its rows, for tile `tile` of BM rows.

    Expert e has the tiles from bounds[e] // BM + e on, as many as it needs: found without summing up, and never more
    than R // BM + experts + 1. In between are tiles without rows (first >= end). The rows behind the last expert's
    belong to number `experts`. EXPERTS: a power of two > experts.
    """
    index = tl.arange(0, EXPERTS)
    begins = tl.load(bounds + index, mask=index <= experts, other=0)
    expert = tl.sum(((begins // BM + index <= tile) & (index <= experts)).to(tl.int32)) - 1
    begin = tl.load(bounds + expert)
    end = tl.load(bounds + expert + 1, mask=expert < experts, other=R)
    return expert, begin + (tile - begin // BM - expert) * BM, end


@device_function
def zero_rows(out, first, end, N, COLUMNS: tl.constexpr):
    """Rows [first, end) of out [.., N] := 0, by all programs in turns."""
    column, program, programs = tl.arange(0, COLUMNS), tl.program_id(0), tl.num_programs(0)
    nothing = tl.zeros((COLUMNS,), dtype=out.dtype.element_ty)
    place = out + (first + program).to(tl.int64) * N
    for _ in range(first + program, end, programs):
        for start in range(0, N, COLUMNS):
            tl.store(place + start + column, nothing, mask=start + column < N)
        place += programs * N


@lru_cache(maxsize=4096)
def splits_of(tiles: int, blocks: int, units: int, most: int, rows: int) -> int:
    """Into how many parts the sums over `blocks` are best split, where reading weights is all that takes time.

    Estimated in blocks of 128 x 128 that a unit reads at its share of the memory's speed. A program, whose reads under
    way are few, reads 1.5 shares at most, and a unit 3. Splitting costs a second kernel, and `rows` of partial sums.
    """

    def cost(splits: int) -> float:
        of_program = -(-blocks // splits)
        of_unit = -(-tiles * splits // units) * of_program
        time = max(tiles * blocks / units, of_program / 1.5, of_unit / 3)
        return time + (5 + splits * rows / 64 if splits > 1 else 0)

    return min(range(1, max(1, min(most, blocks // 2)) + 1), key=cost)
