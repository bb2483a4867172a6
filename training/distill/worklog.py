"""Results that arrive one by one and must survive whatever ends the process: lines appended to JSON files.

A result is one line, written at once, under a key. Each process has a file of its own (NAME.jsonl, NAME.1.jsonl, ...)
and reads all of them, so that work goes on with another number of processes, and nothing is done twice. A line that a
kill tore is cut off when its file is opened for writing, and passed over by readers.
"""

import json
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ...core.files import NO_SPACE
from ...errors import UserError

SYNC_EVERY = 1.0  # seconds; a power cut costs no more than what came since

Key = tuple[Any, ...]
Place = tuple[Path, int, int]  # file, offset, length


class WorkLog:
    """The results under `directory`/`name`*.jsonl; a context manager for the one that adds to them.

    keys: the fields of a record that together are its key.
    """

    def __init__(self, directory: str | Path, name: str, keys: Sequence[str]) -> None:
        self.directory, self.name, self.keys = Path(directory), name, tuple(keys)
        self._file, self._synced = -1, 0.0

    def files(self) -> list[Path]:
        own = self.directory / f"{self.name}.jsonl"
        others = sorted(self.directory.glob(f"{self.name}.*.jsonl"))
        return [path for path in (own, *others) if path.exists()]

    def places(self) -> dict[Key, Place]:
        """Where each result stands: key -> place, in the order of files and lines; of two with one key, the first."""
        found: dict[Key, Place] = {}
        for path in self.files():
            offset = 0
            with open(path, "rb") as lines:
                for line in lines:
                    if (record := _parse(line)) is not None:
                        found.setdefault(self.key(record), (path, offset, len(line)))
                    offset += len(line)
        return found

    def read(self, places: Iterable[Place]) -> list[dict[str, Any]]:
        """The results at these places."""
        records = []
        with ExitStack() as stack:
            files: dict[Path, IO[bytes]] = {}
            for path, offset, length in places:
                if path not in files:
                    files[path] = stack.enter_context(open(path, "rb"))
                files[path].seek(offset)
                record = _parse(files[path].read(length))
                assert record is not None  # it parsed when the place was noted, and files only grow
                records.append(record)
        return records

    def key(self, record: dict[str, Any]) -> Key:
        return tuple(record[name] for name in self.keys)

    def open(self, rank: int = 0) -> "WorkLog":
        """Ready to append; the file of process `rank`."""
        path = self.directory / (f"{self.name}.{rank}.jsonl" if rank else f"{self.name}.jsonl")
        self.directory.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        os.ftruncate(self._file, _whole_lines(self._file))
        return self

    def append(self, record: dict[str, Any]) -> None:
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
        try:
            written = os.write(self._file, line)
            if written != len(line):
                raise OSError(NO_SPACE[0], "short write")
            if time.monotonic() - self._synced > SYNC_EVERY:
                os.fsync(self._file)
                self._synced = time.monotonic()
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            raise UserError(
                f"{self.directory}: the disk is full; make room and run the same command to go on"
            ) from None

    def __enter__(self) -> "WorkLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.fsync(self._file)
        os.close(self._file)
        self._file = -1


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _whole_lines(file: int) -> int:
    """Bytes up to the end of the last whole line."""
    end = os.fstat(file).st_size
    while end:
        start = max(0, end - 2**16)
        place = os.pread(file, end - start, start).rfind(b"\n")
        if place >= 0:
            return start + place + 1
        end = start
    return 0
