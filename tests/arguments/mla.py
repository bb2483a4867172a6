"""Arguments of the attention and latent cache ops."""

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from dsv3.ops.mla import mla_attention
from dsv3.ops.mla_cache import encode_fp8_latent, fp8_latent_bytes, mla_decode_plan

from .draw import REAL, Draw, integers, normal

HEADS = st.sampled_from([1, 2, 4])
HEAD_DIMS = st.sampled_from([(32, 16, 32), (16, 16, 32), (16, 8, 48), (12, 4, 10)])  # n, r, dv
LATENT_DIMS = st.sampled_from([(32, 16), (128, 16), (256, 8)])  # R, r
SCALES = st.sampled_from([0.1, 0.25])


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def attention_inputs(draw: Draw) -> tuple:
    """Sequences of equal and of unequal lengths, longer in queries or in keys, empty ones; rows that belong to none."""
    (n, r, dv), H, dtype = draw(HEAD_DIMS), draw(HEADS), draw(REAL)
    batch = draw(st.integers(1, 3))
    lengths = st.lists(st.sampled_from([0, 1, 5, 16, 21]), min_size=batch, max_size=batch)
    q_len = draw(st.one_of(lengths, st.sampled_from([1, 7, 40, 150 // batch]).map(lambda length: [length] * batch)))
    k_len = draw(st.one_of(st.just(q_len), lengths))
    Tq, Tk = (max(sum(lengths) + draw(st.sampled_from([0, 3])), 1) for lengths in (q_len, k_len))
    return (
        normal(draw, Tq, H, n + r, dtype=dtype),
        normal(draw, Tk, H, n, dtype=dtype),
        normal(draw, Tk, r, dtype=dtype),
        normal(draw, Tk, H, dv, dtype=dtype),
        cumulative(q_len),
        cumulative(k_len),
        max(q_len),
        max(k_len),
        draw(SCALES),
        draw(st.booleans()),
    )


@st.composite
def attention(draw: Draw) -> tuple:
    return attention_inputs(draw)


@st.composite
def attention_backward(draw: Draw) -> tuple:
    inputs = attention_inputs(draw)
    out, lse = mla_attention.spec(*inputs)
    # Of a larger softmax, whose other keys have values of zero. Always in float32: a sequence's first query, which sees
    # one key, has else a gradient of nothing but rounding errors, and the specification's own are larger than 1e-4.
    if out.dtype == torch.float32 or draw(st.booleans()):
        out, lse = out * 0.75, lse - math.log(0.75)
    grad_out = normal(draw, *out.shape, dtype=out.dtype)
    # Where every query sees one key, its gradient is exactly the one that comes through lse.
    alone = inputs[7] == 1
    grad_lse = draw(st.sampled_from([None] * (not alone) + [normal(draw, *lse.shape)]))
    return grad_out, grad_lse, *inputs[:4], out, lse, *inputs[4:]


def merge_inputs(draw: Draw) -> list[Tensor]:
    """Two partial results; each may have seen nothing for some rows, both for the same."""
    T, H, dv, dtype = draw(st.integers(1, 9)), draw(HEADS), draw(st.sampled_from([1, 16])), draw(REAL)
    sides = []
    for _ in range(2):
        out, lse = normal(draw, T, H, dv, dtype=dtype), normal(draw, T, H, scale=3.0)
        blind = integers(draw, 0, 4, T, H) == 0
        sides += [out.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, float("-inf"))]
    return sides


@st.composite
def merge(draw: Draw) -> tuple:
    return tuple(merge_inputs(draw))


@st.composite
def merge_backward(draw: Draw) -> tuple:
    sides = merge_inputs(draw)
    return normal(draw, *sides[0].shape, dtype=sides[0].dtype), normal(draw, *sides[1].shape), *sides


def pages(draw: Draw, count: int, page: int, R: int, r: int) -> Tensor:
    """Pages full of latents: float32, bfloat16, or the bytes of FP8."""
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]))
    latents = normal(draw, count * page, R + r)
    if dtype == torch.uint8:
        return encode_fp8_latent(latents, fp8_latent_bytes(R, r)).unflatten(0, (count, page)).clone()
    return latents.to(dtype).unflatten(0, (count, page))


def poison(cache: Tensor, table: Tensor, lens: Tensor) -> None:
    """Make NaN of all that no sequence owns."""
    page, owned = cache.shape[1], torch.zeros(cache.shape[:2], dtype=torch.bool)
    for row, length in zip(table.tolist(), lens.tolist(), strict=True):
        for token in range(length):
            owned[row[token // page], token % page] = True
    cache[~owned] = 0xFF if cache.dtype == torch.uint8 else float("nan")


def paged(draw: Draw) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """(cache, table, lens, R, r): shuffled or neighbouring pages, table entries that point nowhere, stale NaN."""
    (R, r), batch, page, width = draw(LATENT_DIMS), draw(st.integers(1, 4)), draw(st.sampled_from([1, 4, 8, 64])), 5
    lens = torch.tensor(draw(st.lists(st.integers(0, width * page), min_size=batch, max_size=batch)), dtype=torch.int32)
    order = integers(draw, 0, 1 << 20, batch * width).argsort()
    if draw(st.booleans()):
        order = torch.arange(batch * width)
    table = order.view(batch, width).to(torch.int32)
    cache = pages(draw, batch * width, page, R, r)
    poison(cache, table, lens)
    return cache, table.masked_fill(torch.arange(width) * page >= lens[:, None], 1 << 30), lens, R, r


@st.composite
def cache_write(draw: Draw) -> tuple:
    (R, r), page = draw(LATENT_DIMS), draw(st.sampled_from([1, 8]))
    cache = pages(draw, 4, page, R, r)
    T = draw(st.integers(1, 4 * page))
    slots = integers(draw, 0, 1 << 20, 4 * page).argsort()[:T]
    latent = normal(draw, T, R + r, dtype=torch.bfloat16)  # which all three can hold, so that equality can be asked for
    latent[0, :R] = 0.0  # a tile of zeros
    latent = latent.to(draw(REAL))
    return [cache], slots, latent


@st.composite
def cache_gather(draw: Draw) -> tuple:
    cache, table, lens, R, _ = paged(draw)
    room = lens + draw(st.sampled_from([0, 2]))
    cu_seqlens = cumulative(room.tolist())
    return [cache], table, lens, cu_seqlens, max(int(cu_seqlens[-1]) + draw(st.sampled_from([0, 3])), 1), R


@st.composite
def decode(draw: Draw) -> tuple:
    cache, table, lens, R, r = paged(draw)
    S, H, dtype = draw(st.integers(1, 3)), draw(HEADS), draw(REAL)
    q = normal(draw, len(lens), S, H, R + r, dtype=dtype)
    plan = list(mla_decode_plan.spec(lens, H, cache.shape[1]))
    return q, [cache], table, lens, lens.clone(), plan, draw(SCALES), R


@st.composite
def decode_plan(draw: Draw) -> tuple:
    return integers(draw, 0, 100, draw(st.integers(1, 5))), draw(HEADS), draw(st.sampled_from([1, 8, 64]))


ARGUMENTS = {
    "mla_attention": attention(),
    "mla_attention_backward": attention_backward(),
    "merge_lse": merge(),
    "merge_lse_backward": merge_backward(),
    "mla_cache_write": cache_write(),
    "mla_cache_gather": cache_gather(),
    "mla_decode": decode(),
    "mla_decode_plan": decode_plan(),
}
