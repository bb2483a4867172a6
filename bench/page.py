"""docs/kernels.md: which kernel an op has on each backend, how it was checked, and what compilers made of it."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import triton

from ..backends import BUILT_IN
from ..backends.triton.aot import Build
from ..backends.triton.reference import REASONS
from ..core.files import atomic_write
from ..ops import load
from ..ops.op import Op
from .compiled import Row

ROOT = Path(__file__).parent.parent

HEAD = """# Kernels

Written by `dsv3 bench ops --compile --page docs/kernels.md`; a test holds the page to the code.

An op without a kernel runs its specification, plain PyTorch, on the backend's device. What was checked, per kernel:

- `hardware`: it ran where it belongs and agreed with its specification in float64.
- `interpreter`: the same in Triton's interpreter on a CPU, with the tiles and the FP8 of sm_80, sm_90, gfx942, gfx950.
- `compiled`: compiled ahead of time for every chip below, without spilled registers, within the chip's shared memory
  (`cupy` on rocm: for gfx942, by clang).
- `emulated`: the same comparison, with something in the place of what is not here: stand-ins that hold an adapter to
  the vendor's documented call; the CPU's products behind the same call of torch (`blas`, `torch`); fibers of the CPU
  for CUDA C++ (`cupy`, which nvcc also compiles for sm_80 and sm_90).
- `nothing`: registered only.

No kernel of cuda, rocm or ascend has run on its hardware yet.

"""


def write(rows: list[Row], path: str) -> None:
    sections = [HEAD, "## Kernels of each op\n\n", *_status(), "\n## What runs as its specification, and why\n\n"]
    sections += [f"- `{name}`: {reason}\n" for name, reason in sorted(REASONS.items())]
    sections += [f"\n## As compiled, by Triton {triton.__version__}\n\n", compiled_table(_one_per_kernel(rows)), "\n"]
    with atomic_write(path, "w") as file:
        file.write("".join(sections))


def _status() -> Iterator[str]:
    backends = sorted(BUILT_IN)
    yield f"| op | {' | '.join(backends)} |\n|---|{'---|' * len(backends)}\n"
    for name, op in sorted(load().items()):
        yield f"| {name} | {' | '.join(_cell(op, backend) for backend in backends)} |\n"


def _cell(op: Op, backend: str) -> str:
    kernels = op.kernels.get(backend, ())
    checked = {kernel.provider: kernel.checked for kernel in kernels}
    if "triton" in checked:
        checked["triton"] += ", compiled"
    return "; ".join(f"{provider}: {check}" for provider, check in checked.items()) or "reference"


def _one_per_kernel(rows: Iterable[Row]) -> list[Row]:
    """The first build of each kernel for each chip."""
    seen: set[tuple[str, str]] = set()
    kept = []
    for row in rows:
        fresh = [build for build in row.builds if (build.kernel, build.target) not in seen]
        seen |= {(build.kernel, build.target) for build in fresh}
        unique = {build.kernel: build for build in reversed(fresh)}
        kept.append(Row(row.op, row.workload, row.target, list(unique.values())[::-1]))
    return sorted(kept, key=lambda row: [build.kernel for build in row.builds[:1]])


def compiled_table(rows: Iterable[Row]) -> str:
    lines = [
        "| kernel | op, workload | chip | warps, stages | shared memory | registers | spills | matrix instructions |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(row, build) for row in rows for build in row.builds]
    return "\n".join(lines)


def _line(row: Row, build: Build) -> str:
    launch = f"{build.options.get('num_warps', 4)}, {build.options.get('num_stages', '')}".removesuffix(", ")
    used = f"{build.shared:,} | {build.registers} | {build.spills}" if not build.error else f"{build.error} | | "
    matrix = ", ".join(sorted({name.split(".")[0] + _shape(name) for name in build.matrix})) or ""
    return f"| {build.kernel} | {row.op}, {row.workload} | {build.target} | {launch} | {used} | {matrix} |"


def _shape(instruction: str) -> str:
    """Of wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3: " m64n128k32 e4m3"."""
    parts = instruction.split(".")
    shape = next((part for part in parts if part[:1] == "m" and part[1:2].isdigit()), "")
    return f" {shape} {parts[-1]}" if shape else ""
