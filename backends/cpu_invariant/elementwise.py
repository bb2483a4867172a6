"""Norms, SwiGLU and what they are made of, so that a number's result does not depend on where it stands.

PyTorch computes most of a tensor with vectors and its end, or the end of a thread's share, with scalars. Where IEEE
says how an operation rounds (sum, product, quotient, root) both agree. They do not where a scalar function differs from
its vector form (silu, sigmoid), nor where a product and a sum may be contracted into one (complex products, addcmul):
those are not used here. Rotation is left to its specification, which is made of single products and sums.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ...ops.general import add_rms_norm, rms_norm, swiglu
from ...ops.mtp import mtp_input
from . import NAME

Function = Callable[[Tensor], Tensor]
SUMMED_AT_ONCE = (
    1 << 14
)  # longer rows are summed in parts: PyTorch splits one of 2^15 over threads if it is the only one
REPEATS, PERIOD = 24, 4093  # the check's values come REPEATS times, and a prime number meets every place of a vector


@cache
def is_even(function: Function, threads: int) -> bool:
    """Does this elementwise function give a number the same result wherever it stands? Tried once."""
    values = torch.linspace(-20.0, 20.0, PERIOD)
    once = function(values)
    in_parts = torch.cat([function(part.clone()) for part in values.split(17)])
    often = function(values.repeat(REPEATS)).view(REPEATS, PERIOD)
    return torch.equal(in_parts, once) and bool((often == once).all())


def evenly(function: Function, x: Tensor) -> Tensor:
    """function(x), x [T, ...]; row by row where the function is not even, as then each row has the same places."""
    if not len(x) or is_even(function, torch.get_num_threads()):
        return function(x)
    return torch.stack([function(row.clone()) for row in x])


def exp(x: Tensor) -> Tensor:
    """x [T, ...] -> e^x."""
    return evenly(torch.exp, x)


def log(x: Tensor) -> Tensor:
    """x [T, ...], not negative -> its natural logarithm."""
    return evenly(_log, x)


def _log(x: Tensor) -> Tensor:
    return x.abs().log_()


def row_sum(x: Tensor) -> Tensor:
    """x [..., D] -> [..., 1], summed in the same order whatever the other dimensions are."""
    D = x.shape[-1]
    if D <= SUMMED_AT_ONCE:
        return x.sum(-1, keepdim=True)
    return row_sum(torch.cat([part.sum(-1, keepdim=True) for part in x.split(SUMMED_AT_ONCE, -1)], -1))


def sigmoid(x: Tensor) -> Tensor:
    return exp(-x).add_(1.0).reciprocal_()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def normed(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """As `rms_norm`."""
    wide = _wide(x)
    mean = row_sum(wide * wide).div_(x.shape[-1])
    return ((wide / mean.add_(eps).sqrt_()).to(x.dtype) * w).to(x.dtype)


def gated(gate_up: Tensor, weight: Tensor | None) -> Tensor:
    """As `swiglu`, in float32 at least."""
    gate, up = _wide(gate_up).chunk(2, -1)
    hidden = (gate / exp(-gate).add_(1.0)).mul_(up)
    return hidden if weight is None else hidden * weight[:, None]


@rms_norm.kernel(NAME, "rows", checked="hardware")
def rms_norm_rows(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return normed(x, w, eps)


@add_rms_norm.kernel(NAME, "rows", checked="hardware")
def add_rms_norm_rows(x: Tensor, residual: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return normed(total, w, eps), total


@mtp_input.kernel(NAME, "rows", checked="hardware")
def mtp_input_rows(hidden: Tensor, embedding: Tensor, hnorm_w: Tensor, enorm_w: Tensor, eps: float) -> Tensor:
    return torch.cat([normed(embedding, enorm_w, eps), normed(hidden, hnorm_w, eps)], -1)


@swiglu.kernel(NAME, "rows", checked="hardware")
def swiglu_rows(gate_up: Tensor, weight: Tensor | None) -> Tensor:
    return gated(gate_up, weight).to(gate_up.dtype)
