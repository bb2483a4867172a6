"""Compiling and launching kernels of CUDA C++.

A kernel's arguments are `long long`, `float`, and pointers, which may be null; what is fixed for a model (experts,
groups, choices) is compiled in by macros, so that loops unroll and arrays stay in registers.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).parent
Shape = tuple[int, ...]
Launcher = Callable[[Shape, Shape, tuple[Any, ...]], None]  # grid, block, arguments

# What compiles instead of CuPy; the tests put a compiler for the CPU here.
compiler: Callable[[str, str, tuple[tuple[str, int], ...]], Launcher] | None = None


def available() -> bool:
    """Is there a GPU, and something that compiles for it?"""
    if compiler is not None:
        return True
    return torch.cuda.is_available() and (find_spec("cupy") is not None or hasattr(torch.cuda, "_compile_kernel"))


def launch(
    source: str, kernel: str, grid: Shape, block: Shape, *args: Tensor | int | float | None, **macros: int
) -> None:
    """Run `kernel` of the file `source` on the current stream; a grid without blocks launches nothing."""
    if all(grid):
        compile_ = compiler or _compiled
        compile_(source, kernel, tuple(sorted(macros.items())))(grid, block, tuple(map(_argument, args)))


def _argument(value: Tensor | int | float | None) -> Any:
    if value is None:
        return np.uint64(0)
    if isinstance(value, Tensor):
        return np.uint64(value.data_ptr())
    return np.float32(value) if isinstance(value, float) else np.int64(value)


@cache
def _compiled(source: str, kernel: str, macros: tuple[tuple[str, int], ...]) -> Launcher:
    files = ("hip.h", source) if torch.version.hip else (source,)
    code = "\n".join((HERE / file).read_text(encoding="utf-8") for file in files)
    return _by_cupy(code, kernel, macros) if find_spec("cupy") else _by_torch(code, kernel, macros)


def _by_cupy(code: str, kernel: str, macros: tuple[tuple[str, int], ...]) -> Launcher:
    import cupy

    options = ("-std=c++17", *(f"-D{name}={value}" for name, value in macros))
    function = cupy.RawModule(code=code, options=options).get_function(kernel)

    def run(grid: Shape, block: Shape, args: tuple[Any, ...]) -> None:
        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            function(grid, block, args)

    return run


def _by_torch(code: str, kernel: str, macros: tuple[tuple[str, int], ...]) -> Launcher:
    """torch's own NVRTC: takes tensors or plain numbers, so that addresses go as the numbers they are."""
    defines = "".join(f"#define {name} {value}\n" for name, value in macros)
    function = torch.cuda._compile_kernel(defines + code, kernel)

    def run(grid: Shape, block: Shape, args: tuple[Any, ...]) -> None:
        filled = (*grid, 1, 1)[:3], (*block, 1, 1)[:3]
        function(grid=filled[0], block=filled[1], args=[arg.item() for arg in args])

    return run
