"""Where text comes from: folders of text and code, JSON lines, parquet files, Hugging Face datasets.

A source yields documents, in the same order every time. Binary files are skipped and counted, not guessed at.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ...core.records import library
from ...errors import UserError
from .records import RECORDS, read_records

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".gz", ".zst", ".bz2", ".xz", ".arrow", ".bin", ".npy")
HUGGING_FACE = "hf:"
SNIFFED_BYTES = 8192


class Document(NamedTuple):
    """A text and its name in the source. Documents of one `group` go to the same side of the validation split."""

    id: str
    text: str
    group: str | None = None


class Source(Protocol):
    """Documents under a name.

    `describe` gives, as JSON, what makes prepared data stale when it changes. `skipped` counts files by reason.
    """

    name: str
    skipped: Counter[str]

    def describe(self) -> Any: ...
    def documents(self) -> Iterator[Document]: ...


def open_source(name: str, location: str | Path, text_field: str = "text") -> Source:
    """The source at `location`: a folder, a file, or `hf:OWNER/NAME[:CONFIG[:SPLIT]]`; UserError where there is none.

    text_field: the column that holds the text in JSON lines, parquet and Hugging Face datasets.
    """
    if isinstance(location, str) and location.startswith(HUGGING_FACE):
        return HuggingFaceSource(name, location.removeprefix(HUGGING_FACE), text_field)
    path = Path(location).expanduser()
    if path.is_dir():
        return FileSource(name, path, files_below(path), text_field)
    if not path.is_file():
        raise UserError(f"source '{name}': {path} does not exist; give a folder, a file or hf:OWNER/NAME")
    suffix = path.name.lower()
    if not suffix.endswith(RECORDS) and (suffix.endswith(ARCHIVES) or _text_of(path) is None):
        raise UserError(
            f"source '{name}': {path} has an unknown format; give text, .jsonl, .jsonl.gz, .jsonl.zst or .parquet"
        )
    return FileSource(name, path.parent, [path], text_field)


class FileSource:
    """Files in a fixed order. JSON lines and parquet files hold one document per record; any other text file is one."""

    def __init__(self, name: str, root: Path, files: Sequence[Path], text_field: str = "text"):
        self.name, self.root, self.files, self.text_field = name, root, files, text_field
        self.skipped: Counter[str] = Counter()

    def describe(self) -> Any:
        """[path, bytes, modification time] of every file: enough to see a change, and fast for many files."""
        return [self.text_field, *file_stamps(self.root, self.files)]

    def documents(self) -> Iterator[Document]:
        self.skipped.clear()
        for path in self.files:
            where = path.relative_to(self.root).as_posix()
            if path.name.lower().endswith(RECORDS):
                records = read_records(path, [self.text_field], "; set text_field")
                for number, (place, record) in enumerate(records):
                    yield Document(f"{where}:{number}", _field(record, self.text_field, place))
                continue
            text = _text_of(path)
            if text is None:
                self.skipped["binary"] += 1
            else:
                yield Document(where, text)


class HuggingFaceSource:
    """A dataset of the Hugging Face hub, streamed: OWNER/NAME[:CONFIG[:SPLIT]] (split `train` where none is given)."""

    def __init__(self, name: str, spec: str, text_field: str = "text"):
        self.name, self.text_field, self.skipped = name, text_field, Counter[str]()
        self.dataset, self.config, self.split = (*spec.split(":"), "", "")[:3]
        self._datasets = library("datasets", f"source '{name}' ({HUGGING_FACE}{spec})")

    def describe(self) -> Any:
        return [self.dataset, self.config, self.split, self.text_field]

    def documents(self) -> Iterator[Document]:
        split = self.split or "train"
        try:
            rows = self._datasets.load_dataset(self.dataset, self.config or None, split=split, streaming=True)
            for number, row in enumerate(rows):
                where = f"{self.dataset}:{number}"
                yield Document(where, _field(row, self.text_field, where))
        except UserError:
            raise
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            what = f"dataset {self.dataset}, split {split}"
            raise UserError(f"source '{self.name}': cannot read {what}: {reason}") from error


class MemorySource:
    """Documents that are already in memory."""

    def __init__(self, name: str, documents: Sequence[Document]):
        self.name, self._documents, self.skipped = name, documents, Counter[str]()

    def describe(self) -> Any:
        return [list(document) for document in self._documents]

    def documents(self) -> Iterator[Document]:
        return iter(self._documents)


def check_name(name: str) -> None:
    """A source's name becomes a folder; UserError where it cannot."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
        raise UserError(f"source name {name!r} does not work as a folder name: use letters, digits, '.', '_' and '-'")


def file_stamps(root: Path, files: Sequence[Path]) -> list[list[Any]]:
    """[path below root, bytes, modification time in ns] of each file."""
    stamps = []
    for path in files:
        stat = path.stat()
        stamps.append([os.path.relpath(path, root), stat.st_size, stat.st_mtime_ns])
    return stamps


def files_below(folder: Path) -> list[Path]:
    """All files below, sorted; hidden ones (.git) and Python's caches are no data."""
    files = []
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        files += [Path(path, name) for name in names if not name.startswith(".")]
    return sorted(file for file in files if file.is_file())


def _text_of(path: Path) -> str | None:
    """The text of a UTF-8 file, or None for a binary one: it has a zero byte at its head, or does not decode."""
    try:
        with path.open("rb") as file:
            head = file.read(SNIFFED_BYTES)
            return None if b"\0" in head else (head + file.read()).decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _field(record: Any, field: str, where: str) -> str:
    if not isinstance(record, dict) or field not in record:
        found = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{where}: no field '{field}' (found: {found}); set text_field")
    if not isinstance(record[field], str):
        raise UserError(f"{where}: field '{field}' is {type(record[field]).__name__}, not text; set text_field")
    return str(record[field])
