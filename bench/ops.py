"""`dsv3 bench ops`: every kernel of the active backend on workloads of V3's sizes, beside the roofline.

The roofline is measured in the same run: bytes over the bandwidth of a copy, floating-point operations over the rate of
torch's own matrix product of that precision. A fraction of 1 cannot be beaten; the ratio says how many times as long
as the quickest one of the op a kernel takes.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..backends import Backend, activate, first_line
from ..errors import UserError
from ..ops import load
from ..ops.formats import E4M3
from ..ops.op import Op
from .peers import peers_of
from .roofline import Peaks, measure_peaks, operand_width
from .timing import seconds
from .workloads import Maker, Workload, all_workloads


@dataclass(frozen=True)
class Timing:
    """One kernel on one workload. seconds None: not run, and `note` says why. bound: what sets the roofline."""

    op: str
    workload: str
    provider: str
    seconds: float | None
    fraction: float | None = None
    bound: str = ""
    ratio: float | None = None
    note: str = ""


def run(args: argparse.Namespace) -> int:
    names = _wanted(args.ops)
    if args.compile:
        return _compile(args, names)
    if args.chips or args.page:
        raise UserError("--chips and --page belong to --compile: add it, or leave them out")
    backend = activate(args.backend)
    if args.tune:
        from .tune import tune

        tune(names, backend)
        return 0
    rows = list(time_ops(names, backend, args.first, args.longest))
    if args.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
    else:
        _show(rows, backend)
    return 0


def _wanted(text: str) -> list[str]:
    """Names of ops; all that have workloads if none are given."""
    known = all_workloads()
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UserError(f"no workload for an op {name!r}; there are {', '.join(sorted(known))}")
    return names or sorted(known)


def time_ops(names: list[str], backend: Backend, first: bool, longest: float) -> Iterator[Timing]:
    """Every kernel of every workload; each workload's rows have their ratio to the quickest of them."""
    peaks = measure_peaks(backend.device)
    for name in names:
        for workload in all_workloads()[name][: 1 if first else None]:
            yield from _with_ratios(list(_time(load()[name], workload, backend, peaks, longest)))


def _with_ratios(rows: list[Timing]) -> list[Timing]:
    best = min((row.seconds for row in rows if row.seconds), default=None)
    return [dataclasses.replace(row, ratio=row.seconds / best if row.seconds and best else None) for row in rows]


def _time(op: Op, workload: Workload, backend: Backend, peaks: Peaks, longest: float) -> Iterator[Timing]:
    args = workload.make(Maker(backend.device, _fp8_of(backend)))
    least, bound = peaks.least_seconds(*op.cost(*args), operand_width(args)) if op.cost else (0.0, "")
    for kernel in [*op.kernels.get(backend.name, ()), op.specification]:
        if not (kernel.usable and kernel.supports(*args)):
            continue
        # A specification in float32 takes many times what is possible.
        expected = least * (10 if kernel is op.specification else 1)
        if expected > longest:
            yield Timing(op.name, workload.name, kernel.provider, None, note=f"left out: about {expected:.1f} s a call")
            continue
        taken, note = _seconds_or_why(partial(kernel.run, *args), backend.device)
        yield Timing(op.name, workload.name, kernel.provider, taken, taken and least / taken, bound, note=note)
    if least <= longest:
        for name, call in peers_of(op, args, backend.device):
            taken, note = _seconds_or_why(call, backend.device)
            yield Timing(op.name, workload.name, name, taken, taken and least / taken, bound, note=note)


def _fp8_of(backend: Backend) -> torch.dtype:
    if backend.device != "cuda":
        return E4M3
    from ..backends.triton.target import current_target

    return current_target().fp8 or E4M3


def _seconds_or_why(call: Callable[[], Any], device: str) -> tuple[float | None, str]:
    try:
        return seconds(call, device), ""
    except torch.OutOfMemoryError:
        return None, "out of memory"
    except Exception as error:  # one kernel that fails must not end the table
        return None, f"failed: {type(error).__name__}: {first_line(error)}"


def _show(rows: list[Timing], backend: Backend) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("op", "workload", "kernel", "time", "of the roofline", "bound by", "times the quickest"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        time = row.note if row.seconds is None else _readable(row.seconds)
        fraction, ratio = ("" if number is None else f"{number:.2f}" for number in (row.fraction, row.ratio))
        table.add_row(row.op, row.workload, row.provider, time, fraction, row.bound, ratio)
    Console(width=200).print(table)
    print(f"backend {backend.name}, torch {torch.__version__}; medians")


def _readable(taken: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if taken * factor >= 1:
            return f"{taken * factor:.2f} {unit}"
    return f"{taken * 1e6:.1f} us"


def _compile(args: argparse.Namespace, names: list[str]) -> int:
    """Exit code 1 where a kernel does not compile, or could not run."""
    from importlib.util import find_spec

    if find_spec("triton") is None:
        raise UserError("Triton is not installed; pip install 'dsv3[cuda]'")
    from ..backends.triton.target import TARGETS
    from . import page
    from .compiled import survey

    chips = [chip.strip() for chip in args.chips.split(",") if chip.strip()]
    for chip in chips:
        if chip not in TARGETS:
            raise UserError(f"unknown chip {chip!r}; there are {', '.join(TARGETS)}")
    if args.page and (args.ops or chips or args.first):
        raise UserError("--page is about all kernels and chips: leave out --ops, --chips and --first")
    if args.page and not Path(args.page).absolute().parent.is_dir():  # said now, and not after minutes of compiling
        raise UserError(f"--page {args.page}: there is no folder {Path(args.page).parent}; make it first")
    rows = []
    console = Console(stderr=True)
    with console.status("compiling") as status:
        for row in survey(names, chips, args.first):
            status.update(f"{row.op}, {row.workload}, for {row.target}")
            rows.append(row)
    if args.page:
        page.write(rows, args.page)
    if args.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2, default=str))
    elif not args.page:
        print(page.compiled_table(rows))
    faults = [(row, fault) for row in rows for fault in row.faults]
    for row, fault in faults:
        console.print(f"{row.op}, {row.workload}, {row.target}: {fault}")
    return 1 if faults else 0
