"""Matrix products: of V3's layers and of the 32 experts of one device of eight, FP8 and real."""

from typing import Any

import torch
from torch import Tensor

from .maker import BF16, HIDDEN, INNER, Maker, workload

LOCAL = 32  # experts of a device
OUT_HEADS = 16_384  # 128 heads of 128
QUERIES, LOW_RANK = 24_576, 1536
LATENTS = 2112  # q_a and kv_a side by side


def bounds(make: Maker, rows: int) -> Tensor:
    """Equal segments, all but the last 100 rows."""
    return (torch.arange(LOCAL + 1, device=make.device) * ((rows - 100) // LOCAL)).int()


def counts(make: Maker, used: int) -> Tensor:
    return torch.full((LOCAL,), used, dtype=torch.int32, device=make.device)


def dense(make: Maker, T: int, N: int, K: int) -> tuple[Any, ...]:
    return *make.tiles(T, K), *make.blocks(N, K), BF16


@workload("fp8_gemm", "4096 x 16384 -> 7168")
def _(make: Maker) -> tuple[Any, ...]:
    return dense(make, 4096, HIDDEN, OUT_HEADS)


@workload("fp8_gemm", "16 x 16384 -> 7168")
def _(make: Maker) -> tuple[Any, ...]:
    return dense(make, 16, HIDDEN, OUT_HEADS)


@workload("fp8_gemm", "64 x 7168 -> 2112")
def _(make: Maker) -> tuple[Any, ...]:
    return dense(make, 64, LATENTS, HIDDEN)


@workload("fp8_gemm", "128 x 1536 -> 24576")
def _(make: Maker) -> tuple[Any, ...]:
    return dense(make, 128, QUERIES, LOW_RANK)


@workload("fp8_gemm", "4096 x 7168 -> 16384, gradient of the input")
def _(make: Maker) -> tuple[Any, ...]:
    w, s = make.blocks(HIDDEN, OUT_HEADS)
    return *make.tiles(4096, HIDDEN), w.T, s.T, BF16


@workload("fp8_gemm", "77 x 7168 -> 576, weight transposed, float32")
def _(make: Maker) -> tuple[Any, ...]:
    w, s = make.blocks(HIDDEN, 576)
    return *make.tiles(77, HIDDEN), w.T, s.T, torch.float32


@workload("fp8_gemm_wgrad", "4096 tokens, 7168 x 16384")
def _(make: Maker) -> tuple[Any, ...]:
    return *make.tiles(HIDDEN, 4096), *make.tiles(OUT_HEADS, 4096)


@workload("fp8_gemm_wgrad", "1001 tokens, 576 x 7168")
def _(make: Maker) -> tuple[Any, ...]:
    return *make.tiles(576, 1001), *make.tiles(HIDDEN, 1001)


@workload("grouped_fp8_gemm", "32768 rows of 32 experts, 7168 -> 4096")
def _(make: Maker) -> tuple[Any, ...]:
    return *make.tiles(32_768, HIDDEN), *make.blocks(LOCAL, 2 * INNER, HIDDEN), bounds(make, 32_768), BF16


@workload("grouped_fp8_gemm", "512 rows of 32 experts, 2048 -> 7168")
def _(make: Maker) -> tuple[Any, ...]:
    return *make.tiles(512, INNER), *make.blocks(LOCAL, HIDDEN, INNER), bounds(make, 512), BF16


@workload("grouped_fp8_gemm", "32768 rows of 32 experts, 4096 -> 7168, gradient of the input")
def _(make: Maker) -> tuple[Any, ...]:
    w, s = make.blocks(LOCAL, 2 * INNER, HIDDEN)
    return *make.tiles(32_768, 2 * INNER), w.mT, s.mT, bounds(make, 32_768), BF16


def capacity(make: Maker, C: int, N: int, K: int) -> tuple[Any, ...]:
    scales = torch.rand(LOCAL, C, K // 128, device=make.device) + 0.5
    return make.values(LOCAL, C, K), scales, *make.blocks(LOCAL, N, K), counts(make, C // 2), BF16


@workload("masked_fp8_gemm", "128 rows of capacity, 7168 -> 4096")
def _(make: Maker) -> tuple[Any, ...]:
    return capacity(make, 128, 2 * INNER, HIDDEN)


@workload("masked_fp8_gemm", "16 rows of capacity, 2048 -> 7168")
def _(make: Maker) -> tuple[Any, ...]:
    return capacity(make, 16, HIDDEN, INNER)


@workload("grouped_fp8_wgrad", "32768 rows of 32 experts, 4096 x 7168")
def _(make: Maker) -> tuple[Any, ...]:
    return *make.tiles(2 * INNER, 32_768), *make.tiles(HIDDEN, 32_768), aligned_bounds(make, 32_768)


@workload("grouped_fp8_wgrad", "1001 rows of 32 experts, 4096 x 7168")
def _(make: Maker) -> tuple[Any, ...]:
    return *make.tiles(2 * INNER, 1001), *make.tiles(HIDDEN, 1001), bounds(make, 1001)


def aligned_bounds(make: Maker, rows: int) -> Tensor:
    """As `permute` with align 128 makes them."""
    return (torch.arange(LOCAL + 1, device=make.device) * (rows // LOCAL // 128 * 128)).int()


@workload("grouped_gemm", "32768 rows of 32 experts, 7168 -> 4096")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(32_768, HIDDEN), make.real(LOCAL, 2 * INNER, HIDDEN), bounds(make, 32_768), "plain"


@workload("grouped_gemm", "512 rows of 32 experts, 2048 -> 7168")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(512, INNER), make.real(LOCAL, HIDDEN, INNER), bounds(make, 512), "plain"


@workload("grouped_gemm", "1024 rows of 32 experts, 500 -> 1001, float32")
def _(make: Maker) -> tuple[Any, ...]:
    wide = torch.float32
    return make.real(1024, 500, dtype=wide), make.real(LOCAL, 1001, 500, dtype=wide), bounds(make, 1024), "plain"


@workload("grouped_gemm_dgrad", "32768 rows of 32 experts, 4096 -> 7168")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(32_768, 2 * INNER), make.real(LOCAL, 2 * INNER, HIDDEN), bounds(make, 32_768)


@workload("grouped_gemm_wgrad", "32768 rows of 32 experts, 4096 x 7168")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(32_768, 2 * INNER), make.real(32_768, HIDDEN), bounds(make, 32_768)


@workload("masked_gemm", "128 rows of capacity, 7168 -> 4096")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(LOCAL, 128, HIDDEN), make.real(LOCAL, 2 * INNER, HIDDEN), counts(make, 64)


@workload("grouped_gemm_wgrad", "1024 rows of 32 experts, 501 x 500, float32")
def _(make: Maker) -> tuple[Any, ...]:
    wide = torch.float32
    return make.real(1024, 501, dtype=wide), make.real(1024, 500, dtype=wide), bounds(make, 1024)


@workload("masked_gemm", "16 rows of capacity, 2048 -> 7168")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(LOCAL, 16, INNER), make.real(LOCAL, HIDDEN, INNER), counts(make, 8)


@workload("gemm", "4096 x 7168 -> 4096")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(4096, HIDDEN), make.real(2 * INNER, HIDDEN), "plain"


@workload("gemm", "16 x 7168 -> 256, float32")  # the router
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(16, HIDDEN, dtype=torch.float32), make.real(256, HIDDEN, dtype=torch.float32), "plain"


@workload("gemm_dgrad", "4096 x 4096 -> 7168")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(4096, 2 * INNER), make.real(2 * INNER, HIDDEN)


@workload("gemm_wgrad", "4096 tokens, 4096 x 7168")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(4096, 2 * INNER), make.real(4096, HIDDEN)


@workload("batched_gemm", "32 tokens, 128 heads, 128 -> 512")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(32, 128, 128).transpose(0, 1), make.real(128, 512, 128)
