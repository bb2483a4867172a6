"""AITER (the distribution `amd-aiter`): AMD's FP8 products and attention over the latent cache on MI300 and MI350.

Signatures: ROCm/aiter e404860 (46 commits after 0.1.20; aiter/ops/gemm_op_a8w8.py, aiter/mla.py,
csrc/py_itfs_cu/asm_mla.cu). PyPI's `aiter` is a library for asyncio; it is told apart by its functions.

- `gemm_a8w8_blockscale(a, b, sa, sb, dtype)`: a [T, K], b [N, K] in the chip's FP8 format, sa f32 [T, Kb] by rows (ours
  is M-major: it is copied), sb f32 [Nb, Kb] -> [T, N].
- `mla_decode_fwd(q [tokens, H, 576], pages [slots, 1, 1, 576], out, qo_indptr, kv_indptr, kv_indices, last_page_lens,
  S, ...)` -> (partial results, natural log-sum-exp f32 [tokens, H]); causal, aligned to the end. Pages of one token
  are what all its releases take, so the page table becomes a list of slots, on the device and per call: `plan` is not
  read, and whichever kernel made it, it fits. On gfx942 there are bfloat16 kernels for 16 heads and for 128.
  The log-sum-exp is not written where a sequence is not split, so it is split in two at least.
"""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ...ops.formats import BLOCK, E4M3, E4M3_FNUZ
from ...ops.fp8 import fp8_gemm
from ...ops.mla_cache import mla_decode
from ..probing import Unavailable, available, find, takes

PRIORITY = 30
STEP_N = 64  # the tuned tables hold multiples only
FORMATS = {"gfx942": E4M3_FNUZ, "gfx950": E4M3}
HEADS = (16, 128)
LEAST_SPLITS, MOST_SPLITS = 2, 16


@cache
def _chip() -> str:
    if torch.version.hip is None or not torch.cuda.is_available():
        raise Unavailable("no AMD GPU here")
    name: str = torch.cuda.get_device_properties().gcnArchName.split(":")[0]
    if name not in FORMATS:
        raise Unavailable(f"made for {' and '.join(FORMATS)}, this GPU is {name}")
    return name


@cache
def _units() -> int:
    return torch.cuda.get_device_properties().multi_processor_count


def _gemm_library() -> ModuleType:
    return find("aiter", ("gemm_a8w8_blockscale",))


def _probe_gemm() -> None:
    _chip()
    _gemm_library()


def _supports_gemm(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, out_dtype: torch.dtype) -> bool:
    return (
        a.dtype == b.dtype == FORMATS[_chip()]
        and out_dtype in (torch.bfloat16, torch.float16)
        and sa.dtype == sb.dtype == torch.float32
        and a.is_contiguous()
        and b.is_contiguous()
        and sb.is_contiguous()
        and a.shape[1] % BLOCK == 0
        and b.shape[0] % STEP_N == 0
        and a.numel() > 0
    )


@fp8_gemm.kernel(
    "rocm",
    "aiter",
    priority=PRIORITY,
    available=available("aiter", _probe_gemm),
    supports=_supports_gemm,
    checked="emulated",
)
def fp8_gemm_aiter(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, out_dtype: torch.dtype) -> Tensor:
    out: Tensor = _gemm_library().gemm_a8w8_blockscale(a, b, sa.contiguous(), sb, out_dtype)
    return out


def _mla_library() -> ModuleType:
    return find("aiter.mla", ("mla_decode_fwd",))


def _probe_mla() -> None:
    if _chip() != "gfx942":
        raise Unavailable("its kernels for gfx950 want a schedule of their own")
    if not takes(_mla_library().mla_decode_fwd, "return_lse", "num_kv_splits"):
        raise Unavailable("this release of aiter returns no log-sum-exp from mla_decode_fwd")


def _supports_mla(
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
        q.dtype == cache[0].dtype == torch.bfloat16
        and (q.shape[3], cache[0].shape[2], kv_lora_rank) == (576, 576, 512)
        and q.shape[2] in HEADS
        and q.shape[1] <= 4
        and cache[0].is_contiguous()
        and q.numel() > 0
    )


def _slots(table: Tensor, lens: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """Where each sequence's tokens begin, i32 [B + 1], and the slots of all tokens end to end, i32.

    The list is as long as the table allows; what is behind its last token is not read.
    """
    B, W = table.shape
    begins = torch.nn.functional.pad(lens.cumsum(0, dtype=torch.int32), (1, 0))
    token = torch.arange(W * page, device=table.device, dtype=torch.int32)
    known = token < lens[:, None]
    slot = (table[:, :, None] * page + torch.arange(page, device=table.device, dtype=torch.int32)).flatten(1)
    slots = torch.zeros(B * W * page + 1, dtype=torch.int32, device=table.device)  # the last takes what is not known
    place = torch.where(known, begins[:-1, None] + token, B * W * page)
    return begins, slots.scatter_(0, place.flatten().long(), torch.where(known, slot, 0).flatten())


@mla_decode.kernel(
    "rocm",
    "aiter",
    priority=PRIORITY,
    available=available("aiter.mla", _probe_mla),
    supports=_supports_mla,
    checked="emulated",
)
def mla_decode_aiter(
    q: Tensor,
    cache: list[Tensor],
    table: Tensor,
    lens: Tensor,
    lens_cpu: Tensor,
    plan: list[Tensor],
    scale: float,
    kv_lora_rank: int,
) -> tuple[Tensor, Tensor]:
    (B, S, H, D), pages = q.shape, cache[0]
    begins, slots = _slots(table, lens, pages.shape[1])
    out = q.new_empty(B * S, H, kv_lora_rank)
    _, lse = _mla_library().mla_decode_fwd(
        q.reshape(B * S, H, D).contiguous(),
        pages.view(-1, 1, 1, D),
        out,
        torch.arange(0, (B + 1) * S, S, dtype=torch.int32, device=q.device),
        begins,
        slots,
        torch.ones(B, dtype=torch.int32, device=q.device),
        S,
        page_size=1,
        nhead_kv=1,
        sm_scale=scale,
        num_kv_splits=min(max(_units() // B, LEAST_SPLITS), MOST_SPLITS),
        return_lse=True,
    )
    blind = (lens[:, None] < S - torch.arange(S, device=q.device))[..., None]  # queries that see no key: 0 / 0 there
    out = out.view(B, S, H, kv_lora_rank).masked_fill_(blind[..., None], 0.0)
    return out, lse.view(B, S, H).masked_fill(blind, float("-inf"))
