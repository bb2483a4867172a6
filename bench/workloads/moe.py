"""Routing, and moving tokens to their experts and back."""

from typing import Any

import torch
from torch import Tensor

from ...ops.moe import destinations, permuted_rows
from .maker import CHOSEN, EXPERTS, HIDDEN, Maker, workload

TRAINING, DECODING = 4096, 64  # tokens
ALIGNED = 128
V3 = 8, 4, "sigmoid", "top2", True, 2.5  # groups, kept ones, scores, ...
V2 = 8, 3, "softmax", "max", False, 16.0  # of 160 experts, of which 6 are chosen


def _logits(make: Maker, tokens: int, experts: int = EXPERTS) -> Tensor:
    return make.real(tokens, experts, dtype=torch.float32)


def _choice(make: Maker, tokens: int, experts: int = EXPERTS, k: int = CHOSEN) -> Tensor:
    return torch.rand(tokens, experts, device=make.device).topk(k).indices.int()


def _rows(make: Maker, tokens: int, align: int) -> tuple[int, Tensor, Tensor]:
    """-> how many permuted rows there are, row_map i32 [T, k], weights f32 [T, k]."""
    idx = _choice(make, tokens)
    order, target, _ = destinations(idx, EXPERTS, align)
    row_map = torch.empty_like(target).scatter(0, order, target).view(idx.shape).int()
    return permuted_rows(idx.numel(), EXPERTS, align), row_map, make.real(*idx.shape, dtype=torch.float32)


@workload("route", "4096 of 256 experts")
def _(make: Maker) -> tuple[Any, ...]:
    return _logits(make, TRAINING), make.real(EXPERTS, dtype=torch.float32), CHOSEN, *V3


@workload("route", "64 of 256 experts")
def _(make: Maker) -> tuple[Any, ...]:
    return _logits(make, DECODING), make.real(EXPERTS, dtype=torch.float32), CHOSEN, *V3


@workload("route", "4096 of 256 experts, forced")
def _(make: Maker) -> tuple[Any, ...]:
    bias = make.real(EXPERTS, dtype=torch.float32)
    return _logits(make, TRAINING), bias, CHOSEN, *V3, _choice(make, TRAINING)


@workload("route", "4096 of 160 experts, softmax")
def _(make: Maker) -> tuple[Any, ...]:
    return _logits(make, TRAINING, 160), None, 6, *V2


@workload("route_backward", "4096 of 256 experts")
def _(make: Maker) -> tuple[Any, ...]:
    grad = make.real(TRAINING, CHOSEN, dtype=torch.float32)
    return grad, _logits(make, TRAINING), _choice(make, TRAINING), "sigmoid", True, 2.5


@workload("route_backward", "4096 of 160 experts, softmax")
def _(make: Maker) -> tuple[Any, ...]:
    grad = make.real(TRAINING, 6, dtype=torch.float32)
    return grad, _logits(make, TRAINING, 160), _choice(make, TRAINING, 160, 6), "softmax", False, 16.0


@workload("expert_count", "4096 of 256 experts")
def _(make: Maker) -> tuple[Any, ...]:
    return _choice(make, TRAINING), EXPERTS


@workload("expert_count", "64 of 256 experts")
def _(make: Maker) -> tuple[Any, ...]:
    return _choice(make, DECODING), EXPERTS


@workload("permute", "4096 x 7168, aligned")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(TRAINING, HIDDEN), _choice(make, TRAINING), EXPERTS, ALIGNED


@workload("permute", "4096 x 7168")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(TRAINING, HIDDEN), _choice(make, TRAINING), EXPERTS, 1


@workload("permute", "64 x 7168")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(DECODING, HIDDEN), _choice(make, DECODING), EXPERTS, 1


@workload("permute_quantize", "4096 x 7168, aligned")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(TRAINING, HIDDEN), _choice(make, TRAINING), EXPERTS, ALIGNED, make.fp8, False


@workload("permute_quantize", "64 x 7168, power-of-two scales")
def _(make: Maker) -> tuple[Any, ...]:
    return make.real(DECODING, HIDDEN), _choice(make, DECODING), EXPERTS, 1, make.fp8, True


@workload("unpermute", "4096 x 7168, weighted")
def _(make: Maker) -> tuple[Any, ...]:
    rows, row_map, w = _rows(make, TRAINING, ALIGNED)
    return make.real(rows, HIDDEN), row_map, w


@workload("unpermute", "64 x 7168, weighted")
def _(make: Maker) -> tuple[Any, ...]:
    rows, row_map, w = _rows(make, DECODING, 1)
    return make.real(rows, HIDDEN), row_map, w


@workload("unpermute", "4096 x 7168, the gradient of permute")
def _(make: Maker) -> tuple[Any, ...]:
    rows, row_map, _ = _rows(make, TRAINING, ALIGNED)
    return make.real(rows, HIDDEN), row_map, None


@workload("unpermute_backward", "4096 x 7168, aligned")
def _(make: Maker) -> tuple[Any, ...]:
    rows, row_map, w = _rows(make, TRAINING, ALIGNED)
    return make.real(TRAINING, HIDDEN), row_map, w, rows


@workload("unpermute_backward", "4096 x 7168")
def _(make: Maker) -> tuple[Any, ...]:
    rows, row_map, w = _rows(make, TRAINING, 1)
    return make.real(TRAINING, HIDDEN), row_map, w, rows


@workload("unpermute_backward_w", "4096 x 7168")
def _(make: Maker) -> tuple[Any, ...]:
    rows, row_map, _ = _rows(make, TRAINING, ALIGNED)
    return make.real(TRAINING, HIDDEN), make.real(rows, HIDDEN), row_map
