"""The head's matrix product and everything that training asks of its logits, without keeping them.

The mean loss, a policy gradient and a z-loss are one line on top of `linear_cross_entropy`:
    -logp.sum() / count        (advantage * (logp - logp_old).exp()).mean()        1e-4 * lse.square().mean()
"""

from typing import Any

import torch
from torch import Tensor

from .gemm import gemm
from .op import Near, op

IGNORE = -100  # the target of a token without a loss, as in torch.nn.functional.cross_entropy


def _log_softmax(h: Tensor, w: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(log-probabilities [T, V], log-sum-exp [T, 1]) of h w^T / temperature, in float32 at least."""
    real = torch.promote_types(h.dtype, torch.float32)
    logits = h.to(real) @ w.to(real).T / temperature
    lse = torch.logsumexp(logits, -1, keepdim=True)
    return logits - lse, lse


@op(
    shapes={"h": "T D", "w": "V D", "target": "T"},
    tolerance=(Near(1e-5, 1e-5), Near(1e-5, 1e-5), Near(1e-5, 1e-5)),
    cost=lambda h, w, target, temperature: (2 * h.shape[0] * w.numel(), h.nbytes + w.nbytes + 20 * h.shape[0]),
)
def linear_cross_entropy(h: Tensor, w: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each target, entropy and log-sum-exp of the distribution softmax(h w^T / temperature).

    h [T, D], w [V, D], target i64 [T] -> (logp, entropy, lse), each f32 [T]. Where the target is IGNORE, logp is 0 and
    passes no gradient on; entropy and lse are defined there as elsewhere.
    """
    log_p, lse = _log_softmax(h, w, temperature)
    scored = target != IGNORE
    picked = log_p.gather(1, torch.where(scored, target, 0)[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    return torch.where(scored, picked, 0.0), entropy, lse[:, 0].clone()


@op(
    shapes={
        "grad_logp": "T",
        "grad_entropy": "T",
        "grad_lse": "T",
        "h": "T D",
        "w": "V D",
        "target": "T",
        "entropy": "T",
        "lse": "T",
    },
    tolerance=(Near(1e-5, 5e-3), Near(1e-5, 5e-3)),
    cost=lambda *args: (6 * args[3].shape[0] * args[4].numel(), 2 * args[3].nbytes + 3 * args[4].nbytes),
)
def linear_cross_entropy_backward(
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
    """Gradients of h and w; grad_* f32 [T] or None for zeros; entropy and lse as returned. Recomputes the logits."""
    real = torch.promote_types(h.dtype, torch.float32)
    log_p = h.to(real) @ w.to(real).T / temperature - lse[:, None]
    p = log_p.exp()
    of_logits = torch.zeros_like(p)
    if grad_lse is not None:
        of_logits = of_logits + grad_lse[:, None] * p
    if grad_entropy is not None:
        of_logits = of_logits - grad_entropy[:, None] * p * (log_p + entropy[:, None])
    if grad_logp is not None:
        scored = target != IGNORE
        grad = torch.where(scored, grad_logp, 0.0)[:, None]
        of_logits = of_logits - grad * p
        of_logits = of_logits.scatter_add(1, torch.where(scored, target, 0)[:, None], grad.to(p.dtype))
    of_logits = of_logits / temperature
    return (of_logits @ w.to(real)).to(h.dtype), (of_logits.T @ h.to(real)).to(w.dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    h, w, target, ctx.temperature = inputs
    ctx.save_for_backward(h, w, target, *output[1:])
    ctx.set_materialize_grads(False)  # most losses use one of the three; the entropy's gradient costs two passes


@linear_cross_entropy.backward(_keep)
def _(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    h, w, target, entropy, lse = ctx.saved_tensors
    return *linear_cross_entropy_backward(*grads, h, w, target, ctx.temperature, entropy, lse), None, None


# At most 2**25 logits (128 MiB) are kept between forward and backward; more are computed twice, chunk by chunk.
KEPT_LOGITS = 2**25


def token_logp(h: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """log p of the targets alone, [T] f32: linear_cross_entropy without entropy and log-sum-exp, which pre-training has
    no use for, and without computing small logits twice. h [T, D], w [V, D], target i64 [T] (-100: 0, no gradient).
    """
    if h.shape[0] * w.shape[0] > KEPT_LOGITS:
        return linear_cross_entropy(h, w, target, 1.0)[0]
    return -torch.nn.functional.cross_entropy(gemm(h, w).float(), target, reduction="none")
