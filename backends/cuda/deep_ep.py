"""DeepEP: the exchange of a decoding deployment over NVLink and RDMA, in which only rows travel that hold something.

Signatures: deepseek-ai/DeepEP dd758ca (2.1.0; deep_ep/buffers/legacy.py, csrc/legacy/buffer.hpp,
csrc/kernels/legacy/internode_ll.cu), the same in 9af0e0d (1.2.1). `Buffer.low_latency_dispatch(x bf16 [N, D], topk_idx
[N, K], bound, E)` -> rows [e, W * bound, D], counts i32 [e], and in its handle the sending token of every row, i32
[e, W * bound], and layout i64 [e, W]: how many rows a rank sent, and above bit 32 where they begin. Ranks are in the
order of arrival and a rank's rows in any, so one launch (`arranged`) puts them into ours. `low_latency_combine` reads
rows by such an array and layout, whoever made them, and sums a token's choices times their weights.

Choices. `ep_combine_masked` wants every choice's answer, not their sum: so each (token, choice) pair is a token of one
choice here, number t * k + j, and its weight 1 (exact). The messages are the same; buffers are as large as k * capacity
tokens need (MOST_BYTES bounds them), and NVSHMEM_QP_DEPTH, 1024 unless set, allows k * capacity <= 511.

Pairs. The library takes two buffers in turn, by a counter on the host: a captured graph stays right only if every
dispatch has its combine. So both ops are adapted, and the handle holds them together: it is the specification's
[place, slots], then the tokens and the layout of the rows as they lie now. Where combines went elsewhere (a compiled
model drops what the specification's handle has not), no dispatch is captured.

Buffers. One per group, made at the first call, which is collective: sizes are the same on every rank, and so is what is
taken. A larger need makes a larger one; not during a capture.

Not adapted: training. `dispatch` sends a token once per rank and `combine` returns the sum over ranks, rounded to bf16
for each: no answers by choice. Between nodes it also waits on the host for counts.
"""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.distributed import distributed_c10d

from ...ops.collectives import ep_combine_masked, ep_dispatch_masked, group_size
from ..probing import Unavailable, available, find, is_capturing, require_hopper

PRIORITY = 30
HIDDEN = (2048, 2560, 4096, 5120, 6144, 7168, 8192)  # what kernels of all its releases are made for
MOST_BYTES = 16 * 2**30
MOST_EXPERTS = 1024  # per launch: 14 groups of warps on each of 132 multiprocessors, and some to spare
QUEUE_DEPTH = 1024  # NVSHMEM_QP_DEPTH where nobody set it


def _library() -> ModuleType:
    return find("deep_ep", ("Buffer",))


def _probe() -> None:
    require_hopper()
    if find_spec("triton") is None:
        raise Unavailable("triton is not installed: nothing to put rows in order with")
    library = _library()
    names = ("low_latency_dispatch", "low_latency_combine", "get_low_latency_rdma_size_hint")
    missing = [name for name in names if not hasattr(library.Buffer, name)]
    if missing:
        raise Unavailable(f"deep_ep.Buffer has no {', '.join(missing)}: another release")


_AVAILABLE = available("deep_ep", _probe)


@dataclass
class _Made:
    """A group's buffer, and what it was made for. open: dispatches that no combine has followed."""

    buffer: Any
    bytes: int
    experts: int
    open: int = 0


_buffers: dict[str, _Made] = {}


def _bytes(bound: int, D: int, group: str, num_experts: int) -> int:
    return int(_library().Buffer.get_low_latency_rdma_size_hint(bound, D, group_size(group), num_experts))


def _is_there(size: int, num_experts: int, group: str) -> bool:
    """Is there a buffer for these sizes? Its signals lie by the number of experts alone, so that must be the same."""
    made = _buffers.get(group)
    return made is not None and made.bytes >= size and made.experts == num_experts


def _made(size: int, num_experts: int, group: str) -> _Made:
    if not _is_there(size, num_experts, group):
        old = _buffers.pop(group, None)
        if old is not None:
            old.buffer.destroy()  # waits for the device
        buffer = _library().Buffer(
            distributed_c10d._resolve_process_group(group),  # type: ignore[arg-type]
            0,
            size,
            low_latency_mode=True,
            num_qps_per_rank=num_experts // group_size(group),
            explicitly_destroy=True,
        )
        _buffers[group] = _Made(buffer, size, num_experts)
    return _buffers[group]


def _index_type() -> torch.dtype:
    return getattr(_library(), "topk_idx_t", torch.int64)  # older releases have no other


def _dispatches(x: Tensor, idx: Tensor, num_experts: int, capacity: int, group: str) -> bool:
    """Nothing here may differ between ranks: the number of tokens does not count, the capacity does."""
    if (
        x.dtype != torch.bfloat16
        or idx.dtype != torch.int32
        or x.shape[1] not in HIDDEN
        or num_experts > MOST_EXPERTS
        or idx.shape[0] > capacity
    ):
        return False
    bound, size = capacity * idx.shape[1], group_size(group)
    depth = int(os.environ.get("NVSHMEM_QP_DEPTH", QUEUE_DEPTH))
    if num_experts % size or bound * size % 4 or bound == 0 or 2 * (bound + 1) > depth:
        return False
    needed = _bytes(bound, x.shape[1], group, num_experts)
    if is_capturing():
        return _is_there(needed, num_experts, group) and _buffers[group].open == 0
    return needed <= MOST_BYTES


@ep_dispatch_masked.kernel(
    "cuda", "deep_ep", priority=PRIORITY, available=_AVAILABLE, supports=_dispatches, checked="emulated"
)
def ep_dispatch_masked_deep_ep(
    x: Tensor, idx: Tensor, num_experts: int, capacity: int, group: str
) -> tuple[Tensor, Tensor, list[Tensor]]:
    from ..triton.expert_parallel import arranged, pack_blocks

    k, bound = idx.shape[1], capacity * idx.shape[1]
    place, _, _ = pack_blocks(None, idx, num_experts, capacity, group_size(group), x.shape[1])
    made = _made(_bytes(bound, x.shape[1], group, num_experts), num_experts, group)
    made.open += 1
    received, _, (source, layout, *_), _, _ = made.buffer.low_latency_dispatch(
        x.repeat_interleave(k, 0), idx.reshape(-1, 1).to(_index_type()), bound, num_experts, use_fp8=False
    )
    rows, counts, slots, source, layout = arranged(received, source, layout, capacity)
    return rows, counts, [place, slots, source, layout]


def _combines(y: Tensor, handle: list[Tensor], group: str) -> bool:
    return len(handle) == 4 and y.dtype == torch.bfloat16


@ep_combine_masked.kernel(
    "cuda", "deep_ep", priority=PRIORITY, available=_AVAILABLE, supports=_combines, checked="emulated"
)
def ep_combine_masked_deep_ep(y: Tensor, handle: list[Tensor], group: str) -> Tensor:
    from ..triton.expert_parallel import spaced

    place, slots, source, layout = handle
    (e, C, D), W = y.shape, group_size(group)
    bound, num_experts = source.shape[1] // W, e * W
    index = place.reshape(-1, 1).div(C // W, rounding_mode="floor").to(_index_type())
    made = _made(_bytes(bound, D, group, num_experts), num_experts, group)
    made.open -= 1
    rows, _, _ = made.buffer.low_latency_combine(
        spaced(y, slots, W * bound),
        index,
        torch.ones(index.shape, dtype=torch.float32, device=y.device),
        (source, layout, bound, D, num_experts),
    )
    return rows
