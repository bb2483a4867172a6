"""`dsv3 bench ops --tune`: look for faster tiles on this GPU, and write them into the table of its chip.

For every workload the search starts from the tile in the table and goes to the best neighbour (one block size halved or
doubled, another number of warps or stages, a flag turned) as long as that is faster by more than noise. A neighbour is
timed only if it compiles without spills and fits. The table gets one row per size that a workload has.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import Any

import torch
from rich.console import Console

from ..backends import Backend
from ..backends.triton import aot, tables
from ..backends.triton.runtime import recording
from ..backends.triton.target import current_target
from ..core.files import atomic_write
from ..errors import UserError
from ..ops import load
from ..ops.formats import E4M3
from ..ops.op import Kernel
from .timing import seconds
from .workloads import Maker, Workload, all_workloads

Tile = dict[str, Any]
FASTER = 0.98  # of the time so far: less is noise
LIMITS = {"num_warps": (1, 16), "num_stages": (1, 6), "waves_per_eu": (0, 4), "matrix_instr_nonkdim": (16, 32)}


def neighbours(tile: Tile) -> Iterator[Tile]:
    """Tiles that differ in one entry."""
    for name, value in tile.items():
        if isinstance(value, bool):
            yield {**tile, name: not value}
        elif name == "num_stages":
            yield from ({**tile, name: other} for other in (value - 1, value + 1) if 1 <= other <= LIMITS[name][1])
        else:
            low, high = LIMITS.get(name, (1, 512))
            yield from ({**tile, name: other} for other in (value // 2, value * 2) if max(low, 1) <= other <= high)


def descend(start: Tile, time: Callable[[Tile], float | None]) -> tuple[Tile, float]:
    """The best tile that steps to better neighbours reach, and its seconds. time: None for one that cannot run.

    Raises UserError if the first one cannot.
    """
    best, taken = start, time(start)
    if taken is None:
        raise UserError(f"the tile {start} of the table does not run; mend the table first")
    seen = [start]
    while True:
        found = best
        for tile in neighbours(best):
            if tile in seen:
                continue
            seen.append(tile)
            other = time(tile)
            if other is not None and other < taken * FASTER:
                found, taken = tile, other
        if found == best:
            return best, taken
        best = found


@dataclass(frozen=True)
class Found:
    """The tile of one kernel at one size."""

    kernel: str
    sizes: tuple[tuple[str, int], ...]
    tile: Tile
    seconds: float


def rows_of(found: list[Found], device: str) -> list[tables.Row]:
    """Rows of one kernel, small sizes first; the largest has no bounds."""
    ordered = sorted({each.sizes: each for each in found}.values(), key=lambda each: [size for _, size in each.sizes])
    rows: list[tables.Row] = []
    for place, each in enumerate(ordered):
        bounds = {} if place == len(ordered) - 1 else {"up_to": dict(each.sizes)}
        measured = {"us": round(each.seconds * 1e6, 2), "device": device, "date": str(date.today())}
        rows.append({**bounds, "tile": each.tile, "measured": measured})
    return rows


def tune(names: list[str], backend: Backend) -> None:
    """Tune every kernel that the workloads of these ops use. Raises UserError where there is no GPU."""
    if backend.name not in ("cuda", "rocm"):
        raise UserError(f"--tune is for GPUs, and the backend is {backend.name}; say --backend cuda or rocm")
    target, device = current_target(), torch.cuda.get_device_name()
    found: dict[str, list[Found]] = {}
    console = Console()
    for name in names:
        for workload in all_workloads()[name]:
            for each in _tune_workload(workload, backend):
                found.setdefault(each.kernel, []).append(each)
                console.print(f"{name}, {workload.name}: {each.kernel} {each.tile}, {each.seconds * 1e6:.1f} us")
            table = {**tables.table(target.name, target.backend)}
            table |= {kernel: rows_of(tiles, device) for kernel, tiles in found.items()}
            write_table(target.name, target.backend, table)  # after each: a search that is interrupted keeps its finds


def write_table(target: str, backend: str, table: dict[str, list[tables.Row]]) -> None:
    """A line per row, so that a change of one is a change of one line."""
    kernels = [
        f"  {json.dumps(name)}: [\n" + ",\n".join(f"    {json.dumps(row)}" for row in rows) + "\n  ]"
        for name, rows in sorted(table.items())
    ]
    with atomic_write(tables.path_of(target, backend), "w") as file:
        file.write("{\n" + ",\n".join(kernels) + "\n}\n")


def _tune_workload(workload: Workload, backend: Backend) -> Iterator[Found]:
    target = current_target()
    args = workload.make(Maker(backend.device, target.fp8 or E4M3))
    chosen = [kernel for kernel in load()[workload.op].kernels.get(backend.name, ()) if kernel.provider == "triton"]
    for kernel in (kernel for kernel in chosen if kernel.supports(*args)):
        with recording(), tables.listening() as asked:
            kernel.run(*args)
        for name, sizes in dict.fromkeys(asked):
            start = dict(tables.tile(name, **dict(sizes)))
            tile, taken = descend(start, partial(_time, kernel, args, name))
            yield Found(name, sizes, tile, taken)


def _time(kernel: Kernel, args: tuple[Any, ...], name: str, tile: Tile) -> float | None:
    """Seconds of the op with this tile; None if it would spill, does not fit, or fails."""
    with tables.forced(name, tile):
        try:
            with recording() as launches:
                kernel.run(*args)
            if any(aot.build(launch, current_target()).faults for launch in launches):
                return None
            return seconds(lambda: kernel.run(*args), "cuda")
        except Exception:  # a tile that the kernel's own arithmetic or the compiler refuses
            return None
