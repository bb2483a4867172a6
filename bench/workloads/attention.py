"""Attention in its expanded form: training and prefill, and the merging of partial results."""

from typing import Any

import torch
from torch import Tensor

from .maker import BF16, Maker, workload

NOPE, ROPE, V = 128, 64, 128
SCALE = 0.1352337788608801  # V3's: 192 ** -0.5, times YaRN's share for 40 times the context


def _lengths(make: Maker, *lengths: int) -> Tensor:
    return torch.tensor([0, *lengths], device=make.device).cumsum(0).to(torch.int32)


def _inputs(
    make: Maker, heads: int, q_lengths: list[int], k_lengths: list[int], dtype: torch.dtype = BF16
) -> tuple[Any, ...]:
    Tq, Tk = sum(q_lengths), sum(k_lengths)
    k_nope, v = make.real(Tk, heads, NOPE + V, dtype=dtype).split([NOPE, V], -1)  # as kv_b_proj gives them
    return (
        make.real(Tq, heads, NOPE + ROPE, dtype=dtype), k_nope, make.real(Tk, ROPE, dtype=dtype), v,
        _lengths(make, *q_lengths), _lengths(make, *k_lengths), max(q_lengths), max(k_lengths), SCALE, True,
    )  # fmt: skip


def _gradients(make: Maker, inputs: tuple[Any, ...], lse: bool = False) -> tuple[Any, ...]:
    """Arguments of the backward; out and lse are made up, of the right size."""
    q, dtype = inputs[0], inputs[0].dtype
    Tq, H, _ = q.shape
    return (
        make.real(Tq, H, V, dtype=dtype), make.real(Tq, H, dtype=torch.float32) if lse else None, *inputs[:4],
        make.real(Tq, H, V, dtype=dtype), make.real(Tq, H, dtype=torch.float32) + 8.0, *inputs[4:],
    )  # fmt: skip


@workload("mla_attention", "4 x 4096, 16 heads")
def _(make: Maker) -> tuple[Any, ...]:
    return _inputs(make, 16, [4096] * 4, [4096] * 4)


@workload("mla_attention", "2048 against 16,384, 16 heads")
def _(make: Maker) -> tuple[Any, ...]:
    return _inputs(make, 16, [2048], [16_384])


@workload("mla_attention", "2048, 128 heads")
def _(make: Maker) -> tuple[Any, ...]:
    return _inputs(make, 128, [2048], [2048])


@workload("mla_attention", "64 x 32, 16 heads")
def _(make: Maker) -> tuple[Any, ...]:
    return _inputs(make, 16, [32] * 64, [32] * 64)


@workload("mla_attention", "2 x 512, 16 heads, float32")
def _(make: Maker) -> tuple[Any, ...]:
    return _inputs(make, 16, [512] * 2, [512] * 2, torch.float32)


@workload("mla_attention_backward", "4 x 4096, 16 heads")
def _(make: Maker) -> tuple[Any, ...]:
    return _gradients(make, _inputs(make, 16, [4096] * 4, [4096] * 4))


@workload("mla_attention_backward", "4096, 128 heads")
def _(make: Maker) -> tuple[Any, ...]:
    return _gradients(make, _inputs(make, 128, [4096], [4096]))


@workload("mla_attention_backward", "2048 against 16,384, 16 heads, part of a larger softmax")
def _(make: Maker) -> tuple[Any, ...]:
    return _gradients(make, _inputs(make, 16, [2048], [16_384]), lse=True)


@workload("mla_attention_backward", "2 x 512, 16 heads, float32")
def _(make: Maker) -> tuple[Any, ...]:
    return _gradients(make, _inputs(make, 16, [512] * 2, [512] * 2, torch.float32))


def _sides(make: Maker, T: int, heads: int, dtype: torch.dtype = BF16) -> tuple[Any, ...]:
    return (
        make.real(T, heads, V, dtype=dtype), make.real(T, heads, dtype=torch.float32),
        make.real(T, heads, V, dtype=dtype), make.real(T, heads, dtype=torch.float32),
    )  # fmt: skip


@workload("merge_lse", "4096, 128 heads")
def _(make: Maker) -> tuple[Any, ...]:
    return _sides(make, 4096, 128)


@workload("merge_lse", "32, 16 heads, float32")
def _(make: Maker) -> tuple[Any, ...]:
    return _sides(make, 32, 16, torch.float32)


@workload("merge_lse_backward", "4096, 128 heads")
def _(make: Maker) -> tuple[Any, ...]:
    return _sides(make, 4096, 128)[:2] + _sides(make, 4096, 128)
