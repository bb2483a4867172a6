"""A compiler for the CPU in the place of CuPy: the kernels of backends/cupy run on fibers, on tensors of the CPU."""

import ctypes
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from dsv3.backends.cupy.module import HERE, Launcher, Shape

HEADER = Path(__file__).parent / "cuda.h"
TYPES = {np.uint64: ctypes.c_void_p, np.int64: ctypes.c_longlong, np.float32: ctypes.c_float}


def compiler() -> str | None:
    return shutil.which("g++")


def parameters(code: str, kernel: str) -> list[str]:
    """Types of a kernel's parameters, as written."""
    signature = re.search(rf"__global__ void {kernel}\(([^)]*)\)", code)
    assert signature, f"no kernel {kernel}"
    return [" ".join(parameter.split()).rsplit(" ", 1)[0] for parameter in signature[1].split(",")]


def caller(code: str, kernel: str) -> str:
    """C++ that keeps the arguments, and runs the kernel once per thread of every block."""
    types = parameters(code, kernel)
    kept = "".join(f"static {kind} kept_{i};\n" for i, kind in enumerate(types))
    given = ", ".join(f"{kind} a{i}" for i, kind in enumerate(types))
    keep = " ".join(f"kept_{i} = a{i};" for i in range(len(types)))
    call = ", ".join(f"kept_{i}" for i in range(len(types)))
    return f"""
{kept}static void call() {{ {kernel}({call}); }}
extern "C" int launch(const unsigned* grid, const unsigned* block, {given}) {{
    {keep} body = call;
    gridDim = {{grid[0], grid[1], grid[2]}}; blockDim = {{block[0], block[1], block[2]}};
    for (unsigned i = 0; i < grid[0] * grid[1] * grid[2]; i++) {{
        blockIdx = {{i % grid[0], i / grid[0] % grid[1], i / grid[0] / grid[1]}};
        if (!run_block()) return 1;
    }}
    return 0;
}}
"""


@cache
def compile_for_cpu(source: str, kernel: str, macros: tuple[tuple[str, int], ...]) -> Launcher:
    code = (HERE / source).read_text(encoding="utf-8")
    folder = Path(tempfile.mkdtemp(prefix="cuda_on_cpu"))
    defines = [f"-D{name}={value}" for name, value in macros]
    (folder / "unit.cpp").write_text(f'#include "{HEADER}"\n{code}\n{caller(code, kernel)}')
    command = ["g++", "-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-w", *defines]
    made = subprocess.run([*command, "unit.cpp", "-o", "unit.so"], cwd=folder, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    function = ctypes.CDLL(str(folder / "unit.so")).launch
    shutil.rmtree(folder)  # it is loaded

    def run(grid: Shape, block: Shape, args: tuple[Any, ...]) -> None:
        shapes = [(ctypes.c_uint * 3)(*(*shape, 1, 1)[:3]) for shape in (grid, block)]
        values = [TYPES[type(arg)](arg.item()) for arg in args]
        assert function(*shapes, *values) == 0, f"{kernel}: threads wait for each other for ever"

    return run
