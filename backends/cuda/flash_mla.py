"""FlashMLA: attention over the latent cache on Hopper.

Signatures: deepseek-ai/FlashMLA 9241ae3 (1.0.0; flash_mla/flash_mla_interface.py, csrc/api/dense_decode.h).
`flash_mla_with_kvcache(q [B, S, H, 576], cache [P, 64, 1, 576], table i32, lens i32, 512, schedule, ...)` -> out
[B, S, H, 512], natural log-sum-exp f32 [B, H, S] that is +inf where nothing was seen. Its causal mask is aligned to the
end; it reads neither table entries behind a sequence's last page nor, as numbers, what is behind its last token. An FP8
cache it takes for sparse attention only.

The schedule. Releases before FlashMLASchedMeta had it as tensors; now it is an object that the first call fills, from
the lengths and from S * H, which `mla_decode_plan` does not know. A tensor's content cannot stand for it, and an object
kept between calls would be stale in a replayed graph. So every call starts from an empty one (one small launch), and
`plan` is not read: whichever kernel made it, it fits.
"""

from types import ModuleType

import torch
from torch import Tensor

from ...ops.mla_cache import mla_decode
from ..probing import available, find, require_hopper

PAGE = 64


def _library() -> ModuleType:
    return find("flash_mla.flash_mla_interface", ("FlashMLASchedMeta", "get_mla_metadata", "flash_mla_with_kvcache"))


def _probe() -> None:
    require_hopper()
    _library()


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
        q.dtype == cache[0].dtype == torch.bfloat16
        and (q.shape[3], cache[0].shape[2], kv_lora_rank) == (576, 576, 512)
        and cache[0].shape[1] == PAGE
        and cache[0].is_contiguous()
        and table.dtype == lens.dtype == torch.int32
        and q.numel() > 0
    )


@mla_decode.kernel(
    "cuda",
    "flash_mla",
    priority=30,
    available=available("flash_mla", _probe),
    supports=_supports,
    checked="emulated",
)
def mla_decode_flash_mla(
    q: Tensor,
    cache: list[Tensor],
    table: Tensor,
    lens: Tensor,
    lens_cpu: Tensor,
    plan: list[Tensor],
    scale: float,
    kv_lora_rank: int,
) -> tuple[Tensor, Tensor]:
    library = _library()
    out, lse = library.flash_mla_with_kvcache(
        q.contiguous(),
        cache[0].unsqueeze(2),
        table.contiguous(),
        lens.contiguous(),
        kv_lora_rank,
        library.get_mla_metadata()[0],
        softmax_scale=scale,
        causal=True,
    )
    return out.contiguous(), lse.masked_fill(lse == float("inf"), float("-inf")).transpose(1, 2).contiguous()
