"""Gradients of the experts' weights: for every expert the product of gradients and activations over its rows.

FP8 sums over blocks of 128 rows, as the scales cover them. Segments that begin and end at multiples of 128 (`permute`
with align 128) consist of whole blocks, which need no masks; the rest of others is added afterwards. Each sum is made
by one program, in the order of the rows.
"""

import torch
import triton.language as tl
from torch import Tensor

from ...ops.formats import BLOCK
from ...ops.gemm import grouped_gemm_wgrad
from ...ops.grouped_fp8 import grouped_fp8_wgrad
from .fp8_bits import half_of_e4m3
from .fp8_gemm import multiplies
from .grid import on_one_chiplet, tile_at
from .grouped_gemm import real
from .operands import by_rows
from .product_kernels import store_tile
from .products import MANY_ROWS, cdiv, has_aligned_rows, widened, with_aligned_rows
from .quantize import storage
from .runtime import device_function, gpu_kernel, kernel, launch, power_of_two
from .tables import tile
from .target import current_target

SIDE = tl.constexpr(BLOCK)


@kernel
def grouped_wgrad_kernel(
    grad, a, bounds, out, N, K, grad_row, a_row,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, CHIPLETS: tl.constexpr,
):  # fmt: skip
    """grad [R, N], a [R, K], bounds i32 [E + 1] -> out [E, N, K], in tiles of BM x BN over BK rows at a time."""
    tiles_m, tiles_n = tl.cdiv(N, BM), tl.cdiv(K, BN)
    expert = tl.program_id(1)
    place = on_one_chiplet(tl.program_id(0), tiles_m * tiles_n, CHIPLETS)
    tile_m, tile_n = tile_at(place, tiles_m, tiles_n, GROUP)
    begin, end = tl.load(bounds + expert), tl.load(bounds + expert + 1)
    row, m, n = tl.arange(0, BK), tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    x_at, y_at = row[:, None] * grad_row + m[None, :], row[:, None] * a_row + n[None, :]
    x, y = grad + begin.to(tl.int64) * grad_row, a + begin.to(tl.int64) * a_row
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for first in range(begin, end, BK):
        inside = (row < end - first)[:, None]
        left = tl.load(x + x_at, mask=inside & (m < N)[None, :], other=0.0)
        right = tl.load(y + y_at, mask=inside & (n < K)[None, :], other=0.0)
        total = tl.dot(left.T, right, total, input_precision="ieee")
        x, y = x + BK * grad_row, y + BK * a_row
    store_tile(out + expert.to(tl.int64) * N * K, total, tile_m * BM, N, tile_n * BN, K, BM, BN)


@kernel
def persistent_fp8_wgrad_kernel(
    a, sa, b, sb, bounds, out, R, N, K, experts, a_row, b_row, sa_row, sa_block, sb_row, sb_block,
    BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """a [N, R], b [K, R] -> out f32 [experts, N, K]: of every expert the whole blocks of 128 rows, by descriptors.

    One loop over the blocks of all tiles of a program: while it writes one tile, the next is on its way. An expert
    without blocks takes a step beyond the last row, where everything reads as 0.
    """
    a_tiles = tl.make_tensor_descriptor(a, [N, R], [a_row, 1], [BM, SIDE])
    b_tiles = tl.make_tensor_descriptor(b, [K, R], [b_row, 1], [BN, SIDE])
    out_tiles = tl.make_tensor_descriptor(out, [experts, N, K], [N * K, K, 1], [1, BM, BN])
    tiles_m, tiles_n = tl.cdiv(N, BM), tl.cdiv(K, BN)
    tiles = tiles_m * tiles_n
    index, program = tl.arange(0, EXPERTS), tl.program_id(0)
    starts = (tl.load(bounds + index, mask=index < experts, other=0) + SIDE - 1) // SIDE
    stops = tl.load(bounds + index + 1, mask=index < experts, other=0) // SIDE
    starts = tl.where(starts < stops, starts, (R + SIDE - 1) // SIDE)
    stops = tl.maximum(stops, starts + 1)
    mine = tl.cdiv((index + 1) * tiles - program, PROGRAMS) - tl.cdiv(index * tiles - program, PROGRAMS)
    steps = tl.sum(tl.where(index < experts, mine * (stops - starts), 0))
    tile = program - PROGRAMS
    nothing = program * 0
    block, stop, expert, tile_m, tile_n = nothing, nothing, nothing, nothing, nothing
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for _ in range(steps):
        block += 1
        if block >= stop:
            tile += PROGRAMS
            expert = tile // tiles
            tile_m, tile_n = tile_at(tile % tiles, tiles_m, tiles_n, GROUP)
            block = tl.sum(tl.where(index == expert, starts, 0))
            stop = tl.sum(tl.where(index == expert, stops, 0))
        m, n = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
        beyond = block * SIDE >= R
        of_row = tl.load(sa + m * sa_row + block * sa_block, mask=m < tl.where(beyond, 0, N), other=0.0)
        of_column = tl.load(sb + n * sb_row + block * sb_block, mask=n < tl.where(beyond, 0, K), other=0.0)
        x = a_tiles.load([tile_m * BM, block * SIDE])
        y = b_tiles.load([tile_n * BN, block * SIDE])
        total += tl.dot(x, y.T) * of_row[:, None] * of_column[None, :]
        if block + 1 == stop:
            out_tiles.store([expert, tile_m * BM, tile_n * BN], tl.reshape(total, (1, BM, BN)))
        total = tl.where(block + 1 == stop, 0.0, total)


@device_function
def scaled_block(
    a, sa, b, sb, m, n, block, begin, end, a_row, b_row, sa_row, sa_block, sb_row, sb_block,
    MASKED: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    """The product over one block of 128 rows, scaled; MASKED: of its rows from `begin` to `end`. m, n: rows of a, b."""
    k = block * SIDE + tl.arange(0, SIDE)
    of_row = tl.load(sa + m * sa_row + block * sa_block)
    of_column = tl.load(sb + n * sb_row + block * sb_block)
    x_here, y_here = a + m[:, None] * a_row + k[None, :], b + n[:, None] * b_row + k[None, :]
    if MASKED:
        inside = ((k >= begin) & (k < end))[None, :]
        nothing: tl.constexpr = 0 if DECODE else 0.0
        x, y = tl.load(x_here, mask=inside, other=nothing), tl.load(y_here, mask=inside, other=nothing)
    else:
        x, y = tl.load(x_here), tl.load(y_here)
    if DECODE:
        x, y = half_of_e4m3(x), half_of_e4m3(y)
    return tl.dot(x, y.T) * of_row[:, None] * of_column[None, :]


@kernel
def fp8_wgrad_kernel(
    a, sa, b, sb, bounds, out, N, K, a_row, b_row, sa_row, sa_block, sb_row, sb_block,
    BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, DECODE: tl.constexpr, CHIPLETS: tl.constexpr,
):  # fmt: skip
    """As `persistent_fp8_wgrad_kernel`, through pointers, with one program for a tile."""
    tiles_m, tiles_n = tl.cdiv(N, BM), tl.cdiv(K, BN)
    expert = tl.program_id(1)
    place = on_one_chiplet(tl.program_id(0), tiles_m * tiles_n, CHIPLETS)
    tile_m, tile_n = tile_at(place, tiles_m, tiles_n, GROUP)
    begin, end = tl.load(bounds + expert), tl.load(bounds + expert + 1)
    m, n = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    m, n = tl.minimum(m, N - 1).to(tl.int64), tl.minimum(n, K - 1).to(tl.int64)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for block in range((begin + SIDE - 1) // SIDE, end // SIDE):
        total += scaled_block(
            a, sa, b, sb, m, n, block, begin, end, a_row, b_row, sa_row, sa_block, sb_row, sb_block, False, DECODE
        )  # fmt: skip
    store_tile(out + expert.to(tl.int64) * N * K, total, tile_m * BM, N, tile_n * BN, K, BM, BN)


@kernel
def fp8_wgrad_edges_kernel(
    a, sa, b, sb, bounds, out, N, K, experts, a_row, b_row, sa_row, sa_block, sb_row, sb_block,
    BM: tl.constexpr, BN: tl.constexpr, DECODE: tl.constexpr, PROGRAMS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """out += the first and the last block of every expert, where it has only a part of their 128 rows."""
    index = tl.arange(0, EXPERTS)
    uneven = tl.load(bounds + index, mask=index <= experts, other=0) % SIDE
    tiles_m, tiles_n = tl.cdiv(N, BM), tl.cdiv(K, BN)
    tiles = tiles_m * tiles_n
    for place in range(tl.program_id(0), tl.where(tl.max(uneven) > 0, experts * tiles, 0), PROGRAMS):
        expert = place // tiles
        begin, end = tl.load(bounds + expert), tl.load(bounds + expert + 1)
        first, last = begin // SIDE, end // SIDE
        in_first = (begin % SIDE != 0) & (begin < end)
        in_last = (end % SIDE != 0) & (begin < end) & ((last != first) | (begin % SIDE == 0))
        if in_first | in_last:
            row, column = place % tiles // tiles_n * BM, place % tiles % tiles_n * BN
            m, n = row + tl.arange(0, BM), column + tl.arange(0, BN)
            at = out + expert.to(tl.int64) * N * K + m.to(tl.int64)[:, None] * K + n[None, :]
            mask = (m < N)[:, None] & (n < K)[None, :]
            total = tl.load(at, mask=mask, other=0.0)
            m, n = tl.minimum(m, N - 1).to(tl.int64), tl.minimum(n, K - 1).to(tl.int64)
            for edge in range(in_first.to(tl.int32) + in_last.to(tl.int32)):
                block = tl.where(in_first & (edge == 0), first, last)
                total += scaled_block(
                    a, sa, b, sb, m, n, block, begin, end, a_row, b_row, sa_row, sa_block, sb_row, sb_block,
                    True, DECODE,
                )  # fmt: skip
            tl.store(at, total, mask=mask)


@gpu_kernel(grouped_gemm_wgrad, real)
def grouped_gemm_wgrad_triton(grad: Tensor, a: Tensor, offsets: Tensor) -> Tensor:
    N, K, experts = grad.shape[1], a.shape[1], offsets.shape[0] - 1
    grad, a = map(by_rows, (grad, a))
    out = a.new_empty(experts, N, K)
    shape = tile("grouped_gemm_wgrad_f32" if a.dtype == torch.float32 else "grouped_gemm_wgrad")
    grid = cdiv(N, shape["BM"]) * cdiv(K, shape["BN"]), experts
    launch(
        grouped_wgrad_kernel, grid, grad, a, offsets, out, N, K, grad.stride(0), a.stride(0), enable_fp_fusion=True,
        **shape,
    )  # fmt: skip
    return out


@gpu_kernel(grouped_fp8_wgrad, lambda a, sa, b, sb, offsets: multiplies(a, sa, b, sb) and offsets.dtype == torch.int32)
def grouped_fp8_wgrad_triton(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, offsets: Tensor) -> Tensor:
    N, K, experts, units = a.shape[0], b.shape[0], offsets.shape[0] - 1, current_target().units
    out = sa.new_empty(experts, N, K)
    if not a.numel():
        return out.zero_()
    (a, decode), (b, _) = storage(with_aligned_rows(a)), storage(with_aligned_rows(b))
    name = "grouped_fp8_wgrad"
    if decode and a.shape[1] >= MANY_ROWS * experts:
        name, decode, a, b = "grouped_fp8_wgrad_widened", False, widened(a), widened(b)
    steps = a.stride(0), b.stride(0), *sa.stride(), *sb.stride()
    shape = dict(tile(name))
    if shape["DESCRIPTORS"] and not has_aligned_rows(out):
        shape = dict(tile("grouped_fp8_wgrad_strided"))
    tiles = cdiv(N, shape["BM"]) * cdiv(K, shape["BN"])
    if shape.pop("DESCRIPTORS"):
        programs = units * shape.pop("PER_UNIT")
        launch(
            persistent_fp8_wgrad_kernel, (min(programs, experts * tiles),), a, sa, b, sb, offsets, out, a.shape[1],
            N, K, experts, *steps, PROGRAMS=programs, EXPERTS=power_of_two(experts), enable_fp_fusion=True, **shape,
        )  # fmt: skip
    else:
        launch(
            fp8_wgrad_kernel, (tiles, experts), a, sa, b, sb, offsets, out, N, K, *steps, DECODE=decode,
            enable_fp_fusion=True, **shape,
        )  # fmt: skip
    shape = tile("wgrad_edges")
    programs = min(4 * units, experts * cdiv(N, shape["BM"]) * cdiv(K, shape["BN"]))
    launch(
        fp8_wgrad_edges_kernel, (programs,), a, sa, b, sb, offsets, out, N, K, experts, *steps, DECODE=decode,
        PROGRAMS=4 * units, EXPERTS=power_of_two(experts + 1), enable_fp_fusion=True, **shape,
    )  # fmt: skip
    return out
