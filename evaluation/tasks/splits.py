"""Which file of a data set's folder belongs to which split, told by the names of files and folders."""

import re
from collections.abc import Sequence
from pathlib import Path

from ...errors import UserError
from ..reading import files_below

SPLITS = {"test": "test", "dev": "dev", "val": "validation", "valid": "validation", "validation": "validation"}
SPLITS |= {"train": "train", "prompt": "dev"}


def split_files(path: Path, task: str, files: str, endings: Sequence[str]) -> dict[str, list[Path]]:
    """Split -> its files, in the order of their names. A single file, and files that tell no split, are "test".

    task, files: for errors: whose data it is, and what it should look like.
    """
    if not path.exists():
        raise UserError(f"{task}: {path} does not exist; expected {files}")
    found: dict[str, list[Path]] = {}
    below = files_below(path, endings)
    # Copies of the Hugging Face hub hold every subject once by itself and once in the folder `all`.
    below = [file for file in below if "all" in file.relative_to(path).parts[:-1]] or below
    for file in below:
        split = "test" if file == path else split_of(file, path) or "test"
        found.setdefault(split, []).append(file)
    if not found:
        raise UserError(f"{task}: {path} holds no data files; expected {files}")
    return found


def split_of(file: Path, root: Path) -> str | None:
    """The split that a file's name says, or else the nearest folder between it and `root`."""
    for part in reversed(file.relative_to(root).parts):
        words = re.split(r"[^A-Za-z]+", part.lower())
        for word in reversed(words):
            if "auxiliary" in words:
                return "auxiliary"
            if word in SPLITS:
                return SPLITS[word]
    return None


def subject_of(file: Path) -> str:
    """`abstract_algebra` for abstract_algebra_test.csv; the folder's name for test-00000-of-00001.parquet."""
    stem = file.name.split(".")[0]
    bare = re.sub(r"[-_]?(test|dev|validation|valid|val|train)([-_]\d+[-_]of[-_]\d+)?$", "", stem)
    return bare or file.parent.name
