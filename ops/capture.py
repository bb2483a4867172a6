"""Capture and replay of a step: one seam for CUDA graphs, NPU graphs and recorded programs.

A step is a function of tensors to tensors that is called many times with the same shapes (one decoding step). Capturing
runs it and keeps what it did; a replay does the same to new values. Numbers that the step computes on the host
(lengths, splits) are frozen by the capture, as they are in a CUDA graph: they belong into tensors.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from .op import active_backend

Function = Callable[..., Any]


class Captured(Protocol):
    def replay(self, *inputs: Tensor) -> Any:
        """The step's result for other values of the captured inputs' shapes and dtypes."""


def require_same_shapes(captured: Sequence[Tensor], given: Sequence[Tensor]) -> None:
    """Raise ValueError unless these are of the captured ones' shapes and dtypes."""
    pairs = zip(captured, given, strict=False)
    if len(captured) == len(given) and all(one.shape == two.shape and one.dtype is two.dtype for one, two in pairs):
        return
    known, come = ([(tensor.shape, tensor.dtype) for tensor in tensors] for tensors in (captured, given))
    raise ValueError(f"captured for {known}, replayed with {come}: capture once per shape")


class Program:
    """The recorded list of operator calls, run without the modules' Python around it. Works on every device."""

    def __init__(self, step: Function, inputs: tuple[Tensor, ...]):
        with torch.no_grad():
            step(*inputs)  # what a step makes once and keeps (tables, absorbed weights) is no part of the program
            self.module = make_fx(lambda *tensors: step(*tensors))(*inputs)  # make_fx miscounts a method's arguments
        self.shapes = [tensor.to("meta") for tensor in inputs]

    def replay(self, *inputs: Tensor) -> Any:
        require_same_shapes(self.shapes, inputs)
        with torch.no_grad():
            return self.module(*inputs)


class NotCapturable(Exception):
    """A step that does what its backend's way of capturing cannot repeat. Nothing but time is lost."""


# backend -> what captures there, faster than the step itself. A backend that is not named has nothing of the kind.
CAPTURERS: dict[str, Callable[[Function, tuple[Tensor, ...]], Captured]] = {}


def capture_for_speed(step: Function, *inputs: Tensor) -> Captured | None:
    """Run `step(*inputs)` on the active backend, once or twice, and keep it; None where a replay would gain nothing."""
    capturer = CAPTURERS.get(active_backend())
    if capturer is None:
        return None
    try:
        return capturer(step, inputs)
    except NotCapturable:
        return None


def capture(step: Function, *inputs: Tensor) -> Captured:
    """The same, as a recorded program where there is nothing faster."""
    return capture_for_speed(step, *inputs) or Program(step, inputs)
