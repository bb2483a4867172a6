"""Adapters to vendors' libraries: what they hand over and bring back, and when they are taken at all.

None of the libraries is here. `stand_ins` has their signatures, their demands, and the specification's answers.
"""

import pytest
import stand_ins
import torch
from stand_ins import adapter, torch_cuda
from stand_ins import aiter as aiter_library
from stand_ins import deep_gemm as deep_gemm_library
from stand_ins import flash_mla as flash_mla_library
from stand_ins import flashinfer as flashinfer_library
from torch import Tensor
from torch.nn import functional
from walk import assert_near, hold, widen

from dsv3.backends.cuda import cudnn, deep_gemm, flash_mla, flashinfer, scaled_mm
from dsv3.backends.rocm import aiter
from dsv3.ops.formats import E4M3, E4M3_FNUZ, FP8_MAX, num_blocks
from dsv3.ops.fp8 import fp8_gemm, fp8_gemm_wgrad, m_major
from dsv3.ops.grouped_fp8 import grouped_fp8_gemm, masked_fp8_gemm
from dsv3.ops.mla import mla_attention, mla_attention_backward
from dsv3.ops.mla_cache import mla_decode, mla_decode_plan
from dsv3.ops.op import Op

BF16 = torch.bfloat16


def takes(op: Op, provider: str, args: tuple, backend: str = "cuda") -> bool:
    return adapter(op, provider, backend).supports(*args)


def values(*shape: int, dtype: torch.dtype = E4M3) -> Tensor:
    return (torch.randn(shape) * FP8_MAX[dtype] / 4).clamp(-FP8_MAX[dtype], FP8_MAX[dtype]).to(dtype)


def scales(*shape: int) -> Tensor:
    return 0.5 + torch.rand(shape)


def tiles(*shape: int, dtype: torch.dtype = E4M3) -> tuple[Tensor, Tensor]:
    *batch, T, K = shape
    s = scales(*batch, T, num_blocks(K))
    return values(*shape, dtype=dtype), s if batch else m_major(s)


def weight(*shape: int, dtype: torch.dtype = E4M3) -> tuple[Tensor, Tensor]:
    *experts, N, K = shape
    return values(*shape, dtype=dtype), scales(*experts, num_blocks(N), num_blocks(K))


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


@pytest.fixture
def deep(monkeypatch):
    stand_ins.install(monkeypatch, deep_gemm=deep_gemm_library)
    monkeypatch.setattr(deep_gemm, "ROWS_PER_EXPERT", 128)


# --- products ---


@pytest.mark.parametrize(("T", "N", "K"), [(1, 64, 128), (7, 576, 256), (128, 192, 384)])
def test_deep_gemm_fp8_gemm(deep, T, N, K):
    assert hold(fp8_gemm, "cuda", adapter(fp8_gemm, "deep_gemm"), (*tiles(T, K), *weight(N, K), BF16))


def test_deep_gemm_gets_the_scales_as_they_lie(deep, monkeypatch):
    """M-major with columns of T rounded up to 4: what the library does not copy."""
    seen = []
    monkeypatch.setattr(deep_gemm_library, "fp8_gemm_nt", lambda a, b, d: seen.append(a[1]))
    a, sa = tiles(7, 256)
    deep_gemm.fp8_gemm_deep_gemm(a, sa, *weight(64, 256), BF16)
    assert seen[0].stride() == (1, 8) and seen[0].data_ptr() == sa.data_ptr()


def test_deep_gemm_refuses_what_the_library_cannot(deep):
    a, w = tiles(8, 256), weight(64, 256)
    assert takes(fp8_gemm, "deep_gemm", (*a, *w, BF16))
    assert not takes(fp8_gemm, "deep_gemm", (*a, *w, torch.float32))
    assert not takes(fp8_gemm, "deep_gemm", (*tiles(8, 256, dtype=E4M3_FNUZ), *w, BF16))
    assert not takes(fp8_gemm, "deep_gemm", (*tiles(8, 200), *weight(64, 200), BF16))
    assert not takes(fp8_gemm, "deep_gemm", (*a, *weight(60, 256), BF16))
    transposed, s = weight(256, 64)
    assert not takes(fp8_gemm, "deep_gemm", (*a, transposed.T, s.T, BF16))
    assert not takes(fp8_gemm, "deep_gemm", (*widen((*a, *w)), BF16))


@pytest.mark.parametrize(("N", "K", "T"), [(64, 128, 128), (192, 64, 384)])
def test_deep_gemm_wgrad(deep, N, K, T):
    args = *tiles(N, T), *tiles(K, T)
    assert hold(fp8_gemm_wgrad, "cuda", adapter(fp8_gemm_wgrad, "deep_gemm"), args)
    assert not takes(fp8_gemm_wgrad, "deep_gemm", (*tiles(N, T + 8), *tiles(K, T + 8)))


def grouped(R: int, bounds: list[int], N: int = 128, K: int = 256) -> tuple:
    return *tiles(R, K), *weight(len(bounds) - 1, N, K), torch.tensor(bounds, dtype=torch.int32), BF16


@pytest.mark.parametrize(
    "bounds",
    [
        [0, 128, 384],  # aligned
        [0, 128, 128, 512],  # an expert without rows, none behind
        [0, 1, 130, 131, 300],  # several in one block
        [0, 0, 0, 511],
        [0, 64, 192, 400],
        [0, 0, 0],
        [0, 100, 100, 100, 512],
    ],
)
def test_deep_gemm_grouped_wherever_segments_begin(deep, bounds):
    args = grouped(512, bounds)
    assert hold(grouped_fp8_gemm, "cuda", adapter(grouped_fp8_gemm, "deep_gemm"), args)


@pytest.mark.parametrize(("bounds", "again"), [([0, 128, 384], [0, 0]), ([0, 130, 384], [0, 126])])
def test_aligned_segments_are_computed_once(deep, monkeypatch, bounds, again):
    seen = []
    monkeypatch.setattr(
        deep_gemm_library, deep_gemm.MASKED[0], lambda a, b, d, counts, expected: seen.append(counts.tolist())
    )
    deep_gemm.grouped_fp8_gemm_deep_gemm(*grouped(512, bounds))
    assert seen == [again]


def test_deep_gemm_grouped_needs_whole_blocks_and_many_rows(deep):
    assert takes(grouped_fp8_gemm, "deep_gemm", grouped(512, [0, 128, 512]))
    assert not takes(grouped_fp8_gemm, "deep_gemm", grouped(500, [0, 128, 500]))
    assert not takes(grouped_fp8_gemm, "deep_gemm", grouped(128, [0, 64, 128]))


def test_rows_that_hold_nothing_may_be_nan(deep):
    a, sa, *rest = grouped(512, [0, 128, 300])
    sa[300:] = torch.nan
    out = deep_gemm.grouped_fp8_gemm_deep_gemm(a, sa, *rest)
    assert out.isfinite().all() and (out[300:] == 0).all() and out.is_contiguous() and out.shape == (512, 128)


@pytest.mark.parametrize("counts", [[0, 128, 5], [64, 65, 1], [0, 0, 0]])
@pytest.mark.parametrize("names", [deep_gemm.MASKED[:1], deep_gemm.MASKED[1:]])
def test_deep_gemm_masked(monkeypatch, counts, names):
    """Under either name of the function."""
    stand_in = stand_ins.module(
        "deep_gemm",
        fp8_gemm_nt=deep_gemm_library.fp8_gemm_nt,
        m_grouped_fp8_gemm_nt_contiguous=deep_gemm_library.m_grouped_fp8_gemm_nt_contiguous,
        **{name: deep_gemm_library.m_grouped_fp8_gemm_nt_masked for name in names},
    )
    stand_ins.install(monkeypatch, deep_gemm=stand_in)
    a, sa = tiles(3, 128, 256)
    for expert, count in enumerate(counts):
        sa[expert, count:] = torch.nan
    args = a, sa, *weight(3, 64, 256), torch.tensor(counts, dtype=torch.int32), BF16
    assert hold(masked_fp8_gemm, "cuda", adapter(masked_fp8_gemm, "deep_gemm"), args)
    short = *tiles(3, 100, 256), *args[2:]
    assert not takes(masked_fp8_gemm, "deep_gemm", short)


@pytest.mark.parametrize(("T", "N", "K"), [(8, 128, 512), (132, 384, 1024)])
def test_cublaslt(monkeypatch, T, N, K):
    monkeypatch.setattr(scaled_mm, "LEAST_ROWS", 8)
    monkeypatch.setattr(functional, "scaled_mm", torch_cuda.scaled_mm)
    assert hold(fp8_gemm, "cuda", adapter(fp8_gemm, "cublaslt"), (*tiles(T, K), *weight(N, K), BF16))


def test_cublaslt_is_for_many_rows_of_whole_columns():
    sizes = [(1024, 128, 512, True), (1020, 128, 512, False), (1026, 128, 512, False), (1024, 128, 384, False)]
    for T, N, K, yes in [*sizes, (1024, 192, 512, False)]:
        assert takes(fp8_gemm, "cublaslt", (*tiles(T, K), *weight(N, K), BF16)) == yes


@pytest.mark.parametrize(("T", "N", "K"), [(1, 64, 128), (7, 576, 256)])
def test_aiter_fp8_gemm(monkeypatch, T, N, K):
    stand_ins.install(monkeypatch, aiter=aiter_library)
    monkeypatch.setattr(aiter, "_chip", lambda: "gfx942")
    kernel = adapter(fp8_gemm, "aiter", "rocm")
    args = *tiles(T, K, dtype=E4M3_FNUZ), *weight(N, K, dtype=E4M3_FNUZ), BF16
    assert hold(fp8_gemm, "rocm", kernel, args)
    assert not kernel.supports(*tiles(T, K), *weight(N, K), BF16)
    monkeypatch.setattr(aiter, "_chip", lambda: "gfx950")
    assert not kernel.supports(*args)
    assert kernel.supports(*tiles(T, K), *weight(N, K), BF16)


# --- attention over the latent cache ---


def decoding(lens: list[int], S: int = 1, H: int = 2, page: int = 64, dtype: torch.dtype = BF16) -> tuple:
    """Shuffled pages, table entries that point nowhere, NaN behind every last token."""
    B, W = len(lens), max(-(-max(lens) // page), 1) + 1
    length = torch.tensor(lens, dtype=torch.int32)
    table = torch.randperm(B * W).view(B, W).to(torch.int32)
    pages = torch.randn(B * W, page, 576).to(dtype)
    owned = torch.zeros(B * W, page, dtype=torch.bool)
    for row, known in zip(table.tolist(), lens, strict=True):
        for token in range(known):
            owned[row[token // page], token % page] = True
    pages[~owned] = torch.nan
    table = table.masked_fill(torch.arange(W) * page >= length[:, None], 1 << 20)
    plan = [torch.empty(0)]  # of some other provider
    return torch.randn(B, S, H, 576).to(dtype), [pages], table, length, length.clone(), plan, 0.05, 512


@pytest.mark.parametrize(
    ("lens", "S", "H"), [([1], 1, 2), ([64, 65, 3], 1, 4), ([130, 2], 2, 2), ([0, 70], 1, 2), ([1, 0], 3, 2)]
)
def test_flash_mla(monkeypatch, lens, S, H):
    stand_ins.install(monkeypatch, flash_mla=stand_ins.module("flash_mla"))
    stand_ins.install(monkeypatch, flash_mla__flash_mla_interface=flash_mla_library)
    assert hold(mla_decode, "cuda", adapter(mla_decode, "flash_mla"), decoding(lens, S, H))


def test_flash_mla_refuses_other_caches():
    assert takes(mla_decode, "flash_mla", decoding([5]))
    assert not takes(mla_decode, "flash_mla", decoding([5], page=32))
    assert not takes(mla_decode, "flash_mla", decoding([5], dtype=torch.float32))
    q, cache, *rest = decoding([5])
    assert not takes(mla_decode, "flash_mla", (q, [cache[0].new_zeros(2, 64, 656).byte()], *rest))


@pytest.fixture
def infer(monkeypatch):
    top = stand_ins.module("flashinfer", __version__="0.6.7")
    stand_ins.install(monkeypatch, flashinfer=top, flashinfer__mla=flashinfer_library)
    monkeypatch.setattr(flashinfer, "_plans", {})
    monkeypatch.setattr(flashinfer_library, "plans", 0)
    return flashinfer_library


@pytest.mark.parametrize(("lens", "S", "H"), [([1], 1, 2), ([64, 65, 3], 1, 4), ([130, 2], 2, 2)])
def test_flashinfer(infer, lens, S, H):
    assert hold(mla_decode, "cuda", adapter(mla_decode, "flashinfer"), decoding(lens, S, H))
    assert hold(mla_decode, "cuda", adapter(mla_decode, "flashinfer"), decoding(lens, S, H, page=16))


def same_as_spec(args: tuple) -> None:
    for got, want in zip(flashinfer.mla_decode_flashinfer(*args), mla_decode.spec(*args), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_flashinfer_plans_once_a_step(infer):
    q, cache, table, lens, lens_cpu, *rest = decoding([70, 3])
    for layer in range(3):  # of a step
        same_as_spec((q + layer, cache, table, lens, lens_cpu, *rest))
    assert infer.plans == 1
    shorter = lens - 1
    same_as_spec((q, cache, table, shorter, shorter.clone(), *rest))  # the table is the same one
    same_as_spec((q, cache, table, lens, lens_cpu, *rest))
    assert infer.plans == 3
    other = torch.where(table < 1 << 20, (table + 1) % len(cache[0]), table)
    pages = [torch.randn_like(cache[0].float()).to(BF16)]
    same_as_spec((q, pages, other, shorter, shorter.clone(), *rest))  # the lengths are, the table is another
    assert infer.plans == 4
    wide = torch.cat([q, q], 1)
    same_as_spec((wide, cache, table, lens, lens_cpu, *rest))  # two queries: a plan beside that of one
    same_as_spec((wide, cache, table, lens, lens_cpu, *rest))
    assert infer.plans == 5 and len(flashinfer._plans) == 2


def test_flashinfer_leaves_captures_and_blind_queries_to_others(infer, monkeypatch):
    assert takes(mla_decode, "flashinfer", decoding([3], S=3))
    assert not takes(mla_decode, "flashinfer", decoding([9, 2], S=3))
    monkeypatch.setattr(flashinfer, "is_capturing", lambda: True)
    assert not takes(mla_decode, "flashinfer", decoding([3], S=3))


@pytest.mark.parametrize(("lens", "S"), [([1], 1), ([64, 65, 3], 1), ([130, 2], 2), ([0, 70], 1), ([1, 0], 3)])
def test_aiter_mla_decode(monkeypatch, lens, S):
    mla = stand_ins.module("aiter.mla", mla_decode_fwd=aiter_library.mla_decode_fwd)
    stand_ins.install(monkeypatch, aiter=aiter_library, aiter__mla=mla)
    monkeypatch.setattr(aiter, "_units", lambda: 304)
    assert hold(mla_decode, "rocm", adapter(mla_decode, "aiter", "rocm"), decoding(lens, S, 16))
    assert not takes(mla_decode, "aiter", decoding(lens, S, 32), "rocm")


def test_no_adapter_makes_or_reads_a_plan(monkeypatch):
    """So the kernel that plans a step and the one that decodes cannot disagree, whichever they are."""
    stand_ins.install(monkeypatch, flash_mla=stand_ins.module("flash_mla"))
    stand_ins.install(monkeypatch, flash_mla__flash_mla_interface=flash_mla_library)
    providers = {"flash_mla", "flashinfer", "aiter"}
    for backend in ("cuda", "rocm"):
        assert not providers & {kernel.provider for kernel in mla_decode_plan.kernels.get(backend, ())}
    *args, _, scale, R = decoding([64, 3])
    want = mla_decode.spec(*args, [], scale, R)
    for got, one in zip(flash_mla.mla_decode_flash_mla(*args, [torch.empty(0)], scale, R), want, strict=True):
        torch.testing.assert_close(got, one)


# --- attention of one long sequence ---


def attention(T: int, length: int, H: int = 2, dtype: torch.dtype = BF16) -> tuple:
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
    shapes = (T, H, 192), (T, H, 128), (T, 64), (T, H, 128)
    return *(torch.randn(shape).to(dtype) for shape in shapes), cu_seqlens, cu_seqlens, T, T, 0.07, True


@pytest.fixture
def cudnn_here(monkeypatch):
    monkeypatch.setattr(cudnn, "LEAST_TOKENS", 16)
    monkeypatch.setattr(cudnn, "_forward", torch_cuda.cudnn_forward)
    monkeypatch.setattr(cudnn, "_backward", torch_cuda.cudnn_backward)


def near(op: Op, got: tuple, args: tuple) -> None:
    want = op.oracle(*widen(args))
    nears = op.tolerance if isinstance(op.tolerance, tuple) else (op.tolerance,) * len(got)
    for index, (one, other, tolerance) in enumerate(zip(got, want, nears, strict=True)):
        assert_near(one, other, tolerance, True, f"{op.name}[{index}]")
        assert one.is_contiguous() and one.dtype == op.spec(*args)[index].dtype


@pytest.mark.parametrize(("T", "length"), [(16, 16), (40, 33)])
@pytest.mark.parametrize("strided", [False, True])
def test_cudnn(cudnn_here, T, length, strided):
    q, k_nope, k_rope, v, *rest = attention(T, length)
    if strided:  # as the model gives them: keys and values are halves of one product
        both = torch.cat([k_nope, v], 2)
        k_nope, v = both.split([128, 128], 2)
    args = q, k_nope, k_rope, v, *rest
    assert takes(mla_attention, "cudnn", args)
    near(mla_attention, cudnn.mla_attention_cudnn(*args), args)
    out, lse = mla_attention.spec(*args)
    grad = torch.randn_like(out.float()).to(BF16)
    grad[length:] = 0.0
    args = grad, None, *args[:4], out, lse, *args[4:]
    assert takes(mla_attention_backward, "cudnn", args)
    near(mla_attention_backward, cudnn.mla_attention_backward_cudnn(*args), args)


def test_cudnn_takes_one_sequence_that_sees_itself(cudnn_here):
    q, k_nope, k_rope, v, cu, _, T, _, scale, _ = attention(16, 16)
    head, sizes = (q, k_nope, k_rope, v), (T, T, scale)
    assert takes(mla_attention, "cudnn", (*head, cu, cu, *sizes, True))
    assert not takes(mla_attention, "cudnn", (*head, cu, cu, *sizes, False))
    assert not takes(mla_attention, "cudnn", (*head, cu, cu.clone(), *sizes, True))
    two = torch.tensor([0, 8, 16], dtype=torch.int32)
    assert not takes(mla_attention, "cudnn", (*head, two, two, *sizes, True))
    assert not takes(mla_attention, "cudnn", attention(8, 8))
    assert not takes(mla_attention, "cudnn", attention(16, 16, dtype=torch.float32))
    out, lse = mla_attention.spec(*head, cu, cu, *sizes, True)
    assert not takes(mla_attention_backward, "cudnn", (out, lse, *head, out, lse, cu, cu, *sizes, True))
