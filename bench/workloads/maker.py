"""How the workloads of an op are declared, and the tensors that they are made of.

A workload makes its arguments on any device, the meta device included. Sizes: DeepSeek-V3's hidden size 7168, 128
heads, 512 + 64 numbers of latent, 256 experts of 2048 of which 8 are chosen, a vocabulary of 129,280.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ops.formats import FP8_MAX, num_blocks
from ...ops.fp8 import m_major

HIDDEN, INNER, VOCABULARY, EXPERTS, CHOSEN = 7168, 2048, 129_280, 256, 8
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Workload:
    """One call of an op. make: (generator of tensors, FP8 format) -> arguments."""

    op: str
    name: str
    make: Callable[["Maker"], tuple[Any, ...]]


@dataclass(frozen=True)
class Maker:
    """Makes tensors on a device; on the meta device only shapes."""

    device: str
    fp8: torch.dtype

    def real(self, *shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=self.device) * scale).to(dtype)

    def values(self, *shape: int) -> Tensor:
        return self.real(*shape, scale=FP8_MAX[self.fp8] / 4).to(self.fp8)

    def tiles(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """FP8 values [rows, columns] and their M-major scales."""
        return self.values(rows, columns), m_major(torch.rand(rows, num_blocks(columns), device=self.device) + 0.5)

    def blocks(self, *shape: int) -> tuple[Tensor, Tensor]:
        """FP8 values [..., N, K] and the scales of their blocks."""
        *experts, N, K = shape
        return self.values(*shape), torch.rand(*experts, num_blocks(N), num_blocks(K), device=self.device) + 0.5


WORKLOADS: dict[str, list[Workload]] = {}


def workload(op: str, name: str) -> Callable[[Callable[[Maker], tuple[Any, ...]]], Callable[[Maker], tuple[Any, ...]]]:
    """Register the decorated maker of arguments; the first of an op is the one that `make test` compiles."""

    def register(make: Callable[[Maker], tuple[Any, ...]]) -> Callable[[Maker], tuple[Any, ...]]:
        WORKLOADS.setdefault(op, []).append(Workload(op, name, make))
        return make

    return register
