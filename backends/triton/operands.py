"""What launchers ask of tensors before they hand them to kernels."""

import torch
from torch import Tensor

REAL = (torch.float32, torch.bfloat16, torch.float16)  # what kernels compute with, in float32 each


def is_real(*tensors: Tensor | None) -> bool:
    """Are these of such a dtype, or None?"""
    return all(x is None or x.dtype in REAL for x in tensors)


def by_rows(x: Tensor) -> Tensor:
    """x with its last dimension contiguous; itself where it is, halves of a larger tensor too."""
    return x if x.stride(-1) == 1 else x.contiguous()


def as_rows(x: Tensor) -> Tensor:
    """x [..., D] as [N, D] with adjacent columns; a view where strides allow."""
    return by_rows(x.reshape(-1, x.shape[-1]))
