"""How large the tiles of a kernel are: data, per chip, kernel and bucket of sizes; never tried out while running.

tables/<chip>.json of the chip's backend:

    {"fp8_gemm": [{"up_to": {"M": 64}, "tile": {"BM": 16, "BN": 128, "num_warps": 4, "num_stages": 4}},
                  {"tile": {"BM": 128, ...}}], ...}

A launch takes the first row whose bounds all hold; the last row of a kernel has none. `dsv3 bench ops --tune` writes
rows on a device, with what it measured; rows without `"measured"` are estimates that compile without faults.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from .target import current_target

Row = dict[str, Any]


def path_of(target: str, backend: str) -> Path:
    return Path(__file__).parent.parent / backend / "tables" / f"{target}.json"


@cache
def table(target: str, backend: str) -> dict[str, list[Row]]:
    """All rows of a chip."""
    return json.loads(path_of(target, backend).read_text(encoding="utf-8"))


@cache
def _lookup(target: str, backend: str, kernel: str, sizes: tuple[tuple[str, int], ...]) -> dict[str, Any]:
    given = dict(sizes)
    for row in table(target, backend)[kernel]:
        if all(given[name] <= bound for name, bound in row.get("up_to", {}).items()):
            return row["tile"]
    raise LookupError(f"tables/{target}.json: the last row of {kernel} has bounds; add one without")


def tile(kernel: str, **sizes: int) -> dict[str, Any]:
    """Block sizes and options for a launch of `kernel` at these sizes on the current target; not to be changed."""
    if _asked is not None:
        _asked.append((kernel, tuple(sizes.items())))
    if kernel in _forced:
        return _forced[kernel]
    target = current_target()
    return _lookup(target.name, target.backend, kernel, tuple(sizes.items()))


# For the search ------------------------------------------------------------------------------------------------------

Question = tuple[str, tuple[tuple[str, int], ...]]
_asked: list[Question] | None = None
_forced: dict[str, dict[str, Any]] = {}


@contextmanager
def listening() -> Iterator[list[Question]]:
    """What a `with` block asks the table: kernels and sizes."""
    global _asked
    previous, _asked = _asked, []
    try:
        yield _asked
    finally:
        _asked = previous


@contextmanager
def forced(kernel: str, shape: dict[str, Any]) -> Iterator[None]:
    """Launch `kernel` with this tile in a `with` block, whatever the table says."""
    _forced[kernel] = shape
    try:
        yield
    finally:
        del _forced[kernel]
