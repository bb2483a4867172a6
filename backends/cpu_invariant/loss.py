"""Log-probabilities of given tokens, each as if it were alone."""

import torch
from torch import Tensor

from ...ops.loss import IGNORE, linear_cross_entropy
from . import NAME
from .elementwise import exp, row_sum
from .products import product

ROWS_AT_ONCE = 128  # of logits in memory; a height of `tiles`


@linear_cross_entropy.kernel(NAME, "tiles", checked="hardware")
def linear_cross_entropy_tiles(
    h: Tensor, w: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    real = torch.promote_types(h.dtype, torch.float32)
    parts = [
        _scored(product(rows.to(real) / temperature, w), chosen)
        for rows, chosen in zip(h.split(ROWS_AT_ONCE), target.split(ROWS_AT_ONCE), strict=True)
    ]
    logp, entropy, lse = (torch.cat(column) for column in zip(*parts, strict=True))
    return logp, entropy, lse


def _scored(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logits [T, V], target i64 [T] -> log-probability, entropy, log-sum-exp, each [T]."""
    log_p = logits.log_softmax(-1)
    picked = log_p.gather(1, target.clamp_min(0)[:, None])[:, 0]
    entropy = row_sum(exp(log_p) * log_p)[:, 0].neg_()
    return picked.masked_fill_(target == IGNORE, 0.0), entropy, logits[:, 0] - log_p[:, 0]
