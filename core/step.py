"""What one forward pass is about: which tokens, where they stand, what they may look at, and what the gates decide."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .cache import CacheStep


@dataclass
class Routing:
    """What the gates of one pass chose, by layer; optionally told beforehand (`replay`).

    A layer's first record counts: activation recomputation runs a layer twice.

    replay: layer -> i32 [T, k], selections to use instead of the gate's own; gate values are still computed live.
    balance_sequences: cu_seqlens i32 [B+1] over which the sequence-wise balance loss is taken; None leaves it out.
    """

    replay: dict[int, Tensor] | None = None
    balance_sequences: Tensor | None = None
    experts: dict[int, Tensor] = field(default_factory=dict)  # layer -> i32 [T, k]
    counts: dict[int, Tensor] = field(default_factory=dict)  # layer -> tokens per expert [E]
    balance: dict[int, Tensor] = field(default_factory=dict)  # layer -> scalar


@dataclass
class Step:
    """The tokens of one pass, packed: T of them, of B sequences.

    positions: i64 [T]; cu_seqlens: i32 [B+1], where each sequence's new tokens begin; max_len: the longest run of them.
    rope_table: f32 [P, r]. cache: None where the pass sees all it attends to.
    """

    positions: Tensor
    cu_seqlens: Tensor
    max_len: int
    rope_table: Tensor
    cache: CacheStep | None = None
    routing: Routing | None = None


def packed(
    lengths: Sequence[int], starts: Sequence[int] | None = None, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, int]:
    """Positions i64 [T], cu_seqlens i32 [B+1] and the longest length of runs of new tokens that begin at `starts`."""
    counts = torch.tensor(lengths)
    cu_seqlens = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    offsets = -cu_seqlens[:-1] if starts is None else torch.tensor(starts) - cu_seqlens[:-1]
    positions = torch.arange(int(cu_seqlens[-1])) + offsets.repeat_interleave(counts)
    return positions.to(device), cu_seqlens.to(torch.int32).to(device), max(lengths)
