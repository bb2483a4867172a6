"""Routing of a few tokens, and moving them to their experts and back."""

import torch
from torch import Tensor

from ....ops.moe import permute, permuted_rows, route, unpermute
from . import SMALL, are_small, built, extension, is_real


def _route_applies(
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
) -> bool:
    if forced_idx is not None or logits.dim() != 2 or not are_small(logits):
        return False
    experts = logits.shape[1]
    if bias is not None and (bias.shape != (experts,) or not are_small(bias)):
        return False
    return experts % groups == 0 and k <= min(topk_groups, groups) * (experts // groups)


@route.kernel("cpu", "native", priority=20, available=built, supports=_route_applies)
def _route(
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
    idx, weights = torch.empty(T, k, dtype=torch.int32), torch.empty(T, k)
    extension.route(
        logits.data_ptr(), 0 if bias is None else bias.data_ptr(), idx.data_ptr(), weights.data_ptr(), T, E, k, groups,
        topk_groups, score_func == "softmax", group_score == "top2", renormalize, scale,
    )  # fmt: skip
    return idx, weights


def _is_index(index: Tensor) -> bool:
    return index.dtype is torch.int32 and index.dim() == 2 and index.is_contiguous()


def _permute_applies(x: Tensor, idx: Tensor, num_experts: int, align: int) -> bool:
    return (
        is_real(x)
        and x.dim() == 2
        and x.is_contiguous()
        and _is_index(idx)
        and len(x) == len(idx)
        and permuted_rows(idx.numel(), num_experts, align) * x.shape[1] <= SMALL
    )


@permute.kernel("cpu", "native", priority=20, available=built, supports=_permute_applies)
def _permute(x: Tensor, idx: Tensor, num_experts: int, align: int) -> tuple[Tensor, Tensor, Tensor]:
    (T, k), width, rows = idx.shape, x.shape[1], permuted_rows(idx.numel(), num_experts, align)
    out, row_map = torch.empty(rows, width), torch.empty_like(idx)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32)
    addresses = x.data_ptr(), idx.data_ptr(), out.data_ptr(), row_map.data_ptr(), offsets.data_ptr()
    extension.permute(*addresses, T, k, width, num_experts, align, rows)
    return out, row_map, offsets


def _unpermute_applies(y: Tensor, row_map: Tensor, w: Tensor | None) -> bool:
    if w is not None and (w.shape != row_map.shape or not are_small(w)):
        return False
    return y.dim() == 2 and are_small(y) and _is_index(row_map) and row_map.shape[1] > 0


@unpermute.kernel("cpu", "native", priority=20, available=built, supports=_unpermute_applies)
def _unpermute(y: Tensor, row_map: Tensor, w: Tensor | None) -> Tensor:
    (T, k), (rows, width) = row_map.shape, y.shape
    out = torch.empty(T, width)
    weights = 0 if w is None else w.data_ptr()
    extension.unpermute(y.data_ptr(), row_map.data_ptr(), weights, out.data_ptr(), T, k, width, rows)
    return out
