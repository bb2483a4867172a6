"""Exchanging tokens between ranks that own experts: packed and unpacked in few launches around one collective.

Training sorts pairs stably by expert, as `permute` does, and answers come back through a gather of rows. Decoding sends
one block per rank, of a bound that holds for every choice: a header of the counts of that rank's experts, and
`capacity` rows for each; what is not used is sent as it lies. One launch packs it (each program counts the pairs before
its own; from FEW_PAIRS on a sort does, in two launches more), one puts what came in order. Nothing is read on the host,
so a graph can hold all of it. Rows are copied as bits.
"""

import torch
import triton.language as tl
from torch import Tensor

from ...ops.collectives import (
    ep_combine,
    ep_combine_backward,
    ep_combine_masked,
    ep_counts,
    ep_dispatch,
    ep_dispatch_backward,
    ep_dispatch_masked,
    exchange,
    group_size,
    local_experts,
)
from .operands import as_rows, is_real
from .permutation import BITS, place_pairs, places, spread, unpermute_backward_triton, unpermute_triton
from .routing import expert_count_triton
from .runtime import device_function, gpu_kernel, kernel, launch
from .runtime import power_of_two as padded
from .tables import tile

FEW_PAIRS = 2048  # every program counts the pairs before its own by itself
ALIGN = 16  # bytes: of headers and blocks


@kernel
def pack_kernel(
    x, idx, row_map, rows, experts, T, D, x_row, local, slices,
    K: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x [T, D] -> rows [T * K, D]: row row_map[t, j] is x[t]; experts i32 [T * K]: its expert there, idx[t, j] % local.
    A program copies a slice of BLOCK columns of TOKENS tokens."""
    program, slice = tl.program_id(0) // slices, tl.program_id(0) % slices
    spread(x, None, row_map, rows, T, D, x_row, program, slice, K, TOKENS, BLOCK)
    if slice == 0:
        token = program * TOKENS + tl.arange(0, TOKENS)
        for j in tl.static_range(K):
            row = tl.load(row_map + token * K + j, mask=token < T, other=0)
            expert = tl.load(idx + token * K + j, mask=token < T, other=0)
            tl.store(experts + row, expert % local, mask=token < T)


@device_function
def pack_tokens(
    x, idx, row_map, offsets, rows, place, T, pairs, D, x_row, capacity, local, block, head, program, slice,
    K: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """Copy a slice of TOKENS tokens to their blocks, if there is x; the first slice also notes their places."""
    token = program * TOKENS + tl.arange(0, TOKENS)
    column = slice * BLOCK + tl.arange(0, BLOCK)
    mask = (token < T)[:, None] & (column < D)[None, :]
    if x is not None:
        values = tl.load(x + token.to(tl.int64)[:, None] * x_row + column[None, :], mask=mask)
    for j in tl.static_range(K):
        pair = token * K + j
        mine = tl.load(idx + pair, mask=token < T, other=0)
        if row_map is None:
            rank = tl.zeros((TOKENS,), tl.int32)
            for first in range(0, (program + 1) * TOKENS * K, BATCH):
                other = first + tl.arange(0, BATCH)
                theirs = tl.load(idx + other, mask=other < pairs, other=-1)
                same = (theirs[None, :] == mine[:, None]) & (other[None, :] < pair[:, None])
                rank += tl.sum(same.to(tl.int32), 1)
        else:
            rank = tl.load(row_map + pair, mask=token < T, other=0) - tl.load(offsets + mine)
        if slice == 0:
            tl.store(place + pair, mine * capacity + rank, mask=token < T)
        if x is not None:
            inner = (mine % local).to(tl.int64) * capacity + rank
            to = (mine // local).to(tl.int64) * block + head + inner * D
            tl.store(rows + to[:, None] + column[None, :], values, mask=mask)


@device_function
def count_pairs(idx, offsets, header, pairs, E, local, block_ints, EP: tl.constexpr, BATCH: tl.constexpr):
    """Write how many pairs chose each expert; from where segments begin, if that is known."""
    expert = tl.arange(0, EP)
    if offsets is None:
        count = tl.zeros((EP,), tl.int32)
        for first in range(0, pairs, BATCH):
            other = first + tl.arange(0, BATCH)
            count += tl.histogram(tl.load(idx + other, mask=other < pairs, other=0), EP, mask=other < pairs)
    else:
        begins = tl.load(offsets + expert, mask=expert < E, other=0)
        count = tl.load(offsets + 1 + expert, mask=expert < E, other=0) - begins
    tl.store(header + (expert // local).to(tl.int64) * block_ints + expert % local, count, mask=expert < E)


@kernel
def pack_blocks_kernel(
    x, idx, row_map, offsets, rows, header, place, T, pairs, D, E, x_row, capacity, local, block, head, block_ints,
    copying, slices, K: tl.constexpr, EP: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """x [T, D] (None: only place), idx i32 [T, K] -> place i32 [T, K]: expert * capacity + how many pairs before it
    chose that expert; rows: the same data as blocks of `block` elements per rank, of which rows begin at `head`;
    header i32: the counts at the beginning of every block, `block_ints` apart.

    row_map and offsets as place_kernel's, or None: then programs count. The first `copying` programs copy a slice of
    BLOCK columns of TOKENS tokens, the last one writes the counts.
    """
    program = tl.program_id(0)
    if program < copying:
        pack_tokens(
            x, idx, row_map, offsets, rows, place, T, pairs, D, x_row, capacity, local, block, head,
            program // slices, program % slices, K, TOKENS, BLOCK, BATCH,
        )  # fmt: skip
    else:
        count_pairs(idx, offsets, header, pairs, E, local, block_ints, EP, BATCH)


@kernel
def arrange_kernel(
    received, counted, begun, source, out, counts, slots, source_out, ranges, W, D, capacity, local,
    block, expert_rows, head, count_rank, count_expert, chunks, slices,
    WP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """What W ranks sent to `local` experts -> out [local, W * capacity, D]: each expert's rows from the front, by
    rank; the rest is 0; counts i32 [local]; slots i32 [W, local, capacity]: the row of out that each went to, or
    W * local * capacity.

    counted: how many rows there are, `count_rank` apart between ranks and `count_expert` between experts. begun None:
    rows lie at rank * block + head + (expert * capacity + slot) * D. Else (DeepEP) an expert has expert_rows rows,
    those of a rank begin where `begun`, laid out as `counted`, says, and are put in the order of source i32 [local,
    expert_rows]; source_out, likewise, and ranges i32 [local, W, 2] (count, beginning) describe the new order.
    A program: a slice of BLOCK columns of ROWS of the slots of a rank at an expert; it also clears as many rows.
    """
    program, slice = tl.program_id(0) // slices, tl.program_id(0) % slices
    chunk, sender = program % chunks, program // chunks % W
    expert = program // chunks // W
    rank = tl.arange(0, WP)
    every = tl.load(counted + rank.to(tl.int64) * count_rank + expert * count_expert, mask=rank < W, other=0)
    total, start = tl.sum(every, 0), tl.sum(tl.where(rank < sender, every, 0), 0)
    count = tl.sum(tl.where(rank == sender, every, 0), 0)
    slot = chunk * ROWS + tl.arange(0, ROWS)
    column = slice * BLOCK + tl.arange(0, BLOCK)
    used, bound = slot < count, W * capacity
    if begun is None:
        row = start + slot
        at = sender.to(tl.int64) * block + head + (expert.to(tl.int64) * capacity + slot) * D
    else:
        begin = expert.to(tl.int64) * expert_rows + tl.load(begun + sender * count_rank + expert * count_expert)
        mine = tl.load(source + begin + slot, mask=used, other=0)
        row = tl.zeros((ROWS,), tl.int32) + start
        for first in range(0, count, BATCH):
            other = first + tl.arange(0, BATCH)
            theirs = tl.load(source + begin + other, mask=other < count, other=2147483647)
            row += tl.sum((theirs[None, :] < mine[:, None]).to(tl.int32), 1)
        at = (begin + slot) * D
        if slice == 0:
            tl.store(source_out + expert.to(tl.int64) * expert_rows + row, mine, mask=used)
            if chunk == 0:
                tl.store(ranges + (expert * W + sender) * 2, count)
                tl.store(ranges + (expert * W + sender) * 2 + 1, start)
    inside = (column < D)[None, :]
    values = tl.load(received + at[:, None] + column[None, :], mask=used[:, None] & inside)
    into = (expert.to(tl.int64) * bound + row) * D
    tl.store(out + into[:, None] + column[None, :], values, mask=used[:, None] & inside)
    cleared = sender * capacity + slot
    clear = (slot < capacity) & (cleared >= total)
    nothing = tl.zeros((ROWS, BLOCK), out.dtype.element_ty)
    into = (expert.to(tl.int64) * bound + cleared) * D
    tl.store(out + into[:, None] + column[None, :], nothing, mask=clear[:, None] & inside)
    if slice == 0:
        to = (sender * local + expert) * capacity + slot
        target = tl.where(used, expert * bound + start + slot, local * bound)
        tl.store(slots + to, target, mask=slot < capacity)
        if (chunk == 0) & (sender == 0):
            tl.store(counts + expert, total)


@kernel
def gather_kernel(
    x, index, out, N, rows, D, x_row, bound, gap, slices,
    SCATTER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x [rows, D], index i32 [N] -> out [N, D]: rows of x; where the index is not below `rows`, out stays as it is.

    SCATTER: row index[i] of x goes to row index[i] + index[i] // bound * gap of out instead: between the segments of
    `bound` rows there are `gap` more.
    """
    place = (tl.program_id(0) // slices).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % slices) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(index + place, mask=place < N, other=0).to(tl.int64)
    mask = ((place < N) & (row < rows))[:, None] & (column < D)[None, :]
    values = tl.load(x + row[:, None] * x_row + column[None, :], mask=mask)
    to = row + row // bound * gap if SCATTER else place
    tl.store(out + to[:, None] * D + column[None, :], values, mask=mask)


# Launchers -----------------------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    """x [..., D] as bits [N, D]."""
    return as_rows(x).view(BITS[x.element_size()])


def _gather(x: Tensor, index: Tensor, out: Tensor, bound: int, gap: int, scatter: bool) -> Tensor:
    rows, N, D = _rows(x), index.numel(), x.shape[-1]
    shape = tile("ep_gather", D=D)
    slices = -(-D // shape["BLOCK"])
    launch(
        gather_kernel, (-(-N // shape["ROWS"]) * slices,), rows, index.contiguous(), out.view(rows.dtype), N,
        rows.shape[0], D, rows.stride(0), bound, gap, slices, SCATTER=scatter, **shape,
    )  # fmt: skip
    return out


def gathered(x: Tensor, index: Tensor) -> Tensor:
    """x [R, D], index i32 of N entries -> [N, D] of x's rows; undefined where the index is not below R."""
    return _gather(x, index, x.new_empty(index.numel(), x.shape[-1]), 1, 0, False)


def spaced(y: Tensor, slots: Tensor, rows: int) -> Tensor:
    """y [e, C, D] -> [e, rows, D], rows >= C: the rows of y that slots i32 names, at their places; others undefined."""
    e, bound, D = y.shape
    return _gather(y, slots, y.new_empty(e, rows, D), bound, rows - bound, True)


@gpu_kernel(ep_counts, lambda idx, num_experts, group: places(idx, num_experts))
def ep_counts_triton(idx: Tensor, num_experts: int, group: str) -> tuple[Tensor, Tensor]:
    size, local = group_size(group), local_experts(num_experts, group)
    sent = expert_count_triton(idx, num_experts)
    return sent, exchange(sent, [local] * size, [local] * size, group).view(size, local)


@gpu_kernel(ep_dispatch, lambda x, idx, num_experts, *rest: x.element_size() in BITS and places(idx, num_experts))
def ep_dispatch_triton(
    x: Tensor, idx: Tensor, num_experts: int, in_splits: list[int], out_splits: list[int], group: str
) -> tuple[Tensor, Tensor, list[Tensor]]:
    local, (T, D), tokens, pairs = local_experts(num_experts, group), x.shape, _rows(x), idx.numel()
    place, _, _ = place_pairs(idx, num_experts, 1)
    rows, experts = x.new_empty(pairs, D), idx.new_empty(pairs)
    shape = tile("ep_pack", D=D)
    slices = -(-D // shape["BLOCK"])
    launch(
        pack_kernel, (-(-T // shape["TOKENS"]) * slices,), tokens, idx.contiguous(), place, rows.view(tokens.dtype),
        experts, T, D, tokens.stride(0), local, slices, K=idx.shape[1], **shape,
    )  # fmt: skip
    expert = exchange(experts, out_splits, in_splits, group)
    return exchange(rows, out_splits, in_splits, group), expert, [place]


@gpu_kernel(ep_combine, lambda y, handle, *rest: y.element_size() in BITS and handle[0].dtype == torch.int32)
def ep_combine_triton(
    y: Tensor, handle: list[Tensor], in_splits: list[int], out_splits: list[int], group: str
) -> Tensor:
    return gathered(exchange(y, in_splits, out_splits, group), handle[0])


def _sums(grad: Tensor, handle: list[Tensor], *rest: object) -> bool:
    return is_real(grad) and handle[0].dtype == torch.int32


@gpu_kernel(ep_dispatch_backward, _sums)
def ep_dispatch_backward_triton(
    grad: Tensor, handle: list[Tensor], in_splits: list[int], out_splits: list[int], group: str
) -> Tensor:
    return unpermute_triton(exchange(grad, in_splits, out_splits, group), handle[0], None)


@gpu_kernel(ep_combine_backward, _sums)
def ep_combine_backward_triton(
    grad: Tensor, handle: list[Tensor], in_splits: list[int], out_splits: list[int], group: str
) -> Tensor:
    rows = unpermute_backward_triton(grad, handle[0].reshape(-1, 1), None, grad.shape[0])
    return exchange(rows, out_splits, in_splits, group)


def pack_blocks(
    x: Tensor | None, idx: Tensor, num_experts: int, capacity: int, size: int, D: int
) -> tuple[Tensor, Tensor, int]:
    """-> place i32 [T, k]; the blocks to send, bytes [size, ...] (without x only headers); how long a header is."""
    (T, k), idx, local = idx.shape, idx.contiguous(), num_experts // size
    head, row = -(-4 * local // ALIGN) * ALIGN, 0 if x is None else D * x.element_size()
    block = -(-(head + local * capacity * row) // ALIGN) * ALIGN
    place, sent = torch.empty_like(idx), idx.new_empty(size, block, dtype=torch.uint8)
    row_map = offsets = None
    if idx.numel() > FEW_PAIRS:
        row_map, offsets, _ = place_pairs(idx, num_experts, 1)
    tokens, bits = (None, torch.uint8) if x is None else (_rows(x), BITS[x.element_size()])
    shape = tile("ep_pack_blocks", D=D)
    slices = 1 if x is None else -(-D // shape["BLOCK"])
    copying = -(-T // shape["TOKENS"]) * slices
    launch(
        pack_blocks_kernel, (copying + 1,), tokens, idx, row_map, offsets, sent.view(bits), sent.view(torch.int32),
        place, T, idx.numel(), D, num_experts, 0 if tokens is None else tokens.stride(0), capacity, local,
        block // bits.itemsize, head // bits.itemsize, block // 4, copying, slices, K=k, EP=padded(num_experts),
        **shape,
    )  # fmt: skip
    return place, sent, head


def _dispatches(x: Tensor, idx: Tensor, num_experts: int, capacity: int, group: str) -> bool:
    return x.element_size() in BITS and places(idx, num_experts) and x.shape[1] > 0


@gpu_kernel(ep_dispatch_masked, _dispatches)
def ep_dispatch_masked_triton(
    x: Tensor, idx: Tensor, num_experts: int, capacity: int, group: str
) -> tuple[Tensor, Tensor, list[Tensor]]:
    torch._check(
        capacity >= idx.shape[0], lambda: "more tokens than the dispatch's capacity: raise it to the largest batch"
    )
    size, local, D = group_size(group), local_experts(num_experts, group), x.shape[1]
    place, sent, head = pack_blocks(x, idx, num_experts, capacity, size, D)
    block = sent.shape[1]
    came = exchange(sent.view(-1), [block] * size, [block] * size, group)
    bits = BITS[x.element_size()]
    out = x.new_empty(local, size * capacity, D)
    counts, slots = idx.new_empty(local), idx.new_empty(num_experts * capacity)
    shape = tile("ep_arrange", D=D)
    slices, chunks = -(-D // shape["BLOCK"]), max(-(-capacity // shape["ROWS"]), 1)
    launch(
        arrange_kernel, (local * size * chunks * slices,), came.view(bits), came.view(torch.int32), None, None,
        out.view(bits), counts, slots, None, None, size, D, capacity, local, block // bits.itemsize, 0,
        head // bits.itemsize, block // 4, 1, chunks, slices, WP=padded(size, 2), **shape,
    )  # fmt: skip
    return out, counts, [place, slots]


def arranged(
    received: Tensor, source: Tensor, ranges: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What DeepEP received in the order of arrival, in the specification's.

    received [e, R, D]; source i32 [e, R]; ranges i64 [e, W]: count and beginning of each rank's rows, 32 bits each
    -> rows [e, W * capacity, D] and counts i32 [e]; slots i32 [W * e * capacity]; source and ranges in the new order.
    """
    (e, R, D), W = received.shape, ranges.shape[1]
    out, counts = received.new_empty(e, W * capacity, D), source.new_empty(e)
    slots, source_out, ranges_out = source.new_empty(W * e * capacity), source.new_empty(e, R), torch.empty_like(ranges)
    bits, packed = BITS[received.element_size()], ranges.view(torch.int32).view(-1)
    shape = tile("ep_arrange", D=D)
    slices, chunks = -(-D // shape["BLOCK"]), max(-(-capacity // shape["ROWS"]), 1)
    launch(
        arrange_kernel, (e * W * chunks * slices,), received.view(bits), packed, packed[1:], source, out.view(bits),
        counts, slots, source_out, ranges_out.view(torch.int32), W, D, capacity, e, 0, R, 0, 2, 2 * W, chunks, slices,
        WP=padded(W, 2), **shape,
    )  # fmt: skip
    return out, counts, slots, source_out, ranges_out


@gpu_kernel(ep_combine_masked, lambda y, handle, group: y.element_size() in BITS and handle[0].dtype == torch.int32)
def ep_combine_masked_triton(y: Tensor, handle: list[Tensor], group: str) -> Tensor:
    place, slots = handle[:2]
    rows = gathered(y.flatten(0, 1), slots)
    equal = [rows.shape[0] // group_size(group)] * group_size(group)
    return gathered(exchange(rows, equal, equal, group), place)
