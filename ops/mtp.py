"""Multi-token prediction (report, section 2.2): the input of an MTP module.

Shapes: T tokens, D hidden size.
"""

from typing import Any

import torch
from torch import Tensor

from .general import rms_norm, rms_norm_backward
from .op import Near, op


def _cost(hidden: Tensor, *rest: Any) -> tuple[int, int]:
    return 8 * hidden.numel(), 4 * hidden.nbytes


@op(
    shapes={"hidden": "T D", "embedding": "T D", "hnorm_w": "D", "enorm_w": "D"}, tolerance=Near(1e-6, 5e-3), cost=_cost
)
def mtp_input(hidden: Tensor, embedding: Tensor, hnorm_w: Tensor, enorm_w: Tensor, eps: float) -> Tensor:
    """What eh_proj multiplies: the next token's embedding and the hidden state, each normalised.

    hidden, embedding [T, D]; hnorm_w, enorm_w [D] -> [T, 2 D] = cat(rms_norm(embedding), rms_norm(hidden)) in hidden's
    dtype. The embedding comes first: the order of the released eh_proj, and the reverse of the report's equation 21.
    """
    return torch.cat([rms_norm.spec(embedding, enorm_w, eps), rms_norm.spec(hidden, hnorm_w, eps)], -1)


def _backward_cost(grad: Tensor, *rest: Any) -> tuple[int, int]:
    return 12 * grad.numel(), 3 * grad.nbytes


@op(
    shapes={"grad": "T 2*D", "hidden": "T D", "embedding": "T D", "hnorm_w": "D", "enorm_w": "D"},
    tolerance=Near(1e-5, 5e-3),
    cost=_backward_cost,
)
def mtp_input_backward(
    grad: Tensor, hidden: Tensor, embedding: Tensor, hnorm_w: Tensor, enorm_w: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad [T, 2 D], the rest as in mtp_input -> gradients of hidden, embedding, hnorm_w and enorm_w."""
    of_first, of_second = grad.chunk(2, -1)
    of_embedding, of_enorm_w = rms_norm_backward.spec(of_first, embedding, enorm_w, eps)
    of_hidden, of_hnorm_w = rms_norm_backward.spec(of_second, hidden, hnorm_w, eps)
    return of_hidden, of_embedding, of_hnorm_w, of_enorm_w


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


@mtp_input.backward(_setup)
def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *mtp_input_backward(grad, *ctx.saved_tensors, ctx.eps), None
