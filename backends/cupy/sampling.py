"""Sampling in CUDA C++: a block per request, filters by a radix search instead of a sort."""

import torch
from torch import Tensor

from ...ops.sampling import sample
from . import PRIORITY
from .module import available, launch

THREADS = 512


def _takes(logits: Tensor, *rest: Tensor) -> bool:
    return logits.dtype == torch.float32


@sample.kernel("cuda", "cupy", priority=PRIORITY, available=available, supports=_takes, checked="emulated")
@sample.kernel("rocm", "cupy", priority=PRIORITY, available=available, supports=_takes, checked="compiled")
def sample_cupy(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    B, V = logits.shape
    token, logprob = seed.new_empty(B), logits.new_empty(B)
    options = [values.contiguous() for values in (temperature, top_k, top_p, min_p, seed, position)]
    launch(
        "sampling.cu", "sample_kernel", (B,), (THREADS,), logits.contiguous(), *options, token, logprob, V,
        THREADS=THREADS,
    )  # fmt: skip
    return token, logprob
