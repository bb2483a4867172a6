"""What the ranks that serve one engine tell each other: rank 0 drives, the others follow.

A message is a word and named CPU tensors of any shapes; no pickle. It is one broadcast where it is small, as the
tensors of a decoding step are, and two else. A rank that is gone or silent is an error on the others within the
timeout: the driver gives signs of life while it has nothing to do (`beat`), so that followers may wait for work as long
as it takes.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

FIRST = 8192  # bytes of the part of a message that is always sent
ALIGN = 16  # of a tensor within a message: views need their dtype's
BEAT = "beat"
Message = tuple[str, dict[str, Tensor]]


class PeerLost(RuntimeError):
    """Another process of the group is gone, or has been silent for too long; this one cannot go on without it."""


class Channel:
    """The driver's line to all ranks of the world. Every rank must open it, and call its methods in the same order."""

    def __init__(self, timeout: timedelta = timedelta(seconds=60)):
        """timeout: how long a silence is a loss."""
        self.timeout = timeout
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._last = time.monotonic()

    def send(self, kind: str, tensors: Mapping[str, Tensor] | None = None) -> None:
        """From the driver to everyone."""
        assert self.rank == 0
        data = _packed(kind, tensors or {})
        with self._watched("a follower"):
            dist.broadcast(data[:FIRST], 0, self._group)
            if len(data) > FIRST:
                dist.broadcast(data[FIRST:], 0, self._group)
        self._last = time.monotonic()

    def beat(self) -> None:
        """Say that the driver lives, if it said nothing for a quarter of the timeout. Call it often while idle."""
        if time.monotonic() - self._last > self.timeout.total_seconds() / 4:
            self.send(BEAT)

    def receive(self) -> Message:
        """The driver's next message, on every other rank; waits while there are signs of life."""
        while True:
            with self._watched("the driver"):
                first = torch.empty(FIRST, dtype=torch.uint8)
                dist.broadcast(first, 0, self._group)
                data = _room_for(first)
                if len(data) > FIRST:
                    dist.broadcast(data[FIRST:], 0, self._group)
            kind, tensors = _unpacked(data)
            if kind != BEAT:
                return kind, tensors

    def gather(self, tensors: Mapping[str, Tensor] | None, senders: Sequence[int]) -> list[dict[str, Tensor]]:
        """From the `senders` to the driver -> their tensors, in that order; [] on every other rank.

        tensors: of a sender; None elsewhere. Shapes may differ.
        """
        if self.rank != 0:
            if self.rank in senders:
                data = _packed("", tensors or {})
                with self._watched("the driver"):
                    dist.send(data[:FIRST], 0, self._group)
                    if len(data) > FIRST:
                        dist.send(data[FIRST:], 0, self._group)
            return []
        return [dict(tensors or {}) if sender == 0 else self._from(sender) for sender in senders]

    def barrier(self) -> None:
        """Wait for all ranks, no longer than the timeout."""
        with self._watched("another rank"):
            dist.monitored_barrier(self._group, self.timeout, wait_all_ranks=True)

    def _from(self, sender: int) -> dict[str, Tensor]:
        with self._watched(f"rank {sender}"):
            first = torch.empty(FIRST, dtype=torch.uint8)
            dist.recv(first, sender, self._group)
            data = _room_for(first)
            if len(data) > FIRST:
                dist.recv(data[FIRST:], sender, self._group)
        return _unpacked(data)[1]

    @contextmanager
    def _watched(self, whom: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            seconds = self.timeout.total_seconds()
            text = f"rank {self.rank}: {whom} is gone, or silent for {seconds:g} s ({str(error).splitlines()[0]})"
            raise PeerLost(text) from error


def _packed(kind: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Lengths of message and header (i64), header (JSON), the tensors' bytes, each aligned; at least FIRST bytes."""
    entries, pieces, end = [], [], 0
    for name, tensor in tensors.items():
        # A copy: tensors of no or one element may have strides that no view takes.
        raw = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1)).view(torch.uint8)
        entries.append((name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), end))
        pieces.append((end, raw))
        end = _aligned(end + len(raw))
    header = json.dumps([kind, entries]).encode()
    base = _aligned(16 + len(header))
    data = torch.empty(max(base + end, FIRST), dtype=torch.uint8)
    data[:16] = torch.tensor([base + end, len(header)]).view(torch.uint8)
    data[16 : 16 + len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    for begin, raw in pieces:
        data[base + begin : base + begin + len(raw)] = raw
    return data


def _room_for(first: Tensor) -> Tensor:
    """The message whose first part this is, with room for the rest."""
    size = int(first[:8].view(torch.int64))
    if size <= FIRST:
        return first
    data = torch.empty(size, dtype=torch.uint8)
    data[:FIRST] = first
    return data


def _unpacked(data: Tensor) -> Message:
    """The tensors are views of `data`."""
    length = int(data[8:16].view(torch.int64))
    kind, entries = json.loads(bytes(data[16 : 16 + length].numpy()))
    base, tensors = _aligned(16 + length), {}
    for name, spelled, shape, begin in entries:
        dtype = getattr(torch, spelled)
        size = math.prod(shape) * dtype.itemsize
        tensors[name] = data[base + begin : base + begin + size].view(dtype).view(shape)
    return kind, tensors


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN
