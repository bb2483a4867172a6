"""What every reader of data files needs: texts that may be compressed, rows of parquet, and libraries that may be
missing."""

import gzip
import importlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from ..errors import UserError

BATCH = 1024  # rows of parquet in memory


def library(name: str, what: str, install: str = "") -> ModuleType:
    """An optional package; UserError where it is missing, saying that `what` needs it.

    install: what pip is to install, by default the package itself.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise UserError(f"{what} needs the package {package}: pip install {install or package}") from error


def open_text(path: Path, encoding: str = "utf-8", newline: str | None = None) -> IO[str]:
    """A file as text, unpacked by its ending (.gz, .zst)."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding=encoding, newline=newline)
    if path.suffix.lower() == ".zst":
        # Of the two decoders at hand, only Arrow's reports a truncated stream.
        arrow = library("pyarrow", str(path))
        return io.TextIOWrapper(arrow.CompressedInputStream(str(path), "zstd"), encoding, newline=newline)
    return path.open(encoding=encoding, newline=newline)


def parquet_rows(path: Path, columns: Sequence[str] | None = None, hint: str = "") -> Iterator[dict[str, Any]]:
    """Its rows. columns: all by default; `hint` ends the error where one is missing. UserError for a damaged file."""
    parquet, arrow = library("pyarrow.parquet", str(path)), library("pyarrow", str(path))
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            for column in columns or ():
                if column not in names:
                    raise UserError(f"{path}: no column '{column}' (found: {', '.join(names)}){hint}")
            for batch in file.iter_batches(batch_size=BATCH, columns=list(columns) if columns else None):
                yield from batch.to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from error
