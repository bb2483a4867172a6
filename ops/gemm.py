"""Matrix products with real-valued weights: of a linear layer, of experts in one buffer, of experts of fixed capacity.

Shapes: M (or R, routed) rows, K inputs, N outputs, E experts, C rows of capacity per expert. Weights are [N, K], as in
the checkpoints. Sums run in float32 at least; results have the dtype of the activations. The gradients are ops of their
own, so that a pipeline schedule can compute the one of the weight later (DualPipe; DeepSeek-V3 report, section 3.2.1).

`layout` names the order in which a backend has packed a weight on load ("plain": as in the checkpoint). The
specification reads plain weights only, and gradients exist for those only.
"""

from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .op import Near, op

# float32: what blocked float32 sums over K <= 20,000 lose against float64, with a factor of 3 to spare.
PRODUCT = Near(f32=2e-6, bf16=4e-3)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def require_plain(layout: str) -> None:
    """Raise UserError unless `layout` is the one that every backend reads."""
    if layout != "plain":
        raise UserError(f"weights in layout {layout!r} belong to another backend: load the model with the active one")


def in_segment(offsets: Tensor, expert: int, rows: int) -> Tensor:
    """Which of `rows` rows belong to `expert`: bool [rows, 1]. Computed on the device, without reading offsets."""
    row = torch.arange(rows, device=offsets.device)
    return ((row >= offsets[expert]) & (row < offsets[expert + 1]))[:, None]


def in_use(counts: Tensor, capacity: int) -> Tensor:
    """Which rows of capacity hold a token: bool [E, capacity, 1] from counts i32 [E]."""
    return (torch.arange(capacity, device=counts.device) < counts[:, None])[..., None]


def _product_cost(a: Tensor, b: Tensor, layout: str = "plain") -> tuple[int, int]:
    (M, K), N = a.shape, b.shape[0]
    return 2 * M * N * K, a.nbytes + b.nbytes + M * N * a.element_size()


def _dgrad_cost(grad: Tensor, b: Tensor) -> tuple[int, int]:
    (M, N), K = grad.shape, b.shape[1]
    return 2 * M * N * K, grad.nbytes + b.nbytes + M * K * grad.element_size()


def _wgrad_cost(grad: Tensor, a: Tensor) -> tuple[int, int]:
    (M, N), K = grad.shape, a.shape[1]
    return 2 * M * N * K, grad.nbytes + a.nbytes + N * K * a.element_size()


@op(shapes={"a": "M K", "b": "N K"}, tolerance=PRODUCT, cost=_product_cost)
def gemm(a: Tensor, b: Tensor, layout: str = "plain") -> Tensor:
    """A linear layer: a [M, K], b [N, K] -> a b^T [M, N] in a's dtype. UserError for an unknown layout."""
    require_plain(layout)
    return (_wide(a) @ _wide(b).T).to(a.dtype)


@op(shapes={"grad": "M N", "b": "N K"}, tolerance=PRODUCT, cost=_dgrad_cost)
def gemm_dgrad(grad: Tensor, b: Tensor) -> Tensor:
    """Gradient of gemm's input: grad [M, N], b [N, K] -> grad b [M, K] in grad's dtype."""
    return (_wide(grad) @ _wide(b)).to(grad.dtype)


@op(shapes={"grad": "M N", "a": "M K"}, tolerance=PRODUCT, cost=_wgrad_cost)
def gemm_wgrad(grad: Tensor, a: Tensor) -> Tensor:
    """Gradient of gemm's weight: grad [M, N], a [M, K] -> grad^T a [N, K] in a's dtype."""
    return (_wide(grad).T @ _wide(a)).to(a.dtype)


def _save_factors(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, layout = inputs
    require_plain(layout)
    ctx.save_for_backward(*tensors)


@gemm.backward(_save_factors)
def _(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b = ctx.saved_tensors
    need_a, need_b, *_ = ctx.needs_input_grad  # shorter when layout is left out
    return (
        gemm_dgrad(grad, b).to(a.dtype) if need_a else None,
        gemm_wgrad(grad, a).to(b.dtype) if need_b else None,
        None,
    )


def _grouped_product_cost(a: Tensor, b: Tensor, offsets: Tensor, layout: str = "plain") -> tuple[int, int]:
    (R, K), N = a.shape, b.shape[1]
    return 2 * R * N * K, a.nbytes + b.nbytes + R * N * a.element_size()


def _grouped_dgrad_cost(grad: Tensor, b: Tensor, offsets: Tensor) -> tuple[int, int]:
    (R, N), K = grad.shape, b.shape[2]
    return 2 * R * N * K, grad.nbytes + b.nbytes + R * K * grad.element_size()


def _grouped_wgrad_cost(grad: Tensor, a: Tensor, offsets: Tensor) -> tuple[int, int]:
    (R, N), K, E = grad.shape, a.shape[1], offsets.shape[0] - 1
    return 2 * R * N * K, grad.nbytes + a.nbytes + E * N * K * a.element_size()


def _grouped_fake(a: Tensor, b: Tensor, offsets: Tensor, layout: str = "plain") -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def _grouped_dgrad_fake(grad: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    return grad.new_empty(grad.shape[0], b.shape[2])


def _grouped_wgrad_fake(grad: Tensor, a: Tensor, offsets: Tensor) -> Tensor:
    return a.new_empty(offsets.shape[0] - 1, grad.shape[1], a.shape[1])


@op(
    shapes={"a": "R K", "b": "E N K", "offsets": "E+1"},
    tolerance=PRODUCT,
    cost=_grouped_product_cost,
    fake=_grouped_fake,
)
def grouped_gemm(a: Tensor, b: Tensor, offsets: Tensor, layout: str = "plain") -> Tensor:
    """A linear layer of every expert, on rows that are sorted by expert.

    a [R, K], b [E, N, K], offsets i32 [E + 1] with offsets[0] = 0 -> [R, N] in a's dtype; expert e computes the rows
    offsets[e] to offsets[e + 1]. Rows from offsets[E] on are not read and come out as 0. UserError as in gemm.
    """
    require_plain(layout)
    wide = _wide(a)
    out = wide.new_zeros(a.shape[0], b.shape[1])
    for expert in range(b.shape[0]):
        out = torch.where(in_segment(offsets, expert, a.shape[0]), wide @ _wide(b[expert]).T, out)
    return out.to(a.dtype)


@op(
    shapes={"grad": "R N", "b": "E N K", "offsets": "E+1"},
    tolerance=PRODUCT,
    cost=_grouped_dgrad_cost,
    fake=_grouped_dgrad_fake,
)
def grouped_gemm_dgrad(grad: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Gradient of grouped_gemm's input: grad [R, N], b [E, N, K], offsets i32 [E + 1] -> [R, K] in grad's dtype."""
    wide = _wide(grad)
    out = wide.new_zeros(grad.shape[0], b.shape[2])
    for expert in range(b.shape[0]):
        out = torch.where(in_segment(offsets, expert, grad.shape[0]), wide @ _wide(b[expert]), out)
    return out.to(grad.dtype)


@op(
    shapes={"grad": "R N", "a": "R K", "offsets": "E+1"},
    tolerance=PRODUCT,
    cost=_grouped_wgrad_cost,
    fake=_grouped_wgrad_fake,
)
def grouped_gemm_wgrad(grad: Tensor, a: Tensor, offsets: Tensor) -> Tensor:
    """Gradient of grouped_gemm's weights: grad [R, N], a [R, K], offsets i32 [E + 1] -> [E, N, K] in a's dtype.

    An expert without rows has gradient 0.
    """
    experts = []
    for expert in range(offsets.shape[0] - 1):
        mine = in_segment(offsets, expert, a.shape[0])  # masks both: rows of no segment may hold anything, NaN too
        experts.append(torch.where(mine, _wide(grad), 0.0).T @ torch.where(mine, _wide(a), 0.0))
    return torch.stack(experts).to(a.dtype)


@grouped_gemm.backward(_save_factors)
def _(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b, offsets = ctx.saved_tensors
    need_a, need_b, *_ = ctx.needs_input_grad
    return (
        grouped_gemm_dgrad(grad, b, offsets).to(a.dtype) if need_a else None,
        grouped_gemm_wgrad(grad, a, offsets).to(b.dtype) if need_b else None,
        None,
        None,
    )


def _masked_cost(a: Tensor, b: Tensor, counts: Tensor) -> tuple[int, int]:
    (E, C, K), N = a.shape, b.shape[1]
    return 2 * E * C * N * K, a.nbytes + b.nbytes + E * C * N * a.element_size()


@op(shapes={"a": "E C K", "b": "E N K", "counts": "E"}, tolerance=PRODUCT, cost=_masked_cost)
def masked_gemm(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    """A linear layer of every expert, each with its own C rows of which the first counts[e] hold tokens (decoding).

    a [E, C, K], b [E, N, K], counts i32 [E] -> [E, C, N] in a's dtype; rows from counts[e] on come out as 0.
    """
    out = _wide(a) @ _wide(b).transpose(1, 2)
    return torch.where(in_use(counts, a.shape[1]), out, 0.0).to(a.dtype)


def _batched_cost(a: Tensor, b: Tensor) -> tuple[int, int]:
    (B, M, K), N = a.shape, b.shape[1]
    return 2 * B * M * N * K, a.nbytes + b.nbytes + B * M * N * a.element_size()


@op(shapes={"a": "B M K", "b": "B N K"}, tolerance=PRODUCT, cost=_batched_cost)
def batched_gemm(a: Tensor, b: Tensor) -> Tensor:
    """A product per batch, as absorbed attention has one a head: a [B, M, K], b [B, N, K] -> [B, M, N] in a's dtype."""
    return (_wide(a) @ _wide(b).transpose(1, 2)).to(a.dtype)


@batched_gemm.backward(lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
def _(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b = ctx.saved_tensors
    need_a, need_b = ctx.needs_input_grad
    return (
        batched_gemm(grad, b.transpose(1, 2)).to(a.dtype) if need_a else None,
        batched_gemm(grad.transpose(1, 2), a.transpose(1, 2)).to(b.dtype) if need_b else None,
    )
