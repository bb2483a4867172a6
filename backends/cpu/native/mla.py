"""The latent cache in float32: new rows, and attention of few queries over short contexts."""

import torch
from torch import Tensor

from ....ops.mla_cache import mla_cache_write, mla_decode, mla_decode_plan
from . import SMALL, SMALL_PRODUCT, built, extension, is_real


def _plan_applies(lens: Tensor, num_heads: int, page: int) -> bool:
    return lens.dtype is torch.int32 and lens.is_cpu and lens.dim() == 1 and lens.is_contiguous()


@mla_decode_plan.kernel("cpu", "native", priority=20, available=built, supports=_plan_applies)
def _mla_decode_plan(lens: Tensor, num_heads: int, page: int) -> list[Tensor]:
    out = torch.empty_like(lens)
    extension.mla_decode_plan(lens.data_ptr(), out.data_ptr(), len(lens), page)
    return [out]


def _write_applies(cache: list[Tensor], slots: Tensor, latent: Tensor) -> bool:
    pages = cache[0]
    return (
        is_real(latent)
        and latent.dim() == 2
        and latent.numel() <= SMALL
        and latent.is_contiguous()
        and pages.dtype is torch.float32
        and pages.dim() == 3
        and pages.shape[2] == latent.shape[1]
        and pages.is_contiguous()
        and slots.dtype is torch.int64
        and slots.shape == latent.shape[:1]
        and slots.is_contiguous()
    )


@mla_cache_write.kernel("cpu", "native", priority=20, available=built, supports=_write_applies)
def _mla_cache_write(cache: list[Tensor], slots: Tensor, latent: Tensor) -> None:
    num_pages, page, width = cache[0].shape
    extension.mla_cache_write(
        cache[0].data_ptr(), slots.data_ptr(), latent.data_ptr(), num_pages * page, len(latent), width
    )


def _decode_applies(
    q: Tensor,
    cache: list[Tensor],
    table: Tensor,
    lens: Tensor,
    lens_cpu: Tensor,
    plan: list[Tensor],
    scale: float,
    kv_lora_rank: int,
) -> bool:
    pages = cache[0]
    if not is_real(q) or pages.dtype is not torch.float32 or not (table.dtype is lens_cpu.dtype is torch.int32):
        return False
    (B, S, H, D), page, width = q.shape, pages.shape[1], table.shape[1]
    fits = B * S * H * D * width * page <= SMALL_PRODUCT  # of the longest that the table could hold
    shaped = pages.shape[2] == D and table.shape[0] == B and lens_cpu.shape == (B,) and kv_lora_rank <= D
    whole = q.is_contiguous() and pages.is_contiguous()
    return fits and shaped and whole and table.stride(1) == 1 and lens_cpu.is_contiguous()


@mla_decode.kernel("cpu", "native", priority=20, available=built, supports=_decode_applies)
def _mla_decode(
    q: Tensor,
    cache: list[Tensor],
    table: Tensor,
    lens: Tensor,
    lens_cpu: Tensor,
    plan: list[Tensor],
    scale: float,
    kv_lora_rank: int,
) -> tuple[Tensor, Tensor]:
    (B, S, H, D), (num_pages, page, _) = q.shape, cache[0].shape
    out, lse = torch.empty(B, S, H, kv_lora_rank), torch.empty(B, S, H)
    extension.mla_decode(
        q.data_ptr(), cache[0].data_ptr(), table.data_ptr(), lens_cpu.data_ptr(), out.data_ptr(), lse.data_ptr(),
        B, S, H, D, kv_lora_rank, page, num_pages, table.shape[1], table.stride(0), scale,
    )  # fmt: skip
    return out, lse
