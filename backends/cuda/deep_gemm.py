"""DeepGEMM: FP8 products with block scales on Hopper, plain and of experts.

Signatures and layouts: deepseek-ai/DeepGEMM 54e2261 (2.6.1; csrc/apis/gemm.hpp, csrc/utils/layout.hpp) and the wheel
sgl-deep-gemm 0.1.4, which has the masked product under its older name only. What `deep-gemm` 1.0.0 of PyPI has is not
this interface.

- `fp8_gemm_nt((a, sa), (b, sb), d)`: a [M, K] and b [N, K] with K contiguous, sa f32 [M, Kb], sb f32 [Nb, Kb]
  contiguous, d bf16. sa is wanted M-major with columns of M rounded up to 4: what quantize_tiles returns; any other
  layout is copied by the library.
- `recipe=(1, 1, 128)` with `c=d`: both operands in tiles, d f32 is added to.
- grouped: b [E, N, K]; contiguous: an expert id per row, of which only that of every 128th row is read (-1: write 0);
  masked: a [E, C, K] and counts i32 [E]; whole blocks of rows are written, so C has to be a multiple of 128.
- A power of two is not required of the scales on Hopper. On Blackwell the library would round them: not taken there.

Not adapted: the gradient of the experts' weights. On Hopper `k_grouped_fp8_gemm_nt_contiguous` wants the sizes of the
segments as a list on the host, which they are not.
"""

from types import ModuleType

import torch
from torch import Tensor

from ...ops.formats import BLOCK, E4M3
from ...ops.fp8 import fp8_gemm, fp8_gemm_wgrad
from ...ops.gemm import in_use
from ...ops.grouped_fp8 import grouped_fp8_gemm, masked_fp8_gemm
from ..probing import Unavailable, available, find, require_hopper

PRIORITY = 30
STEP_N = 64  # all of V3's widths are multiples (576 = 9 * 64), and the library's own tests try no others
MASKED = ("m_grouped_fp8_gemm_nt_masked", "fp8_m_grouped_gemm_nt_masked")  # both spellings are in use
# Fewer rows per expert than this, and moving the first rows of unaligned segments costs more than the library gains.
ROWS_PER_EXPERT = 512


def _library() -> ModuleType:
    return find("deep_gemm", ("fp8_gemm_nt", "m_grouped_fp8_gemm_nt_contiguous"))


def _probe() -> None:
    require_hopper()
    library = _library()
    if not any(hasattr(library, name) for name in MASKED):
        raise Unavailable(f"deep_gemm has neither {' nor '.join(MASKED)}")


_AVAILABLE = available("deep_gemm", _probe)


def _fits(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor) -> bool:
    """FP8 of Hopper, float32 scales, rows of whole tiles that TMA can read."""
    return (
        a.dtype == b.dtype == E4M3
        and sa.dtype == sb.dtype == torch.float32
        and a.is_contiguous()
        and b.is_contiguous()
        and a.shape[-1] % BLOCK == 0
        and a.numel() > 0
    )


def _fits_weight(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, out_dtype: torch.dtype) -> bool:
    return _fits(a, sa, b, sb) and out_dtype == torch.bfloat16 and b.shape[-2] % STEP_N == 0 and sb.is_contiguous()


@fp8_gemm.kernel(
    "cuda", "deep_gemm", priority=PRIORITY, available=_AVAILABLE, supports=_fits_weight, checked="emulated"
)
def fp8_gemm_deep_gemm(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, out_dtype: torch.dtype) -> Tensor:
    out = a.new_empty(a.shape[0], b.shape[0], dtype=out_dtype)
    _library().fp8_gemm_nt((a, sa), (b, sb), out)
    return out


def _fits_wgrad(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor) -> bool:
    return _fits(a, sa, b, sb) and a.shape[0] % STEP_N == 0 and b.shape[0] % STEP_N == 0


@fp8_gemm_wgrad.kernel(
    "cuda", "deep_gemm", priority=PRIORITY, available=_AVAILABLE, supports=_fits_wgrad, checked="emulated"
)
def fp8_gemm_wgrad_deep_gemm(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor) -> Tensor:
    out = sa.new_zeros(a.shape[0], b.shape[0])
    _library().fp8_gemm_nt((a, sa), (b, sb), out, c=out, recipe=(1, 1, BLOCK))
    return out


def _masked(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, out: Tensor, counts: Tensor) -> None:
    """out[e, :counts[e]] = the product of expert e; what is behind is undefined."""
    library = _library()
    function = next(getattr(library, name) for name in MASKED if hasattr(library, name))
    # The last argument is a hint for the size of blocks: how many rows are expected. Known on the host is the capacity.
    function((a, sa), (b, sb), out, counts, a.shape[1])


def _fits_masked(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, counts: Tensor, out_dtype: torch.dtype) -> bool:
    return a.shape[1] % BLOCK == 0 and counts.is_contiguous() and _fits_weight(a, sa, b, sb, out_dtype)


@masked_fp8_gemm.kernel(
    "cuda", "deep_gemm", priority=PRIORITY, available=_AVAILABLE, supports=_fits_masked, checked="emulated"
)
def masked_fp8_gemm_deep_gemm(
    a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, counts: Tensor, out_dtype: torch.dtype
) -> Tensor:
    out = a.new_empty(*a.shape[:2], b.shape[1], dtype=out_dtype)
    _masked(a, sa, b, sb, out, counts)
    return out.masked_fill_(~in_use(counts, a.shape[1]), 0.0)


def _fits_grouped(a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, offsets: Tensor, out_dtype: torch.dtype) -> bool:
    R, E = a.shape[0], b.shape[0]
    return R % BLOCK == 0 and R >= ROWS_PER_EXPERT * E and _fits_weight(a, sa, b, sb, out_dtype)


@grouped_fp8_gemm.kernel(
    "cuda", "deep_gemm", priority=PRIORITY, available=_AVAILABLE, supports=_fits_grouped, checked="emulated"
)
def grouped_fp8_gemm_deep_gemm(
    a: Tensor, sa: Tensor, b: Tensor, sb: Tensor, offsets: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """The library gives a block of 128 rows to one expert, and whether segments start at multiples of 128 is known on
    the device alone. So the rows of a segment before its first block of its own are computed once more, as a masked
    product; where segments are aligned there are none, and that product does nothing.
    """
    R, (E, N, _) = a.shape[0], b.shape
    row = torch.arange(R, device=a.device, dtype=torch.int32)
    expert = torch.searchsorted(offsets[1:].contiguous(), row, right=True, out_int32=True)
    out = a.new_empty(R + 1, N, dtype=out_dtype)  # the last row takes what is not wanted
    ids = torch.where(expert < E, expert, -1)
    _library().m_grouped_fp8_gemm_nt_contiguous((a, sa), (b, sb), out[:R], ids)

    # Segment E is what follows the last expert: it gets zeros.
    ends = torch.cat([offsets[1:], offsets.new_full((1,), R)])
    heads = (torch.minimum(ends, (offsets + (BLOCK - 1)) // BLOCK * BLOCK) - offsets).clamp_min(0)
    place = torch.arange(BLOCK, device=a.device, dtype=offsets.dtype)
    rows = offsets[:, None] + place  # [E + 1, 128]
    used = place < heads[:, None]
    source = torch.where(used, rows, 0)[:E]
    products = a.new_empty(E + 1, BLOCK, N, dtype=out_dtype)
    head = a.view(torch.uint8)[source].view(a.dtype), sa[source]
    _masked(*head, b, sb, products[:E], heads[:E].contiguous())
    products[E] = 0.0
    out.index_copy_(0, torch.where(used, rows, R).flatten().long(), products.flatten(0, 1))
    return out[:R]
