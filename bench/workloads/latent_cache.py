"""The latent cache: decoding, writing and gathering."""

from typing import Any

import torch
from torch import Tensor

from ...ops.mla_cache import encode_fp8_latent, fp8_latent_bytes, mla_decode_plan
from .maker import Maker, workload

RANK, ROPE, PAGE, HEADS = 512, 64, 64, 128
SCALE = (128 + ROPE) ** -0.5


def _pages(make: Maker, count: int, fp8: bool) -> Tensor:
    """Pages full of latents; of few different ones where they are FP8."""
    if not fp8:
        return make.real(count, PAGE, RANK + ROPE)
    page = encode_fp8_latent(make.real(PAGE, RANK + ROPE), fp8_latent_bytes(RANK, ROPE))
    return page.expand(count, -1, -1).contiguous()


def _sequences(make: Maker, batch: int, context: int) -> tuple[Tensor, Tensor]:
    """Page table of neighbouring pages and lengths of `batch` sequences."""
    width = -(-context // PAGE)
    table = torch.arange(batch * width, dtype=torch.int32, device=make.device).view(batch, width)
    return table, torch.full((batch,), context, dtype=torch.int32, device=make.device)


def _decode(make: Maker, batch: int, heads: int, context: int, fp8: bool = False, new: int = 1) -> tuple[Any, ...]:
    table, lens = _sequences(make, batch, context)
    cache, q = [_pages(make, table.numel(), fp8)], make.real(batch, new, heads, RANK + ROPE)
    lens_cpu = torch.full((batch,), context, dtype=torch.int32)
    return q, cache, table, lens, lens_cpu, list(mla_decode_plan.spec(lens, heads, PAGE)), SCALE, RANK


@workload("mla_decode", "32 x 8192, 128 heads")
def _(make: Maker) -> tuple[Any, ...]:
    return _decode(make, 32, HEADS, 8192)


@workload("mla_decode", "32 x 8192, 128 heads, FP8")
def _(make: Maker) -> tuple[Any, ...]:
    return _decode(make, 32, HEADS, 8192, fp8=True)


@workload("mla_decode", "128 x 4096, 16 heads")
def _(make: Maker) -> tuple[Any, ...]:
    return _decode(make, 128, 16, 4096)


@workload("mla_decode", "128 x 4096, 16 heads, FP8")
def _(make: Maker) -> tuple[Any, ...]:
    return _decode(make, 128, 16, 4096, fp8=True)


@workload("mla_decode", "1 x 131072, 128 heads, 2 new tokens")
def _(make: Maker) -> tuple[Any, ...]:
    return _decode(make, 1, HEADS, 131_072, new=2)


@workload("mla_decode", "4 x 1024, 16 heads, float32")
def _(make: Maker) -> tuple[Any, ...]:
    q, [cache], *rest = _decode(make, 4, 16, 1024)
    return q.float(), [cache.float()], *rest


def _write(make: Maker, tokens: int, fp8: bool) -> tuple[Any, ...]:
    cache = _pages(make, 4096 // PAGE, fp8)
    return [cache], torch.arange(tokens, device=make.device), make.real(tokens, RANK + ROPE)


@workload("mla_cache_write", "4096 tokens, FP8")
def _(make: Maker) -> tuple[Any, ...]:
    return _write(make, 4096, fp8=True)


@workload("mla_cache_write", "4096 tokens")
def _(make: Maker) -> tuple[Any, ...]:
    return _write(make, 4096, fp8=False)


@workload("mla_cache_write", "32 tokens, FP8")
def _(make: Maker) -> tuple[Any, ...]:
    return _write(make, 32, fp8=True)


def _gather(make: Maker, fp8: bool) -> tuple[Any, ...]:
    table, lens = _sequences(make, 4, 1024)
    bounds = torch.arange(0, 4096 + 1, 1024, dtype=torch.int32, device=make.device)
    return [_pages(make, table.numel(), fp8)], table, lens, bounds, 4096, RANK


@workload("mla_cache_gather", "4096 tokens, FP8")
def _(make: Maker) -> tuple[Any, ...]:
    return _gather(make, fp8=True)


@workload("mla_cache_gather", "4096 tokens")
def _(make: Maker) -> tuple[Any, ...]:
    return _gather(make, fp8=False)
