"""Arguments of the norms that quantise."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from .draw import REAL, TOKENS, Draw, normal
from .fp8 import FORMATS
from .general import EPS

SIZES = st.sampled_from([64, 128, 200, 320])  # below a tile, one, and with a last one that is cut short


def inputs(draw: Draw) -> tuple[Tensor, Tensor]:
    """Rows, neighbours or halves of wider ones, and a weight; now and then a row of zeros."""
    T, D, dtype = draw(TOKENS), draw(SIZES), draw(REAL)
    x = normal(draw, T, D + 64, dtype=dtype)[:, :D]
    x = x if draw(st.booleans()) else x.contiguous()
    if draw(st.booleans()):
        x[0] = 0.0
    return x, normal(draw, D, dtype=dtype)


def format_(draw: Draw) -> tuple[torch.dtype, bool]:
    return draw(FORMATS), draw(st.booleans())


@st.composite
def rms_norm_quantize(draw: Draw) -> tuple:
    return *inputs(draw), draw(EPS), *format_(draw)


@st.composite
def add_rms_norm_quantize(draw: Draw) -> tuple:
    x, w = inputs(draw)
    return x, normal(draw, *x.shape, dtype=x.dtype), w, draw(EPS), *format_(draw)


ARGUMENTS = {"rms_norm_quantize": rms_norm_quantize(), "add_rms_norm_quantize": add_rms_norm_quantize()}
