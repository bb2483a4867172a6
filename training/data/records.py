"""Records of data files, each with the place where it stands: JSON lines (plain, gzip, zstd) and parquet."""

import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...core.records import open_text, parquet_rows
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
        return ((f"{path}, row {row}", record) for row, record in enumerate(parquet_rows(path, columns, hint)))
    raise UserError(f"{path} has an unknown format; give {', '.join(RECORDS)}")


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with open_text(path) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}, line {number}", json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number}: not JSON ({error.msg}); mend or remove the line") from error
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read beyond line {number} ({error}); the file is damaged") from error
