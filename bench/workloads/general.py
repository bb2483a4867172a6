"""Norms, rotary positions, SwiGLU, and the input of multi-token prediction."""

from typing import Any

import torch

from .maker import HIDDEN, INNER, Maker, workload

TRAINING, DECODING = 4096, 64  # tokens
QUERY_RANK, LATENT, ROTARY, HEADS = 1536, 512, 64, 128
DENSE = 18_432  # the inner size of the first layers, which have no experts
EPS = 1e-6


def _positions(make: Maker, tokens: int) -> tuple[Any, ...]:
    """Positions of `tokens` and a table of cosines and sines."""
    return torch.arange(tokens, device=make.device), make.real(tokens, ROTARY, dtype=torch.float32)


@workload("rms_norm", "4096 x 7168")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(TRAINING, HIDDEN), make.real(HIDDEN), EPS


@workload("rms_norm", "64 x 7168")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(DECODING, HIDDEN), make.real(HIDDEN), EPS


@workload("rms_norm", "4096 x 1536, the query's latent")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(TRAINING, QUERY_RANK), make.real(QUERY_RANK), EPS


@workload("rms_norm", "4096 x 512 of 576, the cache's latent")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(TRAINING, LATENT + ROTARY)[:, :LATENT], make.real(LATENT), EPS


@workload("rms_norm", "64 x 512 of 576")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(DECODING, LATENT + ROTARY)[:, :LATENT], make.real(LATENT), EPS


@workload("add_rms_norm", "4096 x 7168")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(TRAINING, HIDDEN), make.real(TRAINING, HIDDEN), make.real(HIDDEN), EPS


@workload("add_rms_norm", "64 x 7168")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(DECODING, HIDDEN), make.real(DECODING, HIDDEN), make.real(HIDDEN), EPS


@workload("rms_norm_backward", "4096 x 7168")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(TRAINING, HIDDEN), make.real(TRAINING, HIDDEN), make.real(HIDDEN), EPS


@workload("rms_norm_backward", "4096 x 1536")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(TRAINING, QUERY_RANK), make.real(TRAINING, QUERY_RANK), make.real(QUERY_RANK), EPS


@workload("rms_norm_backward", "4096 x 512 of 576")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(TRAINING, LATENT), make.real(TRAINING, LATENT + ROTARY)[:, :LATENT], make.real(LATENT), EPS


@workload("add_rms_norm_backward", "4096 x 7168")
def _(make: Maker) -> tuple[Any, ...]:
    return *(make.real(TRAINING, HIDDEN) for _ in range(3)), make.real(HIDDEN), EPS


@workload("rope", "4096 x 16 heads x 64 of 192")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(TRAINING, 16, 192)[..., 128:], *_positions(make, TRAINING)


@workload("rope", "64 x 128 heads x 64 of 192")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(DECODING, HEADS, 192)[..., 128:], *_positions(make, DECODING)


@workload("rope", "4096 x 64 of 576, the key's")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(TRAINING, LATENT + ROTARY)[:, LATENT:], *_positions(make, TRAINING)


@workload("rope_backward", "4096 x 16 heads x 64")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(TRAINING, 16, ROTARY), *_positions(make, TRAINING)


@workload("swiglu", "4096 x 2048, weighted")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(TRAINING, 2 * INNER), make.real(TRAINING, dtype=torch.float32)


@workload("swiglu", "64 x 18432")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(DECODING, 2 * DENSE), None


@workload("swiglu_backward", "4096 x 2048, weighted")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(TRAINING, INNER), make.real(TRAINING, 2 * INNER), make.real(TRAINING, dtype=torch.float32)


@workload("swiglu_backward", "4096 x 18432")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(TRAINING, DENSE), make.real(TRAINING, 2 * DENSE), None


@workload("mtp_input", "4096 x 7168")
def _(make: Maker) -> tuple[Any, ...]:
    return *(make.real(TRAINING, HIDDEN) for _ in range(2)), *(make.real(HIDDEN) for _ in range(2)), EPS


@workload("mtp_input", "64 x 7168")
def _(make: Maker) -> tuple[Any, ...]:
    return *(make.real(DECODING, HIDDEN) for _ in range(2)), *(make.real(HIDDEN) for _ in range(2)), EPS


@workload("mtp_input_backward", "4096 x 7168")
def _(make: Maker) -> tuple[Any, ...]:
    tensors = [make.real(TRAINING, HIDDEN) for _ in range(2)] + [make.real(HIDDEN) for _ in range(2)]
    return make.real(TRAINING, 2 * HIDDEN), *tensors, EPS
