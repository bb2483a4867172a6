"""How a kernel is declared, launched and registered."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton

from ...ops.op import Op
from . import interpreter
from .target import interpreted

BACKENDS = ("cuda", "rocm")


def kernel(function: Callable[..., Any]) -> Any:
    """`triton.jit`, with the interpreter's arithmetic repaired where this process interprets."""
    if interpreted():
        interpreter.repair()
    return triton.jit(function)


def device_function(function: Callable[..., Any]) -> Any:
    """A function that kernels call."""
    return kernel(function)


@dataclass(frozen=True)
class Launch:
    """One launch as it would have been: what the ahead-of-time compiler compiles."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]  # num_warps, num_stages, and what a chip knows besides


_recorded: list[Launch] | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launches of a `with` block are noted and not made. Tensors may then live on the meta device."""
    global _recorded
    previous, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = previous


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Device memory for tensor descriptors that a kernel makes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
    """Run `kernel` on `grid` programs. named: the kernel's further arguments and the chip's options (num_warps, ...).

    Products and sums are fused into one rounding only where `enable_fp_fusion=True` is given: most ops promise exact
    bytes. A grid without programs launches nothing.
    """
    named = {"enable_fp_fusion": False, **named}
    if _recorded is not None:
        names = kernel.arg_names
        arguments = dict(zip(names, args, strict=False)) | {k: v for k, v in named.items() if k in names}
        options = {k: v for k, v in named.items() if k not in names}
        _recorded.append(Launch(kernel, grid, arguments, options))
    elif all(grid):
        devices = {str(value.device) for value in (*args, *named.values()) if isinstance(value, torch.Tensor)}
        if len(devices) > 1:
            raise ValueError(f"its tensors are on {' and '.join(sorted(devices))}; bring them to one device")
        triton.set_allocator(_scratch)  # of this thread: autograd runs backward in threads of its own
        kernel[grid](*args, **named)


def can_launch() -> bool:
    """Is there a GPU, or an interpreter instead?"""
    return interpreted() or torch.cuda.is_available()


def gpu_kernel(
    op: Op, supports: Callable[..., bool], backends: tuple[str, ...] = BACKENDS, **options: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated launcher as the Triton kernel of `op` on both backends; `options` are Kernel's fields."""

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        for backend in backends:
            settings = {"available": can_launch, "checked": "interpreter"} | options
            op.kernel(backend, "triton", supports=supports, **settings)(run)
        return run

    return register


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two that is not below `size` and `least`: what a block of a kernel may measure."""
    return max(least, 1 << max(size - 1, 0).bit_length())
