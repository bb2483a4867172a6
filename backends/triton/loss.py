"""The head's loss: the vendor's matrix products, and one pass of Triton over the logits between them.

The logits are float32: rounded to 16 bits, a log-probability would be wrong by 2^-9 of a logit, hundreds of times what
the op allows. Vendor libraries write float32 products of 16-bit factors at full speed; fusing the pass into a product
in Triton would save 8 bytes of traffic per logit, an eighth of the product's time, and lose more in the product itself.

Forward: tokens in pieces, each with its whole row of logits. Backward: the vocabulary in pieces, with all tokens, which
the saved log-sum-exp and entropy make possible: w's gradient comes out finished, piece by piece and in its own dtype;
what is summed up in float32 is the small [T, D], not the large [V, D]. Sums have the same order in every run.
"""

import math
from collections.abc import Iterator

import torch
import triton.language as tl
from torch import Tensor

from ...ops.loss import IGNORE, linear_cross_entropy, linear_cross_entropy_backward
from .operands import REAL
from .runtime import gpu_kernel, kernel, launch
from .tables import tile

WORKSPACE = 512 << 20  # bytes of logits, and of their gradients, at a time
FEWEST = 1024  # of the vocabulary at a time, however many tokens there are: thinner products are slow
ALIGNMENT = 128  # of pieces: rows of whole tiles, and of whole 16 bytes

SKIPPED = tl.constexpr(IGNORE)
LOWEST = tl.constexpr(-1.0e30)  # in place of -inf, of which differences are NaN


@kernel
def row_statistics_kernel(
    logits, target, logp, entropy, lse, V, inverse_temperature, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    """logits f32 [T, V] -> logp, entropy, lse f32 [T]; a program a row, read once.

    About the largest logit m so far: total = sum exp(x - m) and moment = sum exp(x - m) (x - m), lane by lane.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    here = logits + row * V
    largest = tl.max(tl.full((BLOCK,), LOWEST, tl.float32), 0)
    total = tl.zeros((BLOCK,), tl.float32)
    moment = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        x = tl.load(here + start + column, mask=start + column < V, other=LOWEST) * inverse_temperature
        higher = tl.maximum(largest, tl.max(x, 0))
        shrink = tl.exp(largest - higher)
        distance = x - higher
        p = tl.exp(distance)
        moment = shrink * (moment + (largest - higher) * total) + p * distance
        total = shrink * total + p
        largest = higher
    mass = tl.sum(total, 0)
    log_mass = tl.log(mass)
    tl.store(lse + row, largest + log_mass)
    tl.store(entropy + row, log_mass - tl.sum(moment, 0) / mass)
    chosen = tl.load(target + row)
    scored = chosen != SKIPPED
    picked = tl.load(here + tl.where(scored, chosen, 0)) * inverse_temperature
    tl.store(logp + row, tl.where(scored, (picked - largest) - log_mass, 0.0))


@kernel
def logits_gradient_kernel(
    logits, grads, target, grad_logp, grad_entropy, grad_lse, entropy, lse, T, V, first, inverse_temperature,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """logits f32 [T, V] of the tokens from `first` of the vocabulary on -> grads [T, V], which may be the same memory.

    With log p = x - lse: p * (grad_lse - grad_logp - grad_entropy * (log p + entropy)), and grad_logp at the target.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = row < T
    mask = there[:, None] & (column < V)[None, :]
    place = row[:, None] * V + column[None, :]
    x = tl.load(logits + place, mask=mask, other=0.0)
    log_p = x * inverse_temperature - tl.load(lse + row, mask=there, other=0.0)[:, None]
    p = tl.exp(log_p)
    factor = tl.zeros((ROWS,), tl.float32)
    if grad_lse is not None:
        factor += tl.load(grad_lse + row, mask=there, other=0.0)
    chosen = tl.load(target + row, mask=there, other=SKIPPED)
    of_target = tl.zeros((ROWS,), tl.float32)
    if grad_logp is not None:
        of_target = tl.where(chosen != SKIPPED, tl.load(grad_logp + row, mask=there, other=0.0), 0.0)
        factor -= of_target
    grad = p * factor[:, None]
    if grad_entropy is not None:
        spread = log_p + tl.load(entropy + row, mask=there, other=0.0)[:, None]
        grad -= tl.load(grad_entropy + row, mask=there, other=0.0)[:, None] * p * spread
    if grad_logp is not None:
        grad += tl.where((column + first)[None, :] == chosen[:, None], of_target[:, None], 0.0)
    tl.store(grads + place, (grad * inverse_temperature).to(grads.dtype.element_ty), mask=mask)


# Launchers -----------------------------------------------------------------------------------------------------------


def pieces(size: int, most: int) -> Iterator[slice]:
    """Cut 0..size into equal pieces of at most `most`, aligned where there are several."""
    most = max(most, 1)
    step = max(size, 1)
    if size > most:
        equal = math.ceil(size / math.ceil(size / most))
        step = min(math.ceil(equal / ALIGNMENT) * ALIGNMENT, most)
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """out (+)= a b, summed in float32 and written in out's dtype: float32, or that of a and b. float32 products are as
    exact as torch.set_float32_matmul_precision asks."""
    if a.dtype != out.dtype and a.device.type == "cpu":  # the interpreter's: only GPUs have out_dtype
        a, b = a.to(out.dtype), b.to(out.dtype)
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    if add:
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def _alike(h: Tensor, w: Tensor, *dtypes: torch.dtype) -> bool:
    return h.dtype == w.dtype and h.dtype in dtypes and h.device == w.device


@gpu_kernel(
    linear_cross_entropy,
    lambda h, w, target, temperature: _alike(h, w, *REAL),
)
def linear_cross_entropy_triton(
    h: Tensor, w: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    T, V = h.shape[0], w.shape[0]
    logp, entropy, lse = (h.new_empty(T, dtype=torch.float32) for _ in range(3))
    target = target.contiguous()
    space: Tensor | None = None
    for rows in pieces(T, WORKSPACE // (4 * V)):
        size = rows.stop - rows.start
        space = h.new_empty(size, V, dtype=torch.float32) if space is None else space
        logits = product(h[rows], w.T, space[:size])
        launch(
            row_statistics_kernel, (size,), logits, target[rows], logp[rows], entropy[rows], lse[rows], V,
            1.0 / temperature, enable_fp_fusion=True, **tile("row_statistics", V=V),
        )  # fmt: skip
    return logp, entropy, lse


# float16 has no room for the gradients of single logits: 1 / (V T) is far below its smallest number.
@gpu_kernel(
    linear_cross_entropy_backward,
    lambda grad_logp, grad_entropy, grad_lse, h, w, *rest: _alike(h, w, torch.float32, torch.bfloat16),
)
def linear_cross_entropy_backward_triton(
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    h: Tensor,
    w: Tensor,
    target: Tensor,
    temperature: float,
    entropy: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    (T, D), V = h.shape, w.shape[0]
    narrow = h.dtype != torch.float32
    per_row = [None if x is None else x.contiguous() for x in (target, grad_logp, grad_entropy, grad_lse, entropy, lse)]
    most = max(WORKSPACE // (max(T, 1) * (4 + narrow * h.itemsize)) // ALIGNMENT * ALIGNMENT, FEWEST)
    parts = list(pieces(V, most))
    of_w = w.new_empty(V, D)
    of_h = h.new_empty(T, D, dtype=h.dtype if len(parts) == 1 else torch.float32)
    space = h.new_empty(T * parts[0].stop, dtype=torch.float32)
    narrow_space = torch.empty_like(space, dtype=h.dtype) if narrow else space
    for part in parts:
        size = part.stop - part.start
        logits = product(h, w[part].T, space[: T * size].view(T, size))
        grads = narrow_space[: T * size].view(T, size)
        shape = tile("logits_gradient", T=T)
        launch(
            logits_gradient_kernel, (-(-T // shape["ROWS"]), -(-size // shape["COLUMNS"])), logits, grads, *per_row,
            T, size, part.start, 1.0 / temperature, enable_fp_fusion=True, **shape,
        )  # fmt: skip
        product(grads, w[part], of_h, add=part.start > 0)
        product(grads.T, h, of_w[part])
    return of_h.to(h.dtype), of_w
