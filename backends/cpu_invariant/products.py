"""Which multiplication a weight takes: by its size and dtype, never by the number of rows that meet it."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..cpu.gemm import native_bf16, onednn_is_exact, onednn_linear
from .tiles import Multiply, in_tiles

# Elements of a weight. A call of oneDNN costs tens of us before it multiplies; above these sizes it is worth that:
SMALL_WEIGHT = 1 << 18  # in float32, where its tiles may be as low as two rows,
SMALL_BF16 = 1 << 16  # and in bfloat16, where smaller weights are widened to float32.
AT_ONCE = 1 << 22  # a weight is multiplied in pieces of this many elements, so that checks and wide copies stay small
PIECE_ROWS = 128  # pieces are whole multiples: of FP8 blocks, and of aligned memory


def matmul(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b.T)


def batched_matmul(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a, b.mT)


def factor_dtype(a: torch.dtype, b: torch.dtype, elements: int) -> torch.dtype:
    """In which dtype both factors are multiplied, for a weight of `elements`."""
    if a == b == torch.float64:
        return a
    if a == b == torch.bfloat16 and native_bf16() and elements > SMALL_BF16:
        return a
    return torch.promote_types(torch.promote_types(a, b), torch.float32)


def multiply_of(dtype: torch.dtype, elements: int) -> Multiply:
    large = dtype == torch.float32 and elements > SMALL_WEIGHT
    return onednn_linear if large and onednn_is_exact() else matmul


def piece_rows(K: int) -> int:
    """Rows of a weight [N, K] that are multiplied at once."""
    return max(AT_ONCE // max(K, 1) // PIECE_ROWS, 1) * PIECE_ROWS


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K], b [N, K], any strides -> a b^T [M, N] in a's dtype."""
    dtype, rows = factor_dtype(a.dtype, b.dtype, b.numel()), piece_rows(b.shape[1])
    pieces: Iterator[Tensor] = (b[start : start + rows].to(dtype) for start in range(0, b.shape[0], rows))
    return product_with(a.to(dtype), pieces).to(a.dtype)


def product_with(a: Tensor, pieces: Iterable[Tensor]) -> Tensor:
    """a [M, K] times a weight that comes in pieces [n, K] of a's dtype -> [M, N]."""
    a = a.contiguous()
    results = [in_tiles(multiply_of(a.dtype, piece.numel()), a, piece) for piece in pieces]
    if not results:
        return a.new_empty(len(a), 0)
    return results[0] if len(results) == 1 else torch.cat(results, 1)


def batched_product(a: Tensor, b: Tensor) -> Tensor:
    """a [B, M, K], b [B, N, K], any strides -> [B, M, N] in a's dtype; B belongs to the weight, M are the rows."""
    dtype = factor_dtype(a.dtype, b.dtype, b.numel())
    return in_tiles(batched_matmul, a.to(dtype), b.to(dtype)).to(a.dtype)
