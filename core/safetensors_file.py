"""The safetensors file: u64 length of a JSON header, the header, then the bytes of the tensors.

Read and written here instead of by the safetensors package, for three reasons: a tensor is read straight into the
    memory where it stays (no mapped pages beside it, and a truncated file is an error, not a bus error), tensors are
    written one at a time as they are produced, and everything that can be wrong with a file is said in one line. The
    package reads what is written here, and the other way round.
"""

import json
import math
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # the limit of the safetensors package
WRITE_AT_ONCE = 1 << 30  # Linux moves at most 2 GiB a call


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor, or a piece of one, lies: `offset` bytes into the file.

    pitch: bytes from a row to the next, where a row is not the whole of the stored one; None where all bytes are
        neighbours.
    """

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    pitch: int | None = None

    def narrow(self, dim: int, start: int, length: int) -> "StoredTensor":
        """Rows (dim 0) or, of a matrix, columns (dim 1) `start` to `start + length`. Of one that was not cut before."""
        assert self.pitch is None and dim < len(self.shape) and start + length <= self.shape[dim]
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        shape = (*self.shape[:dim], length, *self.shape[dim + 1 :])
        if dim == 0:
            return replace(self, shape=shape, offset=self.offset + start * row)
        assert len(self.shape) == 2
        return replace(self, shape=shape, offset=self.offset + start * self.dtype.itemsize, pitch=row)

    def read(self, out: Tensor | None = None) -> Tensor:
        """The tensor, read into `out` (contiguous, on the CPU, of this shape and dtype) or into new memory."""
        if out is None:
            out = torch.empty(self.shape, dtype=self.dtype)
        everything = _bytes(out)
        run = len(everything) if self.pitch is None else self.shape[1] * self.dtype.itemsize
        with open(self.path, "rb", buffering=0) as file:
            for index, begin in enumerate(range(0, len(everything), run or 1)):
                file.seek(self.offset + index * (self.pitch or 0))
                left = everything[begin : begin + run]
                while left:
                    count = file.readinto(left)
                    if not count:
                        raise UserError(f"{self.path}: truncated in tensor {self.name}; fetch the file again")
                    left = left[count:]
        return out


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of a file. Errors: UserError in one line for a file that is damaged, cut short or not of this
    format."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if start == b"version ":
            raise UserError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in its repository")
        if size < 8:
            raise UserError(f"{path}: truncated: {size} bytes; fetch the file again")
        if not 2 <= length <= MAX_HEADER:
            raise UserError(f"{path}: not a safetensors file (header of {length} bytes)")
        if size < 8 + length:
            raise UserError(f"{path}: truncated: the header alone needs {8 + length} bytes, the file has {size}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        tensors = [_stored(path, 8 + length, n, entry) for n, entry in header.items() if n != "__metadata__"]
        ends = [end for tensor, end in tensors]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: damaged safetensors header ({error}); fetch the file again") from None
    end = max(ends, default=8 + length)
    if end != size:
        what = "truncated" if size < end else "damaged"
        raise UserError(f"{path}: {what}: the header promises {end} bytes, the file has {size}; fetch the file again")
    return [tensor for tensor, _ in tensors]


def _stored(path: Path, base: int, name: str, entry: dict[str, Any]) -> tuple[StoredTensor, int]:
    if entry["dtype"] not in DTYPES:
        raise UserError(f"{path}: tensor {name} has the dtype {entry['dtype']!r}; known are {', '.join(DTYPES)}")
    dtype, shape = DTYPES[entry["dtype"]], tuple(int(size) for size in entry["shape"])
    begin, end = entry["data_offsets"]
    if min(shape, default=0) < 0 or begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {name} of shape {list(shape)} cannot lie in bytes {begin} to {end}")
    return StoredTensor(name, path, dtype, shape, base + begin), base + end


class ShardWriter:
    """Writes one file whose tensors are known by name, dtype and shape beforehand, and come in any order."""

    def __init__(self, path: Path, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offsets, position = {}, 0
        # Wide elements first, so that every tensor is aligned for readers that map the file.
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
            end = position + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
            offsets[name], position = position, end
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        self._offsets = {name: 8 + len(raw) + offset for name, offset in offsets.items()}
        self._tensors = tensors
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by close
        self._put(struct.pack("<Q", len(raw)) + raw, 0)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor, contiguous and on the CPU, in its place."""
        assert (tensor.dtype, tuple(tensor.shape)) == self._tensors[name], name
        self._put(_bytes(tensor), self._offsets[name])

    def close(self) -> None:
        self._file.close()

    def _put(self, data: bytes | memoryview, offset: int) -> None:
        left = memoryview(data)
        while left:
            count = os.pwrite(self._file.fileno(), left[:WRITE_AT_ONCE], offset)
            left, offset = left[count:], offset + count


def _bytes(tensor: Tensor) -> memoryview:
    if not tensor.numel():  # memoryview cannot cast these
        return memoryview(b"")
    return tensor.detach().view(-1).view(torch.uint8).numpy().data
