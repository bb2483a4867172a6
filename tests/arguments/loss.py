"""Arguments of the head's loss."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from dsv3.ops.loss import IGNORE, linear_cross_entropy

from .draw import REAL, TOKENS, Draw, integers, normal


def inputs(draw: Draw) -> tuple[Tensor, Tensor, Tensor, float]:
    T, V, dtype = draw(TOKENS), draw(st.sampled_from([33, 200])), draw(REAL)
    # A single number that comes out near 0 says nothing where the gradients of logits are rounded to 16 bits.
    D = draw(st.sampled_from([1, 16, 48] if dtype == torch.float32 else [16, 48]))
    target = integers(draw, 0, V, T).long()
    target[integers(draw, 0, 4, T) == 0] = IGNORE
    # Small weights: a distribution with one certain outcome has entropy and gradients of nothing but rounding errors.
    h, w = normal(draw, T, D, dtype=dtype), normal(draw, V, D, dtype=dtype, scale=0.1)
    return h, w, target, draw(st.sampled_from([1.0, 0.7]))


@st.composite
def forward(draw: Draw) -> tuple:
    return inputs(draw)


@st.composite
def backward(draw: Draw) -> tuple:
    h, w, target, temperature = inputs(draw)
    target[0] = target[0].clamp_min(0)  # without any target, the gradient is the entropy's alone
    _, entropy, lse = linear_cross_entropy.spec(h, w, target, temperature)
    # Never the entropy's alone: near the mean of log p, its gradient is a difference of equal numbers.
    wanted = draw(st.sampled_from([(1, 0, 0), (1, 1, 1), (0, 0, 1), (1, 1, 0)]))
    grads = [normal(draw, len(h)) if want else None for want in wanted]
    return *grads, h, w, target, temperature, entropy, lse


ARGUMENTS = {"linear_cross_entropy": forward(), "linear_cross_entropy_backward": backward()}
