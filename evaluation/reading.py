"""Reading the files of data sets: JSON lines, JSON, CSV, parquet, plain or compressed; every record knows its place."""

import csv
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NoReturn

from ..core import records
from ..errors import UserError

ENDINGS = (".jsonl", ".json", ".csv", ".parquet", ".txt")
PACKED = (".gz", ".zst")
TEXTS = "text: .txt files, or .jsonl(.gz, .zst) and .parquet with a column text"


@dataclass(frozen=True)
class Record:
    """One row of a file. Columns are found whatever their case, and with spaces, dashes and underscores alike."""

    where: str
    values: Mapping[str, Any]

    def get(self, *names: str) -> Any:
        """The first of these columns that the record has, None if it has none."""
        known = {_plain(key): value for key, value in self.values.items()}
        return next((known[_plain(name)] for name in names if known.get(_plain(name)) is not None), None)

    def text(self, *names: str) -> str:
        """The first of these columns, as text that is not empty. Raises UserError with the place of the record."""
        value = self.get(*names)
        if value is None:
            columns = ", ".join(map(str, self.values)) or "none"
            raise UserError(f"{self.where}: no column {names[0]!r} (it has {columns})")
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            self.broken(f"column {names[0]!r} is {type(value).__name__}, not text")
        text = str(value)
        if not text.strip():
            self.broken(f"column {names[0]!r} is empty")
        return text

    def texts(self, *names: str) -> list[str]:
        """The first of these columns, as a list of texts."""
        value = self.get(*names)
        if hasattr(value, "tolist"):
            value = value.tolist()
        if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
            self.broken(f"column {names[0]!r} must be a list of texts")
        return list(value)

    def broken(self, what: str) -> NoReturn:
        raise UserError(f"{self.where}: {what}; mend or remove the record")


def _plain(name: str) -> str:
    return str(name).lower().replace("_", "").replace(" ", "").replace("-", "")


def is_data(path: Path, endings: Sequence[str] = ENDINGS) -> bool:
    """Whether a file's name says that `read_records` can read it."""
    name = path.name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return name.endswith(tuple(endings)) and not path.name.startswith(".")


def files_below(path: Path, endings: Sequence[str] = ENDINGS) -> list[Path]:
    """The data files at or below `path`, in the order of their names."""
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file() and is_data(file, endings))


def read_records(path: Path, columns: Sequence[str] | None = None) -> Iterator[Record]:
    """The records of a file.

    columns: names for the columns of a CSV file that has no header line.
    Raises UserError, with the line, for a file that is damaged or of another kind.
    """
    name = path.name.lower()
    bare = name.removesuffix(".gz").removesuffix(".zst")
    if not is_data(path):
        raise UserError(f"{path}: unknown kind of file; give .jsonl, .json, .csv or .parquet")
    try:
        if bare.endswith(".parquet"):
            yield from (Record(f"{path}:{row}", values) for row, values in enumerate(records.parquet_rows(path), 1))
        elif bare.endswith(".jsonl"):
            yield from _json_lines(path)
        elif bare.endswith(".json"):
            yield from _json(path)
        elif bare.endswith(".csv"):
            yield from _csv(path, columns)
        else:
            with open_text(path) as file:
                yield Record(str(path), {"text": file.read()})
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]}); is the file whole?") from error


def open_text(path: Path) -> IO[str]:
    """A file as UTF-8 text, with or without a byte order mark, unpacked by its ending (.gz, .zst)."""
    return records.open_text(path, "utf-8-sig", newline="")


def library(name: str, what: str) -> ModuleType:
    """A library of the extra `eval`; UserError where it is missing, said of `what`."""
    return records.library(name, what, "'dsv3[eval]'")


def _json_lines(path: Path) -> Iterator[Record]:
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _object(f"{path}:{number}", line)


def _json(path: Path) -> Iterator[Record]:
    """A file with one object, with a list of objects, or with one object a line."""
    with open_text(path) as file:
        text = file.read()
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg}); mend the file") from None
        yield from (
            _object(f"{path}:{number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()
        )
        return
    rows = tree if isinstance(tree, list) else [tree]
    for number, row in enumerate(rows, 1):
        where = f"{path}:{number}" if len(rows) > 1 else str(path)
        if not isinstance(row, dict):
            raise UserError(f"{where}: {type(row).__name__} where an object was expected")
        yield Record(where, row)


def _object(where: str, line: str) -> Record:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg}); mend or remove the line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: {type(row).__name__} where an object was expected; mend or remove the line")
    return Record(where, row)


def _csv(path: Path, columns: Sequence[str] | None) -> Iterator[Record]:
    with open_text(path) as file:
        rows = csv.reader(file, strict=True)
        names = list(columns) if columns is not None else []
        while True:
            line = rows.line_num + 1
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise UserError(f"{path}:{line}: not CSV ({error}); mend or remove the line") from None
            if row is None:
                return
            if not names:
                names = row
            elif row and len(row) != len(names):
                raise UserError(f"{path}:{line}: {len(row)} columns instead of {len(names)}; mend or remove the line")
            elif row:
                yield Record(f"{path}:{line}", dict(zip(names, row, strict=True)))
