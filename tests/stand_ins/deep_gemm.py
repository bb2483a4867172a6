"""DeepGEMM 54e2261 on Hopper."""

import torch

from dsv3.ops.fp8 import fp8_gemm, fp8_gemm_wgrad

__version__ = "2.6.1"
BLOCK_M, WAVE = 128, 64
E4M3 = torch.float8_e4m3fn


def ceil(size, block=128):
    return -(-size // block)


def check_operand(x):
    assert x.dtype == E4M3 and x.stride(-1) == 1 and x.is_contiguous()
    assert x.shape[-1] % 16 == 0 and x.data_ptr() % 16 == 0  # TMA


def check_scales(s, rows, K, step, groups=()):
    assert s.dtype == torch.float32 and tuple(s.shape) == (*groups, ceil(rows, step), ceil(K))
    if step == 128:  # not copied by the library: as it is, or transposed
        N, Kb = s.shape[-2:]
        assert (s.stride(-1) == 1 and s.stride(-2) == Kb) or (s.stride(-1) == N and s.stride(-2) == 1)


def fp8_gemm_nt(
    a, b, d, c=None, recipe=None, recipe_a=None, recipe_b=None, compiled_dims="nk", disable_ue8m0_cast=False
):
    (a, sa), (b, sb) = a, b
    (M, K), (N, K_) = a.shape, b.shape
    check_operand(a), check_operand(b)
    assert K == K_ and tuple(d.shape) == (M, N) and d.stride(-1) == 1 and N % 8 == 0
    assert recipe_a is None and recipe_b is None and not disable_ue8m0_cast
    recipe = recipe or (1, 128, 128)
    check_scales(sa, M, K, 1)
    check_scales(sb, N, K, recipe[1])
    if recipe == (1, 1, 128):
        assert d.dtype == torch.float32 and c is not None and c.data_ptr() == d.data_ptr()
        d += fp8_gemm_wgrad.spec(a, sa, b, sb)
    else:
        assert recipe == (1, 128, 128) and d.dtype == torch.bfloat16 and c is None
        d.copy_(fp8_gemm.spec(a, sa, b, sb, torch.float32))


def check_grouped(a, sa, b, sb, d):
    E, N, K = b.shape
    check_operand(a), check_operand(b)
    assert a.shape[-1] == K and N % 8 == 0 and d.dtype == torch.bfloat16 and d.is_contiguous()
    assert tuple(d.shape) == (*a.shape[:-1], N)
    check_scales(sb, N, K, 128, (E,))
    d.fill_(torch.nan)


def m_grouped_fp8_gemm_nt_contiguous(
    a,
    b,
    d,
    grouped_layout,
    recipe=None,
    recipe_a=None,
    recipe_b=None,
    compiled_dims="nk",
    disable_ue8m0_cast=False,
    use_psum_layout=False,
    ensure_zero_padding=True,
    expected_m_for_psum_layout=None,
):
    (a, sa), (b, sb) = a, b
    check_grouped(a, sa, b, sb, d)
    check_scales(sa, a.shape[0], a.shape[1], 1)
    assert grouped_layout.dtype == torch.int32 and tuple(grouped_layout.shape) == (a.shape[0],)
    assert grouped_layout.is_contiguous() and recipe is None and not use_psum_layout
    for start in range(0, a.shape[0], BLOCK_M):
        expert = max(0, int(grouped_layout[start]))  # of the block's first row, whatever the others say
        for wave in range(start, start + BLOCK_M, WAVE):
            rows = slice(wave, wave + WAVE)
            product = fp8_gemm.spec(a[rows], sa[rows], b[expert], sb[expert], torch.float32)
            d[rows] = product if int(grouped_layout[wave]) >= 0 else 0.0


def m_grouped_fp8_gemm_nt_masked(
    a,
    b,
    d,
    masked_m,
    expected_m,
    recipe=None,
    recipe_a=None,
    recipe_b=None,
    compiled_dims="nk",
    disable_ue8m0_cast=False,
):
    (a, sa), (b, sb) = a, b
    check_grouped(a, sa, b, sb, d)
    E, C, K = a.shape
    check_scales(sa, C, K, 1, (E,))
    assert masked_m.dtype == torch.int32 and tuple(masked_m.shape) == (E,) and masked_m.is_contiguous()
    assert isinstance(expected_m, int) and expected_m > 0 and recipe is None
    assert C % BLOCK_M == 0  # else the last block of an expert overwrites the next one's rows
    for expert, count in enumerate(masked_m.tolist()):
        rows = slice(0, ceil(count, WAVE) * WAVE)
        d[expert, rows] = fp8_gemm.spec(a[expert, rows], sa[expert, rows], b[expert], sb[expert], torch.bfloat16)
