"""Replies and scores on the disk, line by line as they come, so that no interruption costs more than what was under
way. A line is found again by its item, its sample and a hash of everything that decides what it says."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ..errors import UserError

Key = tuple[str, int, str]  # item, sample, hash
PROBES, PROBE = 64, 2**16  # bytes of a weight file that tell it from another: places, and how many at each


def digest(value: Any) -> str:
    """16 hexadecimal digits that stand for a JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def seed_of(seed: int, task: str, item: str, sample: int) -> int:
    """The seed of one reply: 31 bits, which every server takes, the same in every run."""
    text = json.dumps([seed, task, item, sample])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


class Store:
    """A file of JSON lines with "item", "sample" and "hash" each, open for more. A context manager.

    What a crash tore off at the end of a line is skipped when it is read again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[Key, dict[str, Any]] = {}
        self._file: IO[bytes] | None = None

    def __enter__(self) -> "Store":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Another process that wrote here at the same time would tear our lines apart.
            self._file = open(self.path, "a+b")
            _lock(self._file, self.path)
            self._file.seek(0)
            content = self._file.read()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); choose another --out") from error
        for line in content.split(b"\n"):
            try:
                row = json.loads(line)
                self.rows[row["item"], row["sample"], row["hash"]] = row
            except (ValueError, TypeError, KeyError):
                continue
        if content and not content.endswith(b"\n"):
            self._file.write(b"\n")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._file.close()

    def get(self, key: Key) -> dict[str, Any] | None:
        return self.rows.get(key)

    def add(self, key: Key, values: Mapping[str, Any]) -> None:
        """Keep a line; it is with the operating system when this returns."""
        assert self._file is not None
        item, sample, hash = key
        row = {"item": item, "sample": sample, "hash": hash, **values}
        data = json.dumps(row, ensure_ascii=False).encode("utf-8", errors="replace") + b"\n"
        try:
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); make room and run the same command again"
            ) from error
        self.rows[key] = row


def _lock(file: IO[bytes], path: Path) -> None:
    """Held until the file is closed, by us or by our end."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{path} is being written by another `dsv3 eval`; wait for it or choose another --out"
        ) from None
    except OSError:  # a file system without locks
        return


def model_digest(directory: Path) -> str:
    """A hash that changes with a model: of its small files, and of samples from all over its weights.

    Reading all of 671B weights would take longer than many an evaluation; training changes every tensor.
    """
    found = hashlib.sha256()
    for file in sorted(directory.iterdir()):
        if file.suffix in (".json", ".jinja", ".model"):
            found.update(file.name.encode() + file.read_bytes())
        elif file.suffix == ".safetensors":
            size = file.stat().st_size
            found.update(f"{file.name}:{size}".encode())
            with file.open("rb") as weights:
                for place in sorted({size * part // PROBES for part in range(PROBES)} | {max(0, size - PROBE)}):
                    weights.seek(place)
                    found.update(weights.read(PROBE))
    return found.hexdigest()[:16]
