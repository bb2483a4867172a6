"""Counting and permutation in CUDA C++: ranks from votes of a warp, so that the sort is stable without sorting."""

import torch
from torch import Tensor

from ...ops.moe import expert_count, permute, permuted_rows
from . import PRIORITY
from .module import available, launch

CHUNK = 256  # pairs of a block
MOST_EXPERTS = 4096  # counters of a block: 16 KiB of shared memory
SOURCE = "permutation.cu"


def sort_pairs(idx: Tensor, num_experts: int, align: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """idx i32 [T, k] -> row_map i32 [T, k], offsets i32 [E + 1], source i32 [rows] (-1: no pair); see ops/moe.py."""
    pairs = idx.numel()
    blocks = max(-(-pairs // CHUNK), 1)
    idx = idx.contiguous()
    counts = idx.new_empty(blocks, num_experts)
    offsets, row_map = idx.new_empty(num_experts + 1), torch.empty_like(idx)
    source = torch.full((rows,), -1, dtype=torch.int32, device=idx.device)
    macros = {"EXPERTS": num_experts, "CHUNK": CHUNK, "ALIGN": align}
    launch(SOURCE, "count_kernel", (blocks,), (32,), idx, counts, pairs, **macros)
    launch(SOURCE, "scan_kernel", (1,), (256,), counts, offsets, blocks, **macros)
    launch(SOURCE, "place_kernel", (blocks,), (32,), idx, counts, row_map, source, pairs, **macros)
    return row_map, offsets, source


def copy_rows(x: Tensor, source: Tensor, choices: int) -> Tensor:
    """x [T, D], source i32 [R] -> [R, D]: row r is x[source[r] // choices], or zeros where source[r] < 0."""
    x = x.contiguous()
    out = x.new_empty(source.shape[0], x.shape[1])
    size = x.shape[1] * x.element_size()
    threads = min(256, max(32, size // 16 // 32 * 32))
    launch(
        SOURCE, "rows_kernel", (source.shape[0],), (threads,), x, source, out, size, choices,
        EXPERTS=1, CHUNK=CHUNK, ALIGN=1,
    )  # fmt: skip
    return out


def _counts(idx: Tensor, num_experts: int) -> bool:
    return idx.dtype == torch.int32 and num_experts <= MOST_EXPERTS


def _permutes(x: Tensor, idx: Tensor, num_experts: int, align: int) -> bool:
    return _counts(idx, num_experts) and x.dim() == 2


@permute.kernel("cuda", "cupy", priority=PRIORITY, available=available, supports=_permutes, checked="emulated")
@permute.kernel("rocm", "cupy", priority=PRIORITY, available=available, supports=_permutes, checked="compiled")
def permute_cupy(x: Tensor, idx: Tensor, num_experts: int, align: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = permuted_rows(idx.numel(), num_experts, align)
    row_map, offsets, source = sort_pairs(idx, num_experts, align, rows)
    return copy_rows(x, source, idx.shape[1]), row_map, offsets


@expert_count.kernel("cuda", "cupy", priority=PRIORITY, available=available, supports=_counts, checked="emulated")
@expert_count.kernel("rocm", "cupy", priority=PRIORITY, available=available, supports=_counts, checked="compiled")
def expert_count_cupy(idx: Tensor, num_experts: int) -> Tensor:
    """By the offsets of a sort without alignment: two small kernels."""
    pairs = idx.numel()
    blocks = max(-(-pairs // CHUNK), 1)
    idx = idx.contiguous()
    counts, offsets = idx.new_empty(blocks, num_experts), idx.new_empty(num_experts + 1)
    macros = {"EXPERTS": num_experts, "CHUNK": CHUNK, "ALIGN": 1}
    launch(SOURCE, "count_kernel", (blocks,), (32,), idx, counts, pairs, **macros)
    launch(SOURCE, "scan_kernel", (1,), (256,), counts, offsets, blocks, **macros)
    return offsets.diff()
