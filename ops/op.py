"""An op: one specification, many kernels.

The specification is a plain PyTorch function. It is the documentation, the reference on any device, the FakeTensor
rule, the decomposition on export, and the oracle of the tests. A backend adds kernels to it; every call runs the first
kernel of the active backend that is available and supports the arguments, and the specification where there is none.

    @op(tolerance=4e-3, cost=gemm_cost)
    def fp8_gemm(a: Tensor, ...) -> Tensor: ...

    @fp8_gemm.kernel("cuda", "triton")
    def fp8_gemm_triton(a, ...): ...

Rules of a specification: it never reads a tensor's values on the host, never returns an alias of an input, and computes
in float32 at least, so that float64 arguments make it its own oracle.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ..errors import UserError
from .shapes import Shapes

LIBRARY = torch.library.Library("dsv3", "DEF")
OPS: dict[str, "Op"] = {}

# Process-wide on purpose: autograd runs backward in threads of its own, which see no ContextVar.
_active_backend = "cpu"


# Backends whose kernels read memory by the sizes that they are told: there shapes are checked before one runs.
GUARDED: set[str] = set()


def active_backend() -> str:
    return _active_backend


def set_backend(name: str) -> None:
    """Make `name` the backend of every later call. `dsv3.backends.activate` checks the machine first; prefer it."""
    global _active_backend
    _active_backend = name


def _no_registry(name: str) -> Any:
    raise RuntimeError("no backends are registered: import dsv3.backends first")


# What turns a name into a usable backend: `dsv3.backends.activate`, put here by that package, unknown on this floor.
activator: Callable[[str], Any] = _no_registry


def activate_backend(name: str) -> Any:
    """Probe the machine for backend `name` ("auto": the best one), load its kernels and make it the active one."""
    return activator(name)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops of a `with` block on the kernels of backend `name`."""
    previous = _active_backend
    set_backend(name)
    try:
        yield
    finally:
        set_backend(previous)


@dataclass(frozen=True)
class Near:
    """How far a kernel may be from the specification in float64: ||kernel - spec|| / ||spec||, as a whole and by row.

    f32 holds where inputs and outputs are float32 (or FP8 with float32 scales), bf16 where one of them is 16 bits wide.
    """

    f32: float
    bf16: float


EXACT = Near(0.0, 0.0)
BF16_ROUNDING = 4e-3  # half a unit in the last place of bfloat16 is 2**-9; the rest is room for one more rounding


class OpError(RuntimeError):
    """A call that an op cannot compute: wrong shapes, dtypes or devices. Says what came and what the op expects."""


def _described(value: Any) -> str:
    """float32 [4, 7168] on cuda:0, or the value itself."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor):
        return f"[{', '.join(map(_described, value))}]"
    return str(value)


def always(*args: Any, **kwargs: Any) -> bool:
    return True


def _near(tolerance: float | Near) -> Near:
    if isinstance(tolerance, Near):
        return tolerance
    return Near(tolerance, max(tolerance, BF16_ROUNDING)) if tolerance else EXACT


@dataclass(frozen=True)
class Kernel:
    """One way to compute an op.

    provider: whose it is: "torch", "triton", "deep_gemm", "torch_npu", ...
    priority: higher is asked first.
    available: can it run on this machine at all? Asked once.
    supports: can it compute these arguments? Asked on every call.
    checked: the strongest check that this kernel has passed: "hardware", "interpreter", "compiled", "emulated", or
        "nothing". The walk of the tests runs every kernel of the cpu backend on hardware; others must say.
    pack: Weight -> Weight in the layout that this kernel wants; run once, when weights are loaded.
    """

    provider: str
    run: Callable[..., Any]
    priority: int = 0
    available: Callable[[], bool] = always
    supports: Callable[..., bool] = always
    checked: str = "nothing"
    pack: Callable[[Any], Any] | None = None

    @cached_property
    def usable(self) -> bool:
        return self.available()


def _dispatcher_is_needed() -> bool:
    """For gradients, traces, fake tensors, profiles. Plain inference goes without: to box the arguments of a decoding
    step's calls takes a tenth of the step."""
    return (
        torch.compiler.is_compiling()  # first: tracing follows no further
        or not torch.is_inference_mode_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.profiler._is_profiler_enabled
    )


class Op:
    """See the module's docstring.

    tolerance: see Near; one for all outputs or one per output. A number t stands for Near(t, max(t, BF16_ROUNDING)),
        and 0.0 for EXACT; integer and boolean outputs are always held to equality.
    shapes: of its tensors, by the rules of shapes.py; asked before a kernel of a guarded backend runs.
    cost: arguments -> (floating-point operations, bytes that must move), for rooflines.
    fake, oracle, lowering: replace the specification in one of its roles, where it cannot play all.
    mutates: names of the arguments that are written in place.
    quantized: the outputs are rounded to few bits, so finite differences say nothing about the gradient.
    rounds: rounding to the arguments' dtype is part of the specification: the oracle takes them as they are.
    """

    def __init__(
        self,
        spec: Callable[..., Any],
        tolerance: float | Near | tuple[float | Near, ...],
        shapes: dict[str, str | tuple[str, ...]] | None = None,
        cost: Callable[..., tuple[int, int]] | None = None,
        fake: Callable[..., Any] | None = None,
        oracle: Callable[..., Any] | None = None,
        lowering: dict[str, Callable[..., Any]] | None = None,
        mutates: tuple[str, ...] = (),
        quantized: bool = False,
        rounds: bool = False,
    ):
        self.name: str = spec.__name__
        self.spec, self.cost, self.quantized, self.rounds = spec, cost, quantized, rounds
        self.tolerance = tuple(map(_near, tolerance)) if isinstance(tolerance, tuple) else _near(tolerance)
        self.oracle, self.lowering, self.mutates = oracle or spec, lowering or {}, mutates
        self.__doc__ = spec.__doc__
        self.signature = inspect.signature(spec)
        self.shapes = None if shapes is None else Shapes(self.signature, shapes)
        self.kernels: dict[str, list[Kernel]] = {}
        self.gradient_of: tuple[str, ...] = ()
        self.specification = Kernel("specification", spec, checked="reference")
        # Library.define costs a third of custom_op per call (2.3 against 6.9 us): decoding is made of small calls.
        LIBRARY.define(self.name + torch.library.infer_schema(spec, mutates_args=mutates))
        LIBRARY.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"dsv3::{self.name}", fake or self._fake, lib=LIBRARY)
        self.overload = getattr(torch.ops.dsv3, self.name).default
        OPS[self.name] = self

    def __repr__(self) -> str:
        return f"Op({self.name}{self.signature})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _dispatcher_is_needed():
            return self.overload(*args, **kwargs)
        return self._run(*args, **kwargs)

    def kernel(self, backend: str, provider: str, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register the decorated function as a kernel of `backend`; `options` are Kernel's fields."""

        def register(run: Callable[..., Any]) -> Callable[..., Any]:
            kernels = self.kernels.setdefault(backend, [])
            checked = {"checked": "hardware"} if backend == "cpu" else {}
            kernels.append(Kernel(provider, run, **(checked | options)))
            kernels.sort(key=lambda kernel: -kernel.priority)
            return run

        return register

    def backward(
        self, setup: Callable[..., None], of: tuple[str, ...] | None = None
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register the decorated function as the op's gradient; `setup(ctx, inputs, output)` saves what it needs.

        of: names of the arguments that have a gradient; all real ones by default.
        """

        def register(backward: Callable[..., Any]) -> Callable[..., Any]:
            torch.library.register_autograd(f"dsv3::{self.name}", backward, setup_context=setup, lib=LIBRARY)
            self.gradient_of = tuple(self.signature.parameters) if of is None else of
            return backward

        return register

    def choose(self, *args: Any, **kwargs: Any) -> Kernel:
        """The kernel that a call with these arguments runs on the active backend."""
        for kernel in self.kernels.get(_active_backend, ()):
            if kernel.usable and kernel.supports(*args, **kwargs):
                return kernel
        return self.specification

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        try:
            if _active_backend in GUARDED and self.shapes is not None:
                self.shapes.require(args, kwargs)
            return self.choose(*args, **kwargs).run(*args, **kwargs)
        except (ValueError, TypeError, IndexError, AttributeError, RuntimeError) as error:
            raise self._explained(error, args, kwargs) from error

    def _explained(self, error: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exception:
        """The error with the op's name, what it was called with, and what it expects."""
        if isinstance(error, UserError | OpError):
            return error
        given = [
            f"{name}={_described(value)}" for name, value in self.signature.bind(*args, **kwargs).arguments.items()
        ]
        called = f"dsv3.{self.name}({', '.join(given)})"
        if isinstance(error, torch.OutOfMemoryError):
            size = sum(leaf.nbytes for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)) / 2**20
            text = f"{called}: out of memory; its arguments alone take {size:,.1f} MiB. {error}"
            return torch.OutOfMemoryError(text)
        return OpError(f"{called}: {error}\nIt expects: {inspect.cleandoc(self.__doc__ or '')}")

    def _fake(self, *args: Any, **kwargs: Any) -> Any:
        # Through the specification, then fresh memory: an op never returns an alias of its input.
        return tree_map_only(Tensor, lambda t: t.new_empty_strided(t.shape, t.stride()), self.spec(*args, **kwargs))


def op(**options: Any) -> Callable[[Callable[..., Any]], Op]:
    """Turn a specification into an op; `options` are Op's."""
    return lambda spec: Op(spec, **options)


def decompositions(target: str = "") -> dict[Any, Callable[..., Any]]:
    """For `ExportedProgram.run_decompositions`: every op as plain PyTorch, in the form that suits `target`."""
    return {op.overload: op.lowering.get(target, op.spec) for op in OPS.values()}
