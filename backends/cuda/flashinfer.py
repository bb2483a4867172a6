"""FlashInfer: attention over the latent cache, planned on the host.

Signatures: flashinfer-ai/flashinfer fb28d72 (0.6.18; flashinfer/mla/_core.py, csrc/batch_mla_sm90_run.cu), the same in
0.5.2. `BatchMLAPagedAttentionWrapper.plan` takes lengths as host tensors without a copy, `run` takes queries and cache
as views with any strides but the last, and gives the log-sum-exp to the base 2. A sequence's pages begin at kv_indptr
in kv_indices and are as many as its length needs: a page table row by row is such a list, unread entries and all.

The plan. It lives in the wrapper, and depends on S, H and scale, which `mla_decode_plan` does not know: it is made at
the first `mla_decode` of a step and serves the step's other layers, as long as the lengths on the host, the table and
all sizes are the same. `plan` is not read: whichever kernel made it, it fits. A graph would freeze the host's part, so
during a capture this kernel is not taken.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from ...ops.mla_cache import mla_decode
from ..probing import available, find, is_capturing, require_hopper

WORKSPACE = 128 * 2**20  # bytes, what the library recommends for partial results
LN_2 = 0.6931471805599453


def _library() -> ModuleType:
    return find("flashinfer.mla", ("BatchMLAPagedAttentionWrapper",), "0.5")


def _probe() -> None:
    require_hopper()
    _library()


@dataclass
class _Planned:
    """A wrapper and what it was planned for."""

    wrapper: Any
    lens: Tensor  # on the host
    table: Any  # weak reference

    def fits(self, lens: Tensor, table: Tensor) -> bool:
        return self.table() is table and torch.equal(self.lens, lens)


# Sizes -> plan; few, as a step has few: the model's queries, and those of its MTP modules.
_plans: dict[tuple[Any, ...], _Planned] = {}
_workspaces: dict[torch.device, Tensor] = {}


def _planned(q: Tensor, page: int, table: Tensor, lens: Tensor, scale: float, R: int) -> Any:
    """The wrapper, planned for these lengths (on the host) and this table."""
    (B, S, H, D), W = q.shape, table.shape[1]
    key = (B, S, H, D, W, R, page, scale, q.dtype, q.device)
    known = _plans.get(key)
    if known is not None and known.fits(lens, table):
        return known.wrapper
    if known is None:
        if len(_plans) >= 8:
            _plans.clear()
        if q.device not in _workspaces:
            _workspaces[q.device] = torch.zeros(WORKSPACE, dtype=torch.uint8, device=q.device)
        wrapper = _library().BatchMLAPagedAttentionWrapper(_workspaces[q.device])
    else:
        wrapper = known.wrapper
    each = torch.arange(B + 1, dtype=torch.int32)
    wrapper.plan(each * S, each * W, table.flatten(), lens, H, R, D - R, page, True, scale, q.dtype, q.dtype)
    _plans[key] = _Planned(wrapper, lens.clone(), ref(table))
    return wrapper


def _supports(
    q: Tensor,
    cache: list[Tensor],
    table: Tensor,
    lens: Tensor,
    lens_cpu: Tensor,
    plan: list[Tensor],
    scale: float,
    kv_lora_rank: int,
) -> bool:
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and q.dtype == cache[0].dtype
        and (q.shape[3], cache[0].shape[2], kv_lora_rank) == (576, 576, 512)
        and table.dtype == lens_cpu.dtype == torch.int32
        and table.is_contiguous()  # the plan keeps a view of it
        and q.numel() > 0
        and not is_capturing()
        and int(lens_cpu.min()) >= q.shape[1]  # every query sees a key
    )


@mla_decode.kernel(
    "cuda",
    "flashinfer",
    priority=20,
    available=available("flashinfer", _probe),
    supports=_supports,
    checked="emulated",
)
def mla_decode_flashinfer(
    q: Tensor,
    cache: list[Tensor],
    table: Tensor,
    lens: Tensor,
    lens_cpu: Tensor,
    plan: list[Tensor],
    scale: float,
    kv_lora_rank: int,
) -> tuple[Tensor, Tensor]:
    (B, S, H, _), R, pages = q.shape, kv_lora_rank, cache[0]
    wrapper = _planned(q, pages.shape[1], table, lens_cpu, scale, R)
    rows = q.flatten(0, 1)
    out, lse = rows.new_empty(B * S, H, R), rows.new_empty(B * S, H, dtype=torch.float32)
    wrapper.run(rows[..., :R], rows[..., R:], pages[..., :R], pages[..., R:], out=out, lse=lse, return_lse=True)
    return out.view(B, S, H, R), lse.mul_(LN_2).view(B, S, H)
