"""Records of data files, each with the place where it stands: JSON lines (plain, gzip, zstd) and parquet."""

import gzip
import importlib
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from ...errors import UserError

JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
RECORDS = (*JSON_LINES, ".parquet")


def read_records(path: Path, columns: Sequence[str] | None = None, hint: str = "") -> Iterator[tuple[str, Any]]:
    """(place, record) of each line or row; the place reads "FILE, line 3" (from 1) or "FILE, row 3" (from 0).

    columns: of a parquet file, all by default; `hint` ends the error where one is missing. A line may hold any JSON,
    empty lines are passed over. UserError for what is no JSON, damaged, or of another format.
    """
    name = path.name.lower()
    if name.endswith(JSON_LINES):
        return _json_lines(path)
    if name.endswith(".parquet"):
        return _parquet(path, columns, hint)
    raise UserError(f"{path} has an unknown format; give {', '.join(RECORDS)}")


def library(name: str, what: str) -> ModuleType:
    """An optional package; UserError where it is missing, saying that `what` needs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise UserError(f"{what} needs the package '{package}': pip install {package}") from error


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with _open_compressed(path) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}, line {number}", json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number}: not JSON ({error.msg}); mend or remove the line") from error
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read beyond line {number} ({error}); the file is damaged") from error


def _open_compressed(path: Path) -> IO[str]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    if path.suffix.lower() == ".zst":
        # Of the two decoders at hand, only Arrow's reports a truncated stream.
        arrow = library("pyarrow", str(path))
        return io.TextIOWrapper(arrow.CompressedInputStream(str(path), "zstd"), encoding="utf-8")
    return path.open(encoding="utf-8")


def _parquet(path: Path, columns: Sequence[str] | None, hint: str) -> Iterator[tuple[str, Any]]:
    parquet, arrow = library("pyarrow.parquet", str(path)), library("pyarrow", str(path))
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            for column in columns or ():
                if column not in names:
                    raise UserError(f"{path}: no column '{column}' (found: {', '.join(names)}){hint}")
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=list(columns) if columns else None):
                for record in batch.to_pylist():
                    yield f"{path}, row {row}", record
                    row += 1
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from error
