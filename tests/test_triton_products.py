"""Matrix products in Triton beyond the walk: what only large sizes, one chip or another library's call would show."""

from dataclasses import replace

import pytest
import torch
from walk import hold

from dsv3 import backends
from dsv3.backends.triton.grid import splits_of
from dsv3.backends.triton.target import TARGETS, Target, interpreted, use_target
from dsv3.ops.formats import E4M3, E4M3_FNUZ
from dsv3.ops.fp8 import fp8_gemm, fp8_gemm_wgrad, quantize_blocks, quantize_tiles
from dsv3.ops.gemm import grouped_gemm, grouped_gemm_dgrad, grouped_gemm_wgrad
from dsv3.ops.grouped_fp8 import grouped_fp8_gemm, grouped_fp8_wgrad
from dsv3.ops.op import Kernel, Op, use_backend
from dsv3.ops.weight import Weight, linear, pack

pytestmark = [pytest.mark.interpreter, pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")]


def kernel_of(op: Op, backend: str, provider: str) -> Kernel:
    backends.discover()[backend].load()
    return next(kernel for kernel in op.kernels[backend] if kernel.provider == provider)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


# --- torch's call for experts on Hopper, with that of the CPU in its place ---


@pytest.mark.parametrize("sizes", [(130, 150, 0), (0, 256, 24)])
@pytest.mark.parametrize("op", [grouped_gemm, grouped_gemm_dgrad, grouped_gemm_wgrad], ids=lambda op: op.name)
def test_grouped_mm_leaves_no_row_undefined(op, sizes):
    bounds = torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    left, a = randn(290, 32, dtype=torch.bfloat16), randn(290, 16, dtype=torch.bfloat16)
    b = randn(3, 32, 16, dtype=torch.bfloat16)
    args = {"grouped_gemm": (a, b, bounds, "plain"), "grouped_gemm_dgrad": (left, b, bounds)}
    assert hold(op, "cuda", kernel_of(op, "cuda", "torch"), args.get(op.name, (left, a, bounds)))


def test_grouped_mm_is_not_asked_for_few_rows_or_odd_ones():
    supports = kernel_of(grouped_gemm, "cuda", "torch").supports
    bounds, b = torch.zeros(4, dtype=torch.int32), randn(3, 32, 16, dtype=torch.bfloat16)
    assert supports(randn(290, 16, dtype=torch.bfloat16), b, bounds)
    assert not supports(randn(96, 16, dtype=torch.bfloat16), b, bounds)
    assert not supports(randn(290, 16), b.float(), bounds)
    assert not supports(randn(290, 17, dtype=torch.bfloat16), randn(3, 32, 17, dtype=torch.bfloat16), bounds)


# --- FP8 on gfx942 ---


def test_weights_become_the_format_of_the_chip():
    x = randn(20, 256, dtype=torch.bfloat16)
    weight = Weight(*quantize_blocks(randn(200, 256)), format="fp8")
    with use_backend("rocm"), use_target("gfx942"):
        packed = pack(weight)
        assert packed.data.dtype == E4M3_FNUZ
        values, scales = quantize_tiles(x, E4M3_FNUZ)
        arguments = (values, scales, packed.data, packed.scale, torch.float32)
        assert hold(fp8_gemm, "rocm", kernel_of(fp8_gemm, "rocm", "triton"), arguments)
        of_packed = linear(x, packed)
    torch.testing.assert_close(
        fp8_gemm.spec(values, scales, packed.data, packed.scale, torch.float32),
        fp8_gemm.spec(values, scales, weight.data.float(), weight.scale, torch.float32),
    )
    exact = x.float() @ (weight.data.float() * weight.scale.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)).T
    assert (of_packed.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("backend, chip", [("cuda", "sm_90"), ("cuda", "sm_80"), ("rocm", "gfx950")])
def test_elsewhere_weights_stay_what_they_are(backend, chip):
    backends.discover()[backend].load()
    weight = Weight(*quantize_blocks(randn(3, 128, 128)), format="fp8")
    with use_backend(backend), use_target(chip):
        assert pack(weight) is weight


def test_only_fp8_of_the_checkpoints_is_packed():
    weight = Weight(*quantize_blocks(randn(3, 128, 128), E4M3_FNUZ), format="fp8")
    with use_backend("rocm"), use_target("gfx942"):
        assert pack(weight) is weight
        assert pack(replace(weight, data=weight.data.float().to(E4M3))).data.dtype == E4M3_FNUZ


# --- more tiles than units, and longer sums than the walk's ---


def tiles(T: int, K: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_tiles.spec(randn(T, K), dtype)


def blocks(*shape: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_blocks.spec(randn(*shape), dtype)


def bounds_of(*sizes: int) -> torch.Tensor:
    return torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@pytest.fixture(params=["sm_90", "sm_80", "gfx942"])
def small_chip(request, monkeypatch):
    """A chip of three units: every program of a persistent kernel has several tiles to compute."""
    target = replace(TARGETS[request.param], units=3)
    monkeypatch.setitem(TARGETS, request.param, target)
    with use_target(request.param):
        yield target


def check(op: Op, target: Target, *args) -> None:
    assert hold(op, target.backend, kernel_of(op, target.backend, "triton"), args)


@pytest.mark.parametrize("T, N, K", [(3, 128, 4096), (60, 200, 4112), (300, 1400, 144)])
def test_fp8_gemm_of_many_tiles_and_long_sums(small_chip, T, N, K):
    dtype = small_chip.fp8 or E4M3
    check(fp8_gemm, small_chip, *tiles(T, K, dtype), *blocks(N, K, dtype=dtype), torch.bfloat16)


def test_gradients_of_many_tiles(small_chip):
    dtype = small_chip.fp8 or E4M3
    check(fp8_gemm_wgrad, small_chip, *tiles(300, 144, dtype), *tiles(400, 144, dtype))
    w, s = blocks(272, 300, dtype=dtype)
    check(fp8_gemm, small_chip, *tiles(260, 272, dtype), w.T, s.T, torch.float32)


@pytest.mark.parametrize("sizes", [(0, 256, 0, 128), (130, 0, 3, 300), (384, 0, 0, 0)])
def test_experts_of_many_tiles(small_chip, sizes):
    dtype, bounds, R = small_chip.fp8 or E4M3, bounds_of(*sizes), 450
    w, s = blocks(4, 200, 144, dtype=dtype)
    check(grouped_fp8_gemm, small_chip, *tiles(R, 144, dtype), w, s, bounds, torch.bfloat16)
    check(grouped_fp8_wgrad, small_chip, *tiles(140, R, dtype), *tiles(144, R, dtype), bounds)
    a, b = randn(R, 64, dtype=torch.bfloat16), randn(4, 304, 64, dtype=torch.bfloat16)
    check(grouped_gemm, small_chip, a, b, bounds, "plain")
    check(grouped_gemm_dgrad, small_chip, randn(R, 304, dtype=torch.bfloat16), b, bounds)


def test_no_rows_and_no_tokens(small_chip):
    dtype = small_chip.fp8 or E4M3
    w, s = blocks(3, 144, 128, dtype=dtype)
    with use_backend(small_chip.backend):
        assert fp8_gemm(*tiles(0, 128, dtype), w[0], s[0], torch.bfloat16).shape == (0, 144)
        assert grouped_fp8_gemm(*tiles(0, 128, dtype), w, s, bounds_of(0, 0, 0), torch.bfloat16).shape == (0, 144)
        nothing = tiles(144, 0, dtype)
        assert torch.equal(fp8_gemm_wgrad(*nothing, *nothing), torch.zeros(144, 144))
        assert torch.equal(grouped_fp8_wgrad(*nothing, *nothing, bounds_of(0, 0, 0)), torch.zeros(3, 144, 144))


@pytest.mark.parametrize(
    "tiles, blocks, rows, least, most",
    [
        (192, 56, 16, 1, 1),  # more tiles than units
        (56, 128, 16, 2, 2),  # programs for 56 units of 132
        (17, 56, 64, 4, 6),
        (17, 2, 16, 1, 1),  # nothing to split
    ],
)
def test_long_sums_are_split_where_tiles_do_not_fill_the_chip(tiles, blocks, rows, least, most):
    assert least <= splits_of(tiles, blocks, 132, 8, rows) <= most
