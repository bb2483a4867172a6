"""FP8: quantising, behind norms too, and dequantising."""

from typing import Any

import torch

from .general import EPS, QUERY_RANK
from .maker import BF16, HIDDEN, INNER, Maker, workload


@workload("quantize_tiles", "4096 x 7168")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(4096, HIDDEN), make.fp8, False


@workload("quantize_tiles", "64 x 7168, power-of-two scales")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(64, HIDDEN), make.fp8, True


@workload("quantize_tiles_both", "4096 x 7168")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(4096, HIDDEN), make.fp8, False


@workload("quantize_blocks", "7168 x 2048")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(HIDDEN, INNER, dtype=torch.float32), make.fp8, False


@workload("swiglu_quantize", "4096 x 2048, weighted")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(4096, 2 * INNER), make.real(4096, dtype=torch.float32), make.fp8, False


@workload("rms_norm_quantize", "4096 x 7168")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(4096, HIDDEN), make.real(HIDDEN), EPS, make.fp8, False


@workload("rms_norm_quantize", "64 x 7168, power-of-two scales")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(64, HIDDEN), make.real(HIDDEN), EPS, make.fp8, True


@workload("rms_norm_quantize", "4096 x 1536, the query's latent")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(4096, QUERY_RANK), make.real(QUERY_RANK), EPS, make.fp8, False


@workload("rms_norm_quantize", "64 x 1536")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(64, QUERY_RANK), make.real(QUERY_RANK), EPS, make.fp8, False


@workload("add_rms_norm_quantize", "4096 x 7168")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(4096, HIDDEN), make.real(4096, HIDDEN), make.real(HIDDEN), EPS, make.fp8, False


@workload("add_rms_norm_quantize", "64 x 7168")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(64, HIDDEN), make.real(64, HIDDEN), make.real(HIDDEN), EPS, make.fp8, False


@workload("dequantize_tiles", "4096 x 7168")
def _(make: Maker) -> tuple[Any, ...]:
    return *make.tiles(4096, HIDDEN), BF16


@workload("dequantize_blocks", "576 x 7168")
def _(make: Maker) -> tuple[Any, ...]:
    return *make.blocks(576, HIDDEN), BF16
