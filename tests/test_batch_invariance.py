"""On backend cpu-invariant a token's numbers do not depend on what is computed with it, not in a single bit."""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3 import backends, doctor
from dsv3.backends import use_backend
from dsv3.backends.cpu_invariant import elementwise, mla_cache, tiles
from dsv3.ops.formats import E4M3
from dsv3.ops.fp8 import dequantize_tiles, fp8_gemm, quantize_blocks, quantize_tiles, swiglu_quantize
from dsv3.ops.gemm import batched_gemm, gemm, grouped_gemm, masked_gemm
from dsv3.ops.general import add_rms_norm, rms_norm, rope, swiglu
from dsv3.ops.grouped_fp8 import grouped_fp8_gemm, masked_fp8_gemm
from dsv3.ops.loss import linear_cross_entropy
from dsv3.ops.mla import mla_attention
from dsv3.ops.mla_cache import encode_fp8_latent, fp8_latent_bytes, mla_decode, mla_decode_plan
from dsv3.ops.moe import permute, route, unpermute
from dsv3.ops.mtp import mtp_input
from dsv3.ops.norm_quantize import rms_norm_quantize
from dsv3.ops.sampling import sample, spec_verify

pytestmark = pytest.mark.slow

NAME = "cpu-invariant"
# A failure is not made smaller: that takes minutes.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
QUICK = settings(
    deadline=None, max_examples=6, suppress_health_check=list(HealthCheck), derandomize=True, phases=PHASES
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
WIDTHS = st.sampled_from([16, 33, 64, 100, 128, 256])
CACHES = st.sampled_from([torch.float32, torch.bfloat16, E4M3])
Rows = Callable[[Tensor], tuple[Tensor, ...]]  # indices of rows -> what an op makes of these rows


@pytest.fixture(autouse=True)
def invariant() -> Iterator[None]:
    with use_backend(NAME), torch.inference_mode():
        yield


@pytest.fixture(params=[1, pytest.param(2, marks=pytest.mark.slow)])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def normal(data: st.DataObject, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    return torch.randn(shape, generator=generator).to(dtype)


def bits(x: Tensor) -> Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


def agree(data: st.DataObject, call: Rows, rows: int, tries: int = 6) -> bool:
    """Are all rows at once the same as each alone, as a few of them in any order, and as some of them many times?"""
    whole = call(torch.arange(rows))
    alone = [torch.tensor([row]) for row in {0, rows // 2, rows - 1}]
    some = st.lists(st.integers(0, rows - 1), min_size=1, max_size=40).map(torch.tensor)
    return all(
        torch.equal(bits(one[index]), bits(other))
        for index in [*alone, *(data.draw(some) for _ in range(tries))]
        for one, other in zip(whole, call(index), strict=True)
    )


def holds(data: st.DataObject, call: Rows, rows: int) -> None:
    assert agree(data, call, rows)


# --- ops ---


@QUICK
@given(data=st.data(), dtype=DTYPES, K=WIDTHS, N=st.sampled_from([8, 65, 256, 2100]), rows=st.sampled_from([7, 150]))
def test_products_with_a_weight(threads, data, dtype, K, N, rows):
    x, w = normal(data, rows, K, dtype=dtype), normal(data, N, K, dtype=dtype)
    holds(data, lambda some: (gemm(x[some], w),), rows)
    holds(data, lambda some: (gemm(x[some], w.T.contiguous().T),), rows)
    q, s = quantize_blocks(w)
    holds(data, lambda some: (fp8_gemm(*quantize_tiles(x[some]), q, s, dtype),), rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_with_a_large_weight(threads, dtype):
    """Such as take other kernels than small ones, and are multiplied in pieces."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(shape, generator=generator).to(dtype) for shape in ((140, 1000), (5000, 1000)))
    whole = gemm(x, w)
    for start, stop in ((0, 1), (139, 140), (3, 5), (17, 25), (10, 75)):
        assert torch.equal(gemm(x[start:stop], w), whole[start:stop])


@QUICK
@given(data=st.data(), dtype=DTYPES, heads=st.integers(1, 5), K=WIDTHS, N=WIDTHS, rows=st.sampled_from([7, 150]))
def test_a_product_a_head(threads, data, dtype, heads, K, N, rows):
    x, w = normal(data, heads, rows, K, dtype=dtype), normal(data, heads, N, K, dtype=dtype)
    holds(data, lambda some: (batched_gemm(x[:, some], w).transpose(0, 1),), rows)
    holds(data, lambda some: (batched_gemm(x.transpose(0, 1)[some].transpose(0, 1), w).transpose(0, 1),), rows)


@QUICK
@given(data=st.data(), dtype=DTYPES, D=st.sampled_from([32, 128]), rows=st.sampled_from([5, 90]))
def test_experts(threads, data, dtype, D, rows):
    """From the gate to the weighted sum, in real numbers and in FP8, in one buffer and with fixed capacity."""
    E, k, N = 8, 3, 48
    x, gate, w = normal(data, rows, D, dtype=dtype), normal(data, E, D), normal(data, E, N, D, dtype=dtype)
    q, s = quantize_blocks(w)

    def call(some: Tensor) -> tuple[Tensor, ...]:
        logits = gemm(x[some].float(), gate)
        idx, weights = route(logits, None, k, 4, 2, "sigmoid", "top2", True, 2.5)
        inputs, row_map, offsets = permute(x[some], idx, E, 1)
        real = grouped_gemm(inputs, w, offsets)
        in_fp8 = grouped_fp8_gemm(*quantize_tiles(inputs), q, s, offsets, dtype)
        return idx, weights, unpermute(real, row_map, weights), unpermute(in_fp8, row_map, None)

    holds(data, call, rows)

    def fixed(some: Tensor) -> tuple[Tensor, ...]:
        """All experts see the same rows, the first with one less."""
        room = x[some].expand(E, -1, -1).contiguous()
        counts = torch.full((E,), len(some), dtype=torch.int32)
        values, scales = (part.unflatten(0, (E, -1)) for part in quantize_tiles(room.flatten(0, 1)))
        real = masked_gemm(room, w, counts)
        return real.transpose(0, 1), masked_fp8_gemm(values, scales, q, s, counts, dtype).transpose(0, 1)

    holds(data, fixed, rows)


@QUICK
@given(data=st.data(), dtype=DTYPES, D=st.sampled_from([16, 33, 100, 128, 2048]), rows=st.sampled_from([5, 301]))
def test_what_lies_between_the_products(threads, data, dtype, D, rows):
    x, y, w = normal(data, rows, 2 * D, dtype=dtype), normal(data, rows, 2 * D, dtype=dtype), normal(data, 2 * D)
    weight = normal(data, rows)
    w = w.to(dtype)
    holds(data, lambda some: (rms_norm(x[some], w, 1e-6), *add_rms_norm(x[some], y[some], w, 1e-6)), rows)
    holds(data, lambda some: (swiglu(x[some], None), swiglu(x[some], weight[some])), rows)
    holds(data, lambda some: (mtp_input(x[some], y[some], w, w, 1e-6),), rows)
    holds(data, lambda some: (*quantize_tiles(x[some]), *swiglu_quantize(x[some])), rows)
    holds(data, lambda some: rms_norm_quantize(x[some], w, 1e-6, E4M3, True), rows)
    values, scales = quantize_tiles(x)
    holds(data, lambda some: (dequantize_tiles(values[some], scales[some], dtype),), rows)


@QUICK
@given(data=st.data(), dtype=DTYPES, heads=st.integers(1, 4), r=st.sampled_from([6, 8, 64]))
def test_rotation(threads, data, dtype, heads, r):
    rows = 301
    x, key, table = normal(data, rows, heads, r, dtype=dtype), normal(data, rows, r, dtype=dtype), normal(data, 400, r)
    place = torch.arange(rows) + 50
    holds(data, lambda some: (rope(x[some], place[some], table), rope(key[some], place[some], table)), rows)


@QUICK
@given(data=st.data(), score=st.sampled_from(["sigmoid", "softmax"]), E=st.sampled_from([4, 8, 64, 256]))
def test_routing(threads, data, score, E):
    logits, bias = normal(data, 301, E), 0.1 * normal(data, E)
    holds(data, lambda some: route(logits[some], bias, 2, 2, 1, score, "top2", True, 2.5), 301)


@pytest.mark.slow
@QUICK
@given(data=st.data(), V=st.sampled_from([50, 400, 5000, 40_000]))
def test_sampling_and_scoring(threads, data, V):
    rows = 6
    logits, generator = 3 * normal(data, rows, V), torch.Generator().manual_seed(0)

    def choice(values: list[float]) -> Tensor:
        return torch.tensor([values[i] for i in torch.randint(len(values), (rows,), generator=generator).tolist()])

    options = [choice([0.0, 0.7, 1.0]), choice([0, 5]).int(), choice([1.0, 0.8]), choice([0.0, 0.1])]
    options += [torch.arange(rows), torch.arange(rows) * 7]
    holds(data, lambda some: sample(logits[some], *(option[some] for option in options)), rows)

    drafts = torch.stack([logits, logits.roll(1, 1), logits.roll(2, 1)], 1)
    draft = drafts[:, :2].argmax(-1)
    holds(data, lambda some: spec_verify(draft[some], drafts[some], *(option[some] for option in options)), rows)
    # What a draft's first token is verified with is what plain decoding samples.
    first = spec_verify(draft, drafts, *options)
    plain = sample(logits, *options)
    assert torch.equal(first[1][:, 0], plain[0]) and torch.equal(first[2][:, 0], plain[1])

    h, w, target = normal(data, rows, 32), normal(data, V, 32), torch.tensor([0, 1, -100, 3, 4, 5])
    holds(data, lambda some: linear_cross_entropy(h[some], w, target[some], 0.7), rows)


@QUICK
@given(data=st.data(), dtype=DTYPES, lengths=st.lists(st.integers(1, 40), min_size=2, max_size=4))
def test_a_sequence_with_expanded_keys_does_not_see_the_others(threads, data, dtype, lengths):
    T, H = sum(lengths), 2
    q, k, v = (normal(data, T, H, size, dtype=dtype) for size in (12, 8, 8))
    k_rope, ends = normal(data, T, 4, dtype=dtype), torch.tensor([0, *lengths]).cumsum(0)
    whole = mla_attention(q, k, k_rope, v, ends.int(), ends.int(), max(lengths), max(lengths), 0.3, True)
    for start, stop in zip(ends.tolist(), ends[1:].tolist(), strict=False):
        rows, own = slice(start, stop), torch.tensor([0, stop - start], dtype=torch.int32)
        length = stop - start
        alone = mla_attention(q[rows], k[rows], k_rope[rows], v[rows], own, own, length, length, 0.3, True)
        assert all(torch.equal(one, other[rows]) for one, other in zip(alone, whole, strict=True))


# --- attention over the cache ---


def decode(q: Tensor, pages: Tensor, table: list[list[int]], lens: list[int], rank: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, table))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in table], dtype=torch.int32)
    lengths = torch.tensor(lens, dtype=torch.int32)
    return mla_decode(q, [pages], padded, lengths, lengths, mla_decode_plan(lengths, q.shape[2], 1), 0.2, rank)


@QUICK
@given(
    data=st.data(),
    dtype=DTYPES,
    stored=CACHES,
    S=st.integers(1, 3),
    page=st.sampled_from([4, 24, 64]),
    lens=st.lists(st.integers(1, 1300), min_size=2, max_size=4),
    heads=st.sampled_from([2, 5]),
)
def test_a_query_over_the_cache_depends_on_what_it_sees_alone(threads, data, dtype, stored, S, page, lens, heads):
    """However many others there are, drafted tokens too, on whichever pages the tokens lie, whatever lies behind."""
    R, r = 32, 8
    counts = [-(-length // page) for length in lens]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(sum(lens))).split(counts)
    q = normal(data, len(lens), S, heads, R + r, dtype=dtype)
    latents = normal(data, sum(counts) * page, R + r)
    encoded = encode_fp8_latent(latents, fp8_latent_bytes(R, r)) if stored == E4M3 else latents.to(stored)
    pages = encoded.unflatten(0, (-1, page)).clone()
    together = decode(q, pages, [owned.tolist() for owned in order], lens, R)
    for b, (owned, length) in enumerate(zip(order, lens, strict=True)):
        for s in range(S):
            seen = length - S + s + 1
            if seen < 1:
                assert not together[0][b, s].any() and together[1][b, s].isneginf().all()
                continue
            moved = pages[owned]
            moved.flatten(0, 1)[seen:] = 0xFF if stored == E4M3 else float("nan")
            alone = decode(q[b : b + 1, s : s + 1], moved, [list(range(len(owned)))], [seen], R)
            assert torch.equal(alone[0][0, 0], together[0][b, s]), (b, s)
            assert torch.equal(alone[1][0, 0], together[1][b, s]), (b, s)


@given(seen=st.integers(0, 10_000))
def test_pieces_cover_what_a_query_sees_and_grow_at_the_end_alone(seen):
    cut = mla_cache.pieces(seen)
    assert all(start == i * mla_cache.WIDEST for i, (start, _) in enumerate(cut))
    assert sum(width for _, width in cut) >= seen and all(start < seen for start, _ in cut)
    assert mla_cache.pieces(seen + mla_cache.WIDEST)[1:] == [(start + mla_cache.WIDEST, width) for start, width in cut]


def test_queries_of_a_common_prefix_share_its_pieces():
    tables = ((7, 8, 9, 1), (7, 8, 9, 2), (5, 6, 0, 0))
    assert mla_cache.shared_pieces((200, 150, 70), tables, 64) == {
        mla_cache.Piece(0, 128, (5, 6)): [2],
        mla_cache.Piece(0, 256, (7, 8, 9, 1)): [0, 1],
    }


# --- the checks of this machine ---


def test_heights_that_sum_in_another_order_are_not_used():
    def by_height(a: Tensor, b: Tensor) -> Tensor:
        if a.shape[-2] < 8:  # the halves first
            half = a.shape[-1] // 2
            return a[..., :half] @ b[..., :half].mT + a[..., half:] @ b[..., half:].mT
        return (a.double() @ b.double().mT).float()

    w = torch.randn(40, 64)
    heights = tiles.agreeing_heights(by_height, w.shape, w.stride(), w.dtype, 0, 1)
    assert heights == (8, 16, 32, 128)
    assert torch.equal(tiles.in_tiles(by_height, torch.ones(1, 64), w), by_height(torch.ones(8, 64), w)[:1])


def test_a_product_that_depends_on_the_place_is_taken_row_by_row():
    def by_place(a: Tensor, b: Tensor) -> Tensor:
        return a @ b.T + 1e-3 * torch.arange(len(a))[:, None]

    w, x = torch.randn(40, 64), torch.randn(9, 64)
    assert tiles.agreeing_heights(by_place, w.shape, w.stride(), w.dtype, 0, 1) == (1,)
    assert torch.equal(tiles.in_tiles(by_place, x, w), torch.cat([by_place(row[None], w) for row in x]))


@pytest.mark.parametrize(
    "rows, heights", [(1, [2]), (2, [2]), (5, [8]), (33, [32, 2]), (70, [128]), (300, [128, 128, 32, 8, 8])]
)
def test_tiles_are_no_more_than_half_empty_where_it_can_be(rows, heights):
    found, left = [], rows
    while left > 0:
        found.append(tiles._next_height((2, 8, 32, 128), left))
        left -= found[-1]
    assert found == heights


def test_a_function_with_another_result_at_the_end_of_a_tensor_is_seen_and_taken_row_by_row():
    def uneven(x: Tensor) -> Tensor:
        whole = x.numel() // 16 * 16
        flat = x.flatten()
        return torch.cat([flat[:whole].exp(), flat[whole:].double().exp().float() * (1 + 2**-23)]).view_as(x)

    assert not elementwise.is_even(uneven, 1)
    x = torch.randn(7, 24)
    assert torch.equal(elementwise.evenly(uneven, x)[3], uneven(x[3]))


# --- the registry ---


def test_it_is_taken_by_name_only_and_every_op_has_a_kernel_there_that_takes_every_call(monkeypatch):
    monkeypatch.setattr(backends, "_active", None)
    for name in ("cuda", "rocm", "ascend"):
        monkeypatch.setitem(backends.discover(), name, backends.Backend(name, "cpu", probe=lambda: "no"))
    assert backends._first_usable(backends.discover()).name == "cpu"
    rows = doctor.op_rows(backends.discover()[NAME])
    checked = {row["op"]: row["checked"] for row in reversed(rows)}  # of the kernel that is asked first
    for name in ("gemm", "grouped_gemm", "batched_gemm", "fp8_gemm", "mla_decode", "sample", "swiglu", "rms_norm"):
        assert checked[name] == "hardware"
    assert checked["rope"] == "reference"  # its specification is invariant as it stands
