"""Quantising to FP8 and back: tiles of 1 x 128, blocks of 128 x 128, both orientations in one read, SwiGLU fused.

All are bound by memory: a program reads some rows of one column of tiles, once, and writes values and scales.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...ops.formats import BLOCK, E4M3, FP8_MAX, num_blocks, round_up
from ...ops.fp8 import (
    SCALE_ROWS,
    dequantize_blocks,
    dequantize_tiles,
    quantize_blocks,
    quantize_tiles,
    quantize_tiles_both,
    swiglu_quantize,
)
from .fp8_bits import read_fp8, write_fp8
from .operands import by_rows, is_real
from .runtime import device_function, gpu_kernel, kernel, launch
from .tables import tile
from .target import current_target

SIDE = tl.constexpr(BLOCK)
SMALLEST = tl.constexpr(2.0**-126)


@device_function
def scale_of(largest, finite, FP8_LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """Scales of tiles with these largest magnitudes, by the rule of ops/fp8.py; NaN where not `finite`."""
    scale = tl.maximum(tl.div_rn(largest, tl.full(largest.shape, FP8_LARGEST, tl.float32)), SMALLEST)
    if POWER_OF_TWO:
        bits = scale.to(tl.int32, bitcast=True)
        exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
    scale = tl.where(largest > 0, scale, 1.0)
    return tl.where(finite, scale, float("nan"))


@device_function
def quantized(x, AXIS: tl.constexpr, FP8_LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """x [.., ..] f32, each line along AXIS a tile -> x / scale within the format's range, scale."""
    # Largest numbers are compared as numbers, which passes over NaN: whether there is any is asked apart.
    finite = tl.max(((x - x) != 0).to(tl.int32), AXIS) == 0
    scale = scale_of(tl.max(tl.abs(x), AXIS), finite, FP8_LARGEST, POWER_OF_TWO)
    lines = tl.expand_dims(scale, AXIS)
    scaled = tl.div_rn(x, tl.broadcast_to(lines, x.shape))
    clamped = tl.minimum(tl.maximum(scaled, -FP8_LARGEST), FP8_LARGEST)
    return tl.where(scaled != scaled, scaled, clamped), scale


@kernel
def quantize_tiles_kernel(
    x, weight, q, s, T, K, x_row, s_column,
    ROWS: tl.constexpr, SWIGLU: tl.constexpr, FP8_LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    DECODE: tl.constexpr,
):  # fmt: skip
    """x [T, K] (SWIGLU: [T, 2K], gate first; weight f32 [T] or None) -> q [T, K], s [T, Kb] M-major."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    mask = (row < T)[:, None] & (column < K)[None, :]
    place = x + row[:, None] * x_row + column[None, :]
    values = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    if SWIGLU:
        up = tl.load(place + K, mask=mask, other=0.0).to(tl.float32)
        values = tl.div_rn(values, 1.0 + tl.exp(-values)) * up
        if weight is not None:
            values = values * tl.load(weight + row, mask=row < T, other=0.0)[:, None]
    scaled, scale = quantized(values, 1, FP8_LARGEST, POWER_OF_TWO)
    write_fp8(q + row[:, None] * K + column[None, :], scaled, mask, DECODE)
    tl.store(s + tl.program_id(1).to(tl.int64) * s_column + row, scale, mask=row < T)


@kernel
def quantize_both_kernel(
    x, q, s, qt, st, T, K, x_row, s_column, st_column,
    FP8_LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    """x [T, K] -> q [T, K], s [T, Kb] of its rows; qt [K, T], st [K, Tb] of its columns; scales M-major."""
    row = tl.program_id(0).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    column = tl.program_id(1).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    mask = (row < T)[:, None] & (column < K)[None, :]
    values = tl.load(x + row[:, None] * x_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
    scaled, scale = quantized(values, 1, FP8_LARGEST, POWER_OF_TWO)
    write_fp8(q + row[:, None] * K + column[None, :], scaled, mask, DECODE)
    tl.store(s + tl.program_id(1).to(tl.int64) * s_column + row, scale, mask=row < T)
    scaled, scale = quantized(values, 0, FP8_LARGEST, POWER_OF_TWO)
    write_fp8(qt + column[None, :] * T + row[:, None], scaled, mask, DECODE)
    tl.store(st + tl.program_id(0).to(tl.int64) * st_column + column, scale, mask=column < K)


@kernel
def quantize_blocks_kernel(
    w, q, s, N, K, FP8_LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr, DECODE: tl.constexpr
):  # fmt: skip
    """w [E, N, K] -> q [E, N, K], s [E, Nb, Kb]; a program a block."""
    block = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    column = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    mask = (row < N)[:, None] & (column < K)[None, :]
    place = block * N * K + row.to(tl.int64)[:, None] * K + column[None, :]
    values = tl.reshape(tl.load(w + place, mask=mask, other=0.0).to(tl.float32), (1, SIDE * SIDE))
    scaled, scale = quantized(values, 1, FP8_LARGEST, POWER_OF_TWO)
    write_fp8(q + place, tl.reshape(scaled, (SIDE, SIDE)), mask, DECODE)
    at = (block * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
    tl.store(s + at + tl.arange(0, 1), scale)


@kernel
def dequantize_kernel(
    q, s, out, N, K, q_batch, q_row, s_batch, s_row, s_column,
    ROWS: tl.constexpr, HEIGHT: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    """q [E, N, K], s [E, ceil(N / HEIGHT), Kb] -> out [E, N, K], their product in out's dtype."""
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    mask = (row < N)[:, None] & (column < K)[None, :]
    values = read_fp8(q + batch * q_batch + row[:, None] * q_row + column[None, :], mask, DECODE)
    scale = s + batch * s_batch + (row // HEIGHT) * s_row + tl.program_id(1).to(tl.int64) * s_column
    real = values * tl.load(scale, mask=row < N, other=0.0)[:, None]
    tl.store(out + (batch * N + row[:, None]) * K + column[None, :], real.to(out.dtype.element_ty), mask=mask)


# Launchers -----------------------------------------------------------------------------------------------------------


def knows(dtype: torch.dtype) -> bool:
    """Can kernels read and write this FP8 format here? E4M3FN everywhere but on gfx942, where its bytes are decoded."""
    return dtype in (E4M3, current_target().fp8)


def storage(values: Tensor) -> tuple[Tensor, bool]:
    """FP8 values as kernels take them: themselves, or their bytes, to be decoded, on a chip without their format."""
    if values.dtype == current_target().fp8:
        return values, False
    return values.view(torch.uint8), True


def scales_like(x: Tensor, rows: int, columns: int) -> Tensor:
    """Uninitialised M-major scales f32 [rows, columns]: see `ops.fp8.m_major`."""
    return x.new_empty(columns, round_up(rows, SCALE_ROWS), dtype=torch.float32).T[:rows]


def format_of(dtype: torch.dtype, power_of_two: bool) -> dict[str, Any]:
    """A format as kernels that write FP8 take it."""
    return {"FP8_LARGEST": FP8_MAX[dtype], "POWER_OF_TWO": power_of_two, "DECODE": dtype != current_target().fp8}


def _tiles(x: Tensor, weight: Tensor | None, K: int, dtype: torch.dtype, power_of_two: bool) -> tuple[Tensor, Tensor]:
    T = x.shape[0]
    x = by_rows(x)
    q, s = x.new_empty(T, K, dtype=dtype), scales_like(x, T, num_blocks(K))
    shape = tile("quantize_tiles", T=T)
    launch(
        quantize_tiles_kernel, (-(-T // shape["ROWS"]), num_blocks(K)), x, weight, storage(q)[0], s, T, K, x.stride(0),
        s.stride(1), SWIGLU=x.shape[1] > K, **format_of(dtype, power_of_two), **shape,
    )  # fmt: skip
    return q, s


@gpu_kernel(quantize_tiles, lambda x, dtype=E4M3, power_of_two=False: is_real(x) and knows(dtype))
def quantize_tiles_triton(x: Tensor, dtype: torch.dtype = E4M3, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    return _tiles(x, None, x.shape[1], dtype, power_of_two)


@gpu_kernel(swiglu_quantize, lambda x, weight=None, dtype=E4M3, power_of_two=False: is_real(x) and knows(dtype))
def swiglu_quantize_triton(
    gate_up: Tensor, weight: Tensor | None = None, dtype: torch.dtype = E4M3, power_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    weight = None if weight is None else weight.contiguous()
    return _tiles(gate_up, weight, gate_up.shape[1] // 2, dtype, power_of_two)


@gpu_kernel(quantize_tiles_both, lambda x, dtype=E4M3, power_of_two=False: is_real(x) and knows(dtype))
def quantize_tiles_both_triton(
    x: Tensor, dtype: torch.dtype = E4M3, power_of_two: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    T, K = x.shape
    x = by_rows(x)
    q, s = x.new_empty(T, K, dtype=dtype), scales_like(x, T, num_blocks(K))
    qt, st = x.new_empty(K, T, dtype=dtype), scales_like(x, K, num_blocks(T))
    launch(
        quantize_both_kernel, (num_blocks(T), num_blocks(K)), x, storage(q)[0], s, storage(qt)[0], st, T, K,
        x.stride(0), s.stride(1), st.stride(1), **format_of(dtype, power_of_two), **tile("quantize_tiles_both"),
    )  # fmt: skip
    return q, s, qt, st


@gpu_kernel(quantize_blocks, lambda w, dtype=E4M3, power_of_two=False: is_real(w) and knows(dtype))
def quantize_blocks_triton(w: Tensor, dtype: torch.dtype = E4M3, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    *experts, N, K = w.shape
    w = w.contiguous()
    q = torch.empty_like(w, dtype=dtype)
    s = w.new_empty(*experts, num_blocks(N), num_blocks(K), dtype=torch.float32)
    grid = num_blocks(N), num_blocks(K), experts[0] if experts else 1
    launch(
        quantize_blocks_kernel, grid, w, storage(q)[0], s, N, K, **format_of(dtype, power_of_two),
        **tile("quantize_blocks"),
    )  # fmt: skip
    return q, s


def _dequantize(q: Tensor, s: Tensor, dtype: torch.dtype, height: int) -> Tensor:
    *_, N, K = q.shape
    out = q.new_empty(q.shape, dtype=dtype)
    values, scales = (x if x.dim() == 3 else x[None] for x in (by_rows(q), s))
    raw, decode = storage(values)
    shape = tile("dequantize", N=N)
    launch(
        dequantize_kernel, (-(-N // shape["ROWS"]), num_blocks(K), len(values)), raw, scales, out, N, K,
        raw.stride(0), raw.stride(1), *scales.stride(), HEIGHT=height, DECODE=decode, **shape,
    )  # fmt: skip
    return out


def _dequantizes(q: Tensor, s: Tensor, dtype: torch.dtype) -> bool:
    return knows(q.dtype) and dtype in (torch.float32, torch.bfloat16)


@gpu_kernel(dequantize_tiles, _dequantizes)
def dequantize_tiles_triton(q: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    return _dequantize(q, s, dtype, 1)


@gpu_kernel(dequantize_blocks, _dequantizes)
def dequantize_blocks_triton(q: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    return _dequantize(q, s, dtype, BLOCK)
