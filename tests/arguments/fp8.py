"""Arguments for the ops of ops/fp8.py and ops/grouped_fp8.py."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from arguments.draw import REAL, SEEDS, TOKENS, normal
from arguments.gemm import ROWS, ragged
from dsv3.ops.formats import E4M3, E4M3_FNUZ, FP8_MAX, num_blocks

FORMATS = st.sampled_from([E4M3, E4M3_FNUZ])
INPUTS = st.sampled_from([64, 128, 192, 256])
OUTPUTS = st.sampled_from([16, 128, 200, 576])  # 576 = 4.5 blocks: kv_a_proj
MANY_TOKENS = st.sampled_from([1, 7, 33, 128, 130, 256])
GRADIENTS = st.sampled_from([16, 64, 136])


def values(draw: Callable[..., Any], *shape: int, dtype: torch.dtype) -> Tensor:
    """FP8 numbers of all sizes, subnormal and largest ones too."""
    x = normal(draw, *shape, scale=FP8_MAX[dtype] / 4)
    return x.clamp(-FP8_MAX[dtype], FP8_MAX[dtype]).to(dtype)


def scales(draw: Callable[..., Any], *shape: int) -> Tensor:
    """Scales between 1/512 and 2; powers of two or not."""
    generator = torch.Generator().manual_seed(draw(SEEDS))
    exponents = torch.randint(-8, 1, shape, generator=generator)
    factors = 0.5 + 1.5 * torch.rand(shape, generator=generator) if draw(st.booleans()) else 1.0
    return torch.ldexp(torch.ones(shape), exponents) * factors


def tiles(draw: Callable[..., Any], T: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values [T, K] and scales [T, Kb], M-major as `quantize_tiles` gives them."""
    padded = scales(draw, num_blocks(K), T + -T % 4)
    return values(draw, T, K, dtype=dtype), padded.T[:T]


def real(draw: Callable[..., Any], *shape: int) -> Tensor:
    """Activations with outliers and a tile of zeros now and then."""
    x = normal(draw, *shape, dtype=draw(REAL), scale=10.0 ** draw(st.integers(-6, 3)))
    if draw(st.booleans()):
        x[0] = 0
    return x


def capacity(draw: Callable[..., Any], experts: int, C: int) -> Tensor:
    return torch.tensor(draw(st.lists(st.integers(0, C), min_size=experts, max_size=experts)), dtype=torch.int32)


@st.composite
def quantize_tiles(draw: Callable[..., Any]) -> tuple[Any, ...]:
    return real(draw, draw(MANY_TOKENS), draw(INPUTS)), draw(FORMATS), draw(st.booleans())


@st.composite
def quantize_blocks(draw: Callable[..., Any]) -> tuple[Any, ...]:
    experts = draw(st.sampled_from([(), (1,), (3,)]))
    return real(draw, *experts, draw(OUTPUTS), draw(INPUTS)), draw(FORMATS), draw(st.booleans())


@st.composite
def dequantize_tiles(draw: Callable[..., Any]) -> tuple[Any, ...]:
    return *tiles(draw, draw(MANY_TOKENS), draw(INPUTS), draw(FORMATS)), draw(REAL)


@st.composite
def dequantize_blocks(draw: Callable[..., Any]) -> tuple[Any, ...]:
    experts, N, K = draw(st.sampled_from([(), (1,), (3,)])), draw(OUTPUTS), draw(INPUTS)
    q = values(draw, *experts, N, K, dtype=draw(FORMATS))
    return q, scales(draw, *experts, num_blocks(N), num_blocks(K)), draw(REAL)


@st.composite
def fp8_gemm(draw: Callable[..., Any]) -> tuple[Any, ...]:
    T, N, K, dtype = draw(ROWS), draw(OUTPUTS), draw(INPUTS), draw(FORMATS)
    a, sa = tiles(draw, T, K, dtype)
    if draw(st.booleans()):  # Dgrad reads the weight transposed
        b, sb = values(draw, K, N, dtype=dtype).T, scales(draw, num_blocks(K), num_blocks(N)).T
    else:
        b, sb = values(draw, N, K, dtype=dtype), scales(draw, num_blocks(N), num_blocks(K))
    return a, sa, b, sb, draw(REAL)


@st.composite
def fp8_gemm_wgrad(draw: Callable[..., Any]) -> tuple[Any, ...]:
    T, N, K, dtype = draw(MANY_TOKENS), draw(GRADIENTS), draw(GRADIENTS), draw(FORMATS)
    return *tiles(draw, N, T, dtype), *tiles(draw, K, T, dtype)


@st.composite
def swiglu_quantize(draw: Callable[..., Any]) -> tuple[Any, ...]:
    T, I = draw(TOKENS), draw(INPUTS)  # noqa: E741
    weight = normal(draw, T) if draw(st.booleans()) else None
    return normal(draw, T, 2 * I, dtype=draw(REAL)), weight, draw(FORMATS), draw(st.booleans())


@st.composite
def grouped_fp8_gemm(draw: Callable[..., Any]) -> tuple[Any, ...]:
    (R, E, bounds), N, K, dtype = draw(ragged()), draw(OUTPUTS), draw(INPUTS), draw(FORMATS)
    weight = values(draw, E, N, K, dtype=dtype), scales(draw, E, num_blocks(N), num_blocks(K))
    return *tiles(draw, R, K, dtype), *weight, bounds, draw(REAL)


@st.composite
def masked_fp8_gemm(draw: Callable[..., Any]) -> tuple[Any, ...]:
    E, C, N, K, dtype = draw(st.integers(1, 4)), draw(TOKENS), draw(OUTPUTS), draw(INPUTS), draw(FORMATS)
    a, sa = values(draw, E, C, K, dtype=dtype), scales(draw, E, C, num_blocks(K))
    weight = values(draw, E, N, K, dtype=dtype), scales(draw, E, num_blocks(N), num_blocks(K))
    counts = capacity(draw, E, C)
    for expert, count in enumerate(counts.tolist()):
        sa[expert, count:] = torch.nan
    return a, sa, *weight, counts, draw(REAL)


@st.composite
def grouped_fp8_wgrad(draw: Callable[..., Any]) -> tuple[Any, ...]:
    """Segments of whole tiles, as `permute` makes them with align 128, or of any size, and rows behind the last."""
    N, K, dtype = draw(GRADIENTS), draw(GRADIENTS), draw(FORMATS)
    sizes = draw(
        st.lists(st.sampled_from(draw(st.sampled_from([[0, 128, 256], [0, 100, 128, 300]]))), min_size=1, max_size=3)
    )
    bounds = torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    R = max(1, sum(sizes)) + draw(st.sampled_from([0, 5]))
    return *tiles(draw, N, R, dtype), *tiles(draw, K, R, dtype), bounds


ARGUMENTS = {
    "quantize_tiles": quantize_tiles(),
    "quantize_tiles_both": quantize_tiles(),
    "quantize_blocks": quantize_blocks(),
    "dequantize_tiles": dequantize_tiles(),
    "dequantize_blocks": dequantize_blocks(),
    "fp8_gemm": fp8_gemm(),
    "fp8_gemm_wgrad": fp8_gemm_wgrad(),
    "swiglu_quantize": swiglu_quantize(),
    "grouped_fp8_gemm": grouped_fp8_gemm(),
    "masked_fp8_gemm": masked_fp8_gemm(),
    "grouped_fp8_wgrad": grouped_fp8_wgrad(),
}
