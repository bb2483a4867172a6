"""Sampling, a request at a time: how a batch is filtered depends on whether one of its requests asks for it."""

import torch
from torch import Tensor

from ...ops.sampling import sample, spec_verify, verify
from ..cpu.sampling import sample_torch
from . import NAME


def _is_f32(logits: Tensor, *rest: Tensor) -> bool:
    return logits.dtype == torch.float32


@sample.kernel(NAME, "rows", supports=_is_f32, checked="hardware")
def sample_rows(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    columns = (temperature, top_k, top_p, min_p, seed, position)
    results = [
        sample_torch(logits[row : row + 1].clone(), *(column[row : row + 1] for column in columns))
        for row in range(len(logits))
    ]
    tokens, logprobs = zip(*results, strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


@spec_verify.kernel(NAME, "rows", supports=lambda draft, logits, *rest: _is_f32(logits), checked="hardware")
def spec_verify_rows(draft: Tensor, logits: Tensor, *options: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return verify(sample_rows, draft, logits, *options)
