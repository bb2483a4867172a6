"""The head: its loss, sampling, and the verification of drafts."""

from typing import Any

import torch
from torch import Tensor

from .maker import BF16, HIDDEN, VOCABULARY, Maker, workload


def _loss(make: Maker, tokens: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Weights that make a distribution over some thousand tokens."""
    h, w = make.real(tokens, HIDDEN, dtype=dtype), make.real(VOCABULARY, HIDDEN, dtype=dtype, scale=0.02)
    return h, w, torch.randint(0, VOCABULARY, (tokens,), device=make.device), 1.0


def _statistics(make: Maker, tokens: int) -> tuple[Tensor, Tensor]:
    """Entropies and log-sum-exps of about what `_loss` makes."""
    return make.real(tokens, dtype=torch.float32) + 10.3, make.real(tokens, dtype=torch.float32, scale=0.1) + 13.2


@workload("linear_cross_entropy", "4096 tokens")
def _(make: Maker) -> tuple[Any, ...]:
    return _loss(make, 4096, BF16)


@workload("linear_cross_entropy", "512 tokens, float32")
def _(make: Maker) -> tuple[Any, ...]:
    return _loss(make, 512, torch.float32)


@workload("linear_cross_entropy_backward", "4096 tokens")
def _(make: Maker) -> tuple[Any, ...]:
    """Of the mean loss."""
    grad = torch.full((4096,), -1 / 4096, device=make.device)
    return grad, None, None, *_loss(make, 4096, BF16), *_statistics(make, 4096)


@workload("linear_cross_entropy_backward", "4096 tokens, all three")
def _(make: Maker) -> tuple[Any, ...]:
    """Of a policy gradient with bonuses."""
    grads = [make.real(4096, dtype=torch.float32, scale=1 / 4096) for _ in range(3)]
    return *grads, *_loss(make, 4096, BF16), *_statistics(make, 4096)


@workload("linear_cross_entropy_backward", "512 tokens, float32")
def _(make: Maker) -> tuple[Any, ...]:
    grad = torch.full((512,), -1 / 512, device=make.device)
    return grad, None, None, *_loss(make, 512, torch.float32), *_statistics(make, 512)


def _options(make: Maker, requests: int, top_k: int, top_p: float) -> tuple[Tensor, ...]:
    """Temperature 0.6, no min-p; seeds and positions that differ."""
    return (
        torch.full((requests,), 0.6, device=make.device),
        torch.full((requests,), top_k, dtype=torch.int32, device=make.device),
        torch.full((requests,), top_p, device=make.device),
        torch.zeros(requests, device=make.device),
        torch.arange(requests, device=make.device) * 7919,
        torch.arange(requests, device=make.device) + 1000,
    )


def _logits(make: Maker, *rows: int) -> Tensor:
    """A bell of unlikely tokens and a tail of a few hundred likely ones, as language models have."""
    logits = make.real(*rows, VOCABULARY, dtype=torch.float32, scale=2.5)
    logits[..., ::1024] += torch.rand(*rows, -(-VOCABULARY // 1024), device=make.device) * 12
    return logits


@workload("sample", "128 requests, top-p")
def _(make: Maker) -> tuple[Any, ...]:
    return _logits(make, 128), *_options(make, 128, 0, 0.95)


@workload("sample", "1 request, top-p")
def _(make: Maker) -> tuple[Any, ...]:
    return _logits(make, 1), *_options(make, 1, 0, 0.95)


@workload("sample", "128 requests, no filters")
def _(make: Maker) -> tuple[Any, ...]:
    return _logits(make, 128), *_options(make, 128, 0, 1.0)


@workload("sample", "128 requests, top-k and top-p")
def _(make: Maker) -> tuple[Any, ...]:
    return _logits(make, 128), *_options(make, 128, 50, 0.9)


@workload("spec_verify", "64 requests, 1 draft")
def _(make: Maker) -> tuple[Any, ...]:
    draft = torch.randint(0, VOCABULARY, (64, 1), device=make.device)
    return draft, _logits(make, 64, 2), *_options(make, 64, 0, 0.95)
