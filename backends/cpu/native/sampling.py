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


@sample.kernel("cpu", "native", priority=20, available=built, supports=_sample_applies)
def _sample(logits: Tensor, *options: Tensor) -> tuple[Tensor, Tensor]:
    (rows, vocabulary), addresses = logits.shape, [option.data_ptr() for option in options]
    token, logprob = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    done = extension.sample(
        logits.data_ptr(), logits.stride(0), *addresses, token.data_ptr(), logprob.data_ptr(), rows, vocabulary
    )
    return (token, logprob) if done else sample_torch(logits, *options)


def _verify_applies(draft: Tensor, logits: Tensor, *options: Tensor) -> bool:
    whole = is_real(logits) and logits.dim() == 3 and logits.is_contiguous() and logits.shape[2] > 0
    return whole and _options_fit(len(logits), options)


@spec_verify.kernel("cpu", "native", priority=20, available=built, supports=_verify_applies)
def _spec_verify(draft: Tensor, logits: Tensor, *options: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return verify(_sample, draft, logits, *options)
