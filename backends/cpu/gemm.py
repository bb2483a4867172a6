"""Matrix products on the CPU, from torch alone.

torch has no single fastest product here. What decides (measured, two cores, TFLOP/s in brackets):
- bfloat16 runs at full speed only where the CPU multiplies it (AVX512-BF16, AMX: 0.8); elsewhere torch falls back to a
  loop (0.02) that is best for up to four rows only, and widening to float32 first wins (0.13 to 0.17). float16 is slow
  everywhere (0.001).
- float32 is faster through oneDNN than through torch.matmul on AVX512 (0.45 against 0.21), and equal to it on AVX2, but
  for one row: there a weight is read at 22 GB/s instead of 18 (AVX2, of 27 that the memory gives). Small products are
  faster through torch.mm everywhere.
"""

from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...ops.gemm import (
    batched_gemm,
    gemm,
    gemm_dgrad,
    gemm_wgrad,
    grouped_gemm,
    grouped_gemm_dgrad,
    grouped_gemm_wgrad,
    masked_gemm,
)

# Public from some release on; where it is missing, experts are visited one by one.
grouped_mm: Any = getattr(torch.nn.functional, "grouped_mm", None)

FEW_ROWS = 4  # up to here torch multiplies bfloat16 by itself faster than after widening
DECODE_ROWS = 16  # up to here a visit to the experts that have rows beats one call over all of them
# A call of oneDNN costs 12 us before it multiplies anything (36 among calls of other sizes), one of torch.mm 2:
SMALL_PRODUCT = 1 << 22  # multiplications up to which torch.mm is faster,
SMALL_WEIGHT = 1 << 20  # and elements of a weight that meets one row
WIDEN_AT_ONCE = 1 << 24  # elements; a 16-bit weight is widened in pieces, so that it never stands in memory twice
GROUPED_ALIGNMENT = 16  # bytes; grouped_mm refuses rows that are no multiple


@cache
def native_bf16() -> bool:
    """Does this CPU multiply bfloat16 in hardware?"""
    return bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    )


def onednn_linear(a: Tensor, weight: Tensor) -> Tensor:
    """a [M, K], weight [N, K] float32 -> [M, N], computed by oneDNN whatever the process-wide matmul precision is."""
    return torch.ops.mkldnn._linear_pointwise(a, weight, None, "none", [], "")


@cache
def onednn_is_exact() -> bool:
    """Unless oneDNN rounds float32 to bfloat16 here (it may on AMX): checked once against float64."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(128, 512, generator=generator), torch.randn(128, 512, generator=generator)
    exact = a.double() @ b.double().T
    return bool((onednn_linear(a, b).double() - exact).norm() <= 2e-6 * exact.norm())


@cache
def onednn_is_faster() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def _onednn_pays(M: int, K: int, N: int, along_k: bool) -> bool:
    """For float32 [M, K] times [K, N]; along_k: the second factor is stored along K."""
    if M == 1:
        return along_k and K * N > SMALL_WEIGHT and onednn_is_exact()
    return M * K * N > SMALL_PRODUCT and onednn_is_faster() and onednn_is_exact()


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a [M, K] times b [K, N] in a's dtype, any strides, by the fastest way that torch has here; into `out`."""
    if a.dtype == b.dtype:
        if a.dtype == torch.float32:
            return _float32_product(a, b, out)
        few = len(a) <= FEW_ROWS and b.stride(0) == 1  # the loop is quick only where it reads both along K
        if a.dtype == torch.float64 or (a.dtype == torch.bfloat16 and (few or native_bf16())):
            return torch.mm(a, b, out=out)
    return _widened_product(a, b, a.new_empty(len(a), b.shape[1]) if out is None else out)


def _float32_product(a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
    if not _onednn_pays(a.shape[0], a.shape[1], b.shape[1], b.stride(0) == 1):
        return torch.mm(a, b, out=out)
    result = onednn_linear(a, b.T)
    return result if out is None else out.copy_(result)


def _widened_product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, step = a.to(wide), max(1, WIDEN_AT_ONCE // len(b))
    for start in range(0, b.shape[1], step):
        part = slice(start, start + step)
        out[:, part] = torch.mm(a, b[:, part].to(wide))
    return out


def is_plain(a: Tensor, b: Tensor, layout: str = "plain") -> bool:
    return layout == "plain"


def _onednn_applies(a: Tensor, b: Tensor, layout: str = "plain") -> bool:
    if layout != "plain" or not a.dtype == b.dtype == torch.float32:
        return False
    return _onednn_pays(a.shape[0], a.shape[1], b.shape[0], b.stride(1) == 1)


@gemm.kernel("cpu", "onednn", priority=10, available=onednn_is_exact, supports=_onednn_applies)
def gemm_onednn(a: Tensor, b: Tensor, layout: str = "plain") -> Tensor:
    return onednn_linear(a, b)


@gemm.kernel("cpu", "torch", supports=is_plain)
def gemm_torch(a: Tensor, b: Tensor, layout: str = "plain") -> Tensor:
    return product(a, b.T)


@gemm_dgrad.kernel("cpu", "torch")
def gemm_dgrad_torch(grad: Tensor, b: Tensor) -> Tensor:
    return product(grad, b)


@gemm_wgrad.kernel("cpu", "torch")
def gemm_wgrad_torch(grad: Tensor, a: Tensor) -> Tensor:
    return product(grad.T, a).to(a.dtype)


def segments(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, and where their rows are."""
    bounds = offsets.tolist()
    for expert, (start, stop) in enumerate(pairwise(bounds)):
        if start < stop:
            yield expert, slice(start, stop)


def _one_call_applies(a: Tensor, b: Tensor, offsets: Tensor, layout: str = "plain") -> bool:
    """grouped_mm is for one dtype that this CPU multiplies fast, for rows of whole 16-byte units, and for many rows."""
    return (
        layout == "plain"
        and a.dtype == b.dtype
        and (a.dtype == torch.float32 or (a.dtype == torch.bfloat16 and native_bf16()))
        and len(a) > DECODE_ROWS
        and a.shape[-1] * a.element_size() % GROUPED_ALIGNMENT == 0
        and b.shape[-1] * b.element_size() % GROUPED_ALIGNMENT == 0
        and (b.dim() == 2 or b.shape[1] * b.element_size() % GROUPED_ALIGNMENT == 0)
    )


def _has_grouped_mm() -> bool:
    return grouped_mm is not None


def _zero_tail(out: Tensor, offsets: Tensor) -> Tensor:
    out[int(offsets[-1]) :] = 0  # grouped_mm leaves them as it found them
    return out


# Gradients may come expanded (of a sum: stride 0), which grouped_mm refuses: hence contiguous().
@grouped_gemm.kernel("cpu", "grouped_mm", priority=10, available=_has_grouped_mm, supports=_one_call_applies)
def grouped_gemm_one_call(a: Tensor, b: Tensor, offsets: Tensor, layout: str = "plain") -> Tensor:
    return _zero_tail(grouped_mm(a.contiguous(), b.contiguous().transpose(1, 2), offs=offsets[1:]), offsets)


@grouped_gemm_dgrad.kernel("cpu", "grouped_mm", priority=10, available=_has_grouped_mm, supports=_one_call_applies)
def grouped_gemm_dgrad_one_call(grad: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    return _zero_tail(grouped_mm(grad.contiguous(), b.contiguous(), offs=offsets[1:]), offsets)


@grouped_gemm_wgrad.kernel("cpu", "grouped_mm", priority=10, available=_has_grouped_mm, supports=_one_call_applies)
def grouped_gemm_wgrad_one_call(grad: Tensor, a: Tensor, offsets: Tensor) -> Tensor:
    return grouped_mm(grad.contiguous().T, a.contiguous(), offs=offsets[1:])


@grouped_gemm.kernel("cpu", "torch", supports=lambda a, b, offsets, layout="plain": layout == "plain")
def grouped_gemm_segments(a: Tensor, b: Tensor, offsets: Tensor, layout: str = "plain") -> Tensor:
    out = a.new_zeros(len(a), b.shape[1])
    for expert, rows in segments(offsets):
        product(a[rows], b[expert].T, out[rows])
    return out


@grouped_gemm_dgrad.kernel("cpu", "torch")
def grouped_gemm_dgrad_segments(grad: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    out = grad.new_zeros(len(grad), b.shape[2])
    for expert, rows in segments(offsets):
        product(grad[rows], b[expert], out[rows])
    return out


@grouped_gemm_wgrad.kernel("cpu", "torch")
def grouped_gemm_wgrad_segments(grad: Tensor, a: Tensor, offsets: Tensor) -> Tensor:
    out = a.new_zeros(len(offsets) - 1, grad.shape[1], a.shape[1])
    for expert, rows in segments(offsets):
        product(grad[rows].T, a[rows], out[expert])
    return out


@masked_gemm.kernel("cpu", "torch")
def masked_gemm_segments(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    out = a.new_zeros(*a.shape[:2], b.shape[1])
    for expert, count in enumerate(counts.tolist()):
        if count:
            product(a[expert, :count], b[expert].T, out[expert, :count])
    return out


def _loop_pays(a: Tensor, b: Tensor) -> bool:
    """bfloat16 without hardware for it: bmm takes the slow loop, and a product at a time picks its way."""
    return a.dtype == torch.bfloat16 and not native_bf16()


@batched_gemm.kernel("cpu", "torch", priority=10, supports=_loop_pays)
def batched_gemm_loop(a: Tensor, b: Tensor) -> Tensor:
    out = a.new_empty(*a.shape[:2], b.shape[1])
    for left, right, to in zip(a, b, out, strict=True):
        product(left, right.T, to)
    return out


@batched_gemm.kernel("cpu", "bmm", supports=lambda a, b: a.dtype == b.dtype and a.dtype != torch.float16)
def batched_gemm_bmm(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a, b.transpose(1, 2))
