"""Routing in CUDA C++: a warp per token, everything in registers and in a few KiB of shared memory."""

from typing import Any

import torch
from torch import Tensor

from ...ops.moe import route
from . import PRIORITY
from .module import available, launch

WARPS = 4
MOST = 32  # choices and groups: a lane each


def _takes(logits: Tensor, bias: Tensor | None, k: int, groups: int, topk_groups: int, *rest: Any) -> bool:
    fits = max(k, groups) <= MOST and logits.shape[1] <= 1024
    return logits.dtype == torch.float32 and (bias is None or bias.dtype == torch.float32) and fits


@route.kernel("cuda", "cupy", priority=PRIORITY, available=available, supports=_takes, checked="emulated")
@route.kernel("rocm", "cupy", priority=PRIORITY, available=available, supports=_takes, checked="compiled")
def route_cupy(
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
    T, E = logits.shape
    idx = logits.new_empty(T, k, dtype=torch.int32)
    weights = logits.new_empty(T, k)
    forced = None if forced_idx is None else forced_idx.contiguous()
    launch(
        "routing.cu", "route_kernel", (-(-T // WARPS),), (32 * WARPS,), logits.contiguous(),
        bias, forced, idx, weights, T, float(scale), EXPERTS=E, GROUPS=groups, KEPT=topk_groups, CHOICES=k,
        SOFTMAX=int(score_func == "softmax"), GROUP_MAX=int(group_score == "max"), RENORMALIZE=int(renormalize),
        WARPS=WARPS,
    )  # fmt: skip
    return idx, weights
