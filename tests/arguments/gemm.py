"""Arguments for the ops of ops/gemm.py."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from arguments.draw import REAL, TOKENS, normal, offsets

# Wide enough that no row of a product cancels to nothing: errors are measured relative to whole rows. 20 is no multiple
# of what grouped products of vendors align to in bfloat16, 17 in none.
SIZES = st.sampled_from([16, 17, 20, 32, 64])
EXPERTS = st.integers(1, 6)
ROWS = st.one_of(TOKENS, st.sampled_from([150, 300]))  # kernels for many rows an expert want more than tokens of a step


def rows_of_no_expert_are_nan(x: Tensor, bounds: Tensor) -> Tensor:
    """Nothing may depend on the rows behind the last segment."""
    x[int(bounds[-1]) :] = torch.nan
    return x


@st.composite
def ragged(draw: Callable[..., Any]) -> tuple[int, int, Tensor]:
    """Rows, experts and boundaries; sometimes an empty expert, all rows at one expert, or rows of no expert."""
    rows, experts = draw(ROWS), draw(EXPERTS)
    return rows, experts, offsets(draw, draw(st.integers(0, rows)), experts)


@st.composite
def gemm(draw: Callable[..., Any]) -> tuple[Any, ...]:
    M, N, K, dtype = draw(TOKENS), draw(SIZES), draw(SIZES), draw(REAL)
    return normal(draw, M, K, dtype=dtype), normal(draw, N, K, dtype=dtype), "plain"


@st.composite
def gemm_dgrad(draw: Callable[..., Any]) -> tuple[Any, ...]:
    M, N, K, dtype = draw(TOKENS), draw(SIZES), draw(SIZES), draw(REAL)
    return normal(draw, M, N, dtype=dtype), normal(draw, N, K, dtype=dtype)


@st.composite
def gemm_wgrad(draw: Callable[..., Any]) -> tuple[Any, ...]:
    M, N, K, dtype = draw(TOKENS), draw(SIZES), draw(SIZES), draw(REAL)
    return normal(draw, M, N, dtype=dtype), normal(draw, M, K, dtype=dtype)


@st.composite
def grouped_gemm(draw: Callable[..., Any]) -> tuple[Any, ...]:
    (R, E, bounds), N, K, dtype = draw(ragged()), draw(SIZES), draw(SIZES), draw(REAL)
    a = rows_of_no_expert_are_nan(normal(draw, R, K, dtype=dtype), bounds)
    return a, normal(draw, E, N, K, dtype=dtype), bounds, "plain"


@st.composite
def grouped_gemm_dgrad(draw: Callable[..., Any]) -> tuple[Any, ...]:
    (R, E, bounds), N, K, dtype = draw(ragged()), draw(SIZES), draw(SIZES), draw(REAL)
    grad = rows_of_no_expert_are_nan(normal(draw, R, N, dtype=dtype), bounds)
    return grad, normal(draw, E, N, K, dtype=dtype), bounds


@st.composite
def grouped_gemm_wgrad(draw: Callable[..., Any]) -> tuple[Any, ...]:
    (R, _, bounds), N, K, dtype = draw(ragged()), draw(SIZES), draw(SIZES), draw(REAL)
    grad, a = normal(draw, R, N, dtype=dtype), normal(draw, R, K, dtype=dtype)
    return rows_of_no_expert_are_nan(grad, bounds), rows_of_no_expert_are_nan(a, bounds), bounds


@st.composite
def masked_gemm(draw: Callable[..., Any]) -> tuple[Any, ...]:
    E, C, N, K, dtype = draw(EXPERTS), draw(TOKENS), draw(SIZES), draw(SIZES), draw(REAL)
    counts = torch.tensor(draw(st.lists(st.integers(0, C), min_size=E, max_size=E)), dtype=torch.int32)
    a = normal(draw, E, C, K, dtype=dtype)
    for expert, count in enumerate(counts.tolist()):
        a[expert, count:] = torch.nan
    return a, normal(draw, E, N, K, dtype=dtype), counts


@st.composite
def batched_gemm(draw: Callable[..., Any]) -> tuple[Any, ...]:
    B, M, N, K, dtype = draw(EXPERTS), draw(TOKENS), draw(SIZES), draw(SIZES), draw(REAL)
    a = normal(draw, M, B, K, dtype=dtype).transpose(0, 1)  # heads side by side, as queries come
    return a, normal(draw, B, N, K, dtype=dtype)


ARGUMENTS = {
    "batched_gemm": batched_gemm(),
    "gemm": gemm(),
    "gemm_dgrad": gemm_dgrad(),
    "gemm_wgrad": gemm_wgrad(),
    "grouped_gemm": grouped_gemm(),
    "grouped_gemm_dgrad": grouped_gemm_dgrad(),
    "grouped_gemm_wgrad": grouped_gemm_wgrad(),
    "masked_gemm": masked_gemm(),
}
