"""How far a student's next-token distribution is from the teacher's, token by token, over the whole vocabulary.

Logits of a batch are large (16,384 tokens x 129,280 entries in float32 are 8 GB), so both models' are computed from
their hidden states a few tokens at a time, and once more in backward.

    KL(P || Q)                                                          beta = 0: forward, covers the teacher's modes
    beta KL(P || M) + (1 - beta) KL(Q || M),  M = beta P + (1 - beta) Q   0 < beta < 1: generalised Jensen-Shannon
    KL(Q || P)                                                          beta = 1: reverse, seeks one of them

P is the teacher, Q the student (Agarwal et al. 2024, "On-policy distillation of language models", section 3).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

KEPT_LOGITS = 2**24  # of each model at a time; 64 MiB


def divergence(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    beta: float,
    kept_logits: int = KEPT_LOGITS,
) -> Tensor:
    """student_hidden [T, D], student_head [V, D], teacher_hidden [T, E], teacher_head [V, E] -> [T] f32, in nats.

    Differentiable by the student's two; beta in [0, 1] as in the module's docstring.
    """

    def of(student: Tensor, head: Tensor, teacher: Tensor) -> Tensor:
        with torch.no_grad():
            log_p = torch.log_softmax(_logits(teacher, teacher_head), -1)
        return pointwise(log_p, torch.log_softmax(_logits(student, head), -1), beta).sum(-1)

    return _in_chunks(of, kept_logits, student_head, student_hidden, teacher_hidden)


def pointwise(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """The summands of the divergence between distributions over the last dimension."""
    if beta == 0:
        return log_p.exp() * (log_p - log_q)
    if beta == 1:
        return log_q.exp() * (log_q - log_p)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)


def top_k(hidden: Tensor, head: Tensor, k: int, kept_logits: int = KEPT_LOGITS) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens: hidden [T, D], head [V, D] -> ids i32 [T, k], their log-probabilities f32 [T, k]."""
    k = min(k, head.shape[0])
    ids, values = list[Tensor](), list[Tensor]()
    with torch.no_grad():
        for rows in hidden.split(max(1, kept_logits // head.shape[0])):
            found = torch.log_softmax(_logits(rows, head), -1).topk(k)
            ids.append(found.indices.to(torch.int32))
            values.append(found.values)
    return torch.cat(ids), torch.cat(values)


def top_k_divergence(
    hidden: Tensor, head: Tensor, ids: Tensor, log_p: Tensor, kept_logits: int = KEPT_LOGITS
) -> Tensor:
    """KL(P || Q) where of P only the k likeliest tokens are known; all others are one outcome.

    hidden [T, D] and head [V, D] are the student's, ids i32 [T, k] and log_p f32 [T, k] the teacher's -> [T] f32.
    It is at most the KL over the whole vocabulary, and that itself where k = V.
    """

    def of(student: Tensor, weight: Tensor, places: Tensor, known: Tensor) -> Tensor:
        logits = _logits(student, weight)
        lse = torch.logsumexp(logits, -1, keepdim=True)
        log_q = logits.gather(1, places) - lse
        total = (known.exp() * (known - log_q)).sum(-1)
        if places.shape[1] == weight.shape[0]:
            return total
        # The others' share of Q from their own logits: 1 - sum(q) would cancel to nothing where Q is sure.
        others = torch.logsumexp(logits.scatter(1, places, -math.inf), -1) - lse[:, 0]
        rest = (1 - known.exp().sum(-1)).clamp_min(0)
        return total + torch.xlogy(rest, rest) - rest * others

    return _in_chunks(of, kept_logits, head, hidden, ids.long(), log_p)


def _logits(hidden: Tensor, head: Tensor) -> Tensor:
    real = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.to(real) @ head.to(real).T


def _in_chunks(of: Callable[..., Tensor], kept_logits: int, head: Tensor, first: Tensor, *others: Tensor) -> Tensor:
    """`of(rows of first, head, rows of others...)` for so many rows at a time, recomputed in backward."""
    size = max(1, kept_logits // head.shape[0])
    if first.shape[0] <= size:
        return of(first, head, *others)
    parts = []
    for start in range(0, first.shape[0], size):
        rows = slice(start, start + size)
        parts.append(checkpoint(of, first[rows], head, *(other[rows] for other in others), use_reentrant=False))
    return torch.cat(parts)
