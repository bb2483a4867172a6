"""Sampling without filters, and the verification of drafts by it. Rows with filters are PyTorch's and numpy's."""

import torch
from torch import Tensor

from ....ops.sampling import sample, spec_verify, verify
from ..sampling import sample_torch
from . import built, extension, is_real

DTYPES = (torch.float32, torch.int32, torch.float32, torch.float32, torch.int64, torch.int64)


def _options_fit(rows: int, options: tuple[Tensor, ...]) -> bool:
    return all(
        option.dtype is dtype and option.shape == (rows,) and option.is_contiguous()
        for option, dtype in zip(options, DTYPES, strict=True)
    )


def _sample_applies(logits: Tensor, *options: Tensor) -> bool:
    if not is_real(logits) or logits.dim() != 2 or logits.shape[1] == 0 or logits.stride(1) != 1:
        return False
    return _options_fit(len(logits), options)


def _drawn(logits: Tensor, per_request: int, options: tuple[Tensor, ...]) -> tuple[Tensor, Tensor] | None:
    """logits [B * per_request, V] -> tokens and logprobs [B * per_request]; None where some request has filters."""
    (rows, vocabulary), addresses = logits.shape, [option.data_ptr() for option in options]
    token, logprob = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    done = extension.sample(
        logits.data_ptr(), logits.stride(0), *addresses, token.data_ptr(), logprob.data_ptr(), rows // per_request,
        per_request, vocabulary,
    )  # fmt: skip
    return (token, logprob) if done else None


@sample.kernel("cpu", "native", priority=20, available=built, supports=_sample_applies)
def _sample(logits: Tensor, *options: Tensor) -> tuple[Tensor, Tensor]:
    drawn = _drawn(logits, 1, options)
    return sample_torch(logits, *options) if drawn is None else drawn


def _verify_applies(draft: Tensor, logits: Tensor, *options: Tensor) -> bool:
    if not is_real(logits) or logits.dim() != 3 or not logits.is_contiguous() or logits.shape[2] == 0:
        return False
    drafted = draft.dtype is torch.int64 and draft.is_contiguous() and draft.shape == (len(logits), logits.shape[1] - 1)
    return drafted and _options_fit(len(logits), options)


@spec_verify.kernel("cpu", "native", priority=20, available=built, supports=_verify_applies)
def _spec_verify(draft: Tensor, logits: Tensor, *options: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, K = draft.shape
    drawn = _drawn(logits.flatten(0, 1), K + 1, options)
    if drawn is None:
        return verify(sample_torch, draft, logits, *options)
    token, logprob = (values.view(B, K + 1) for values in drawn)
    accepted = torch.empty(B, dtype=torch.int32)
    addresses = draft.data_ptr(), token.data_ptr(), logprob.data_ptr(), accepted.data_ptr()
    extension.accept(*addresses, B, K)
    return accepted, token, logprob
