"""Routing and the sum over a token's experts, each token as if it were alone."""

import torch
from torch import Tensor

from ...ops.moe import route, unpermute
from ..cpu.moe import choose, unpermute_bag
from . import NAME
from .elementwise import sigmoid


@route.kernel(NAME, "rows", supports=lambda logits, *rest: logits.dtype == torch.float32, checked="hardware")
def route_rows(
    logits: Tensor,
    bias: Tensor | None,
    k: int,
    groups: int,
    topk_groups: int,
    score_func: str,
    group_score: str,
    renormalize: bool,
    scale: float,
    forced_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    scores = logits.softmax(-1) if score_func == "softmax" else sigmoid(logits)
    return choose(scores, bias, k, groups, topk_groups, group_score, renormalize, scale, forced_idx)


@unpermute.kernel(NAME, "embedding_bag", supports=lambda y, *rest: y.dtype.itemsize <= 4, checked="hardware")
def unpermute_rows(y: Tensor, row_map: Tensor, w: Tensor | None) -> Tensor:
    """A bag of embeddings sums the rows of each token in its own order, with one code for all tokens."""
    return unpermute_bag(y.float(), row_map, w).to(y.dtype)
