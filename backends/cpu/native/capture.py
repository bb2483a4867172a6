"""Capture and replay of a step as a list of calls in C++ (`ops.capture`), where every op of it has a kernel here.

A decoding step of a small model takes a millisecond of Python and a tenth of that of arithmetic. The program holds the
kernels with addresses, so all that the step made while it was recorded is kept, and read and written again.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ....ops.capture import CAPTURERS, Function, NotCapturable, require_same_shapes
from ....ops.op import OPS
from . import are_small, built, extension, is_real

aten = torch.ops.aten


def _copy(source: Tensor, target: Tensor) -> None:
    """Both of one shape, of up to three dimensions."""
    missing = 3 - source.dim()
    if missing < 0 or not (is_real(source) and is_real(target)):
        raise NotCapturable
    sizes = (1,) * missing + tuple(source.shape)
    strides = [(0,) * missing + tensor.stride() for tensor in (source, target)]
    extension.copy(source.data_ptr(), target.data_ptr(), *sizes, *strides[0], *strides[1])


def _clone(x: Tensor, memory_format: torch.memory_format | None = None) -> Tensor:
    out = torch.empty(x.shape)
    _copy(x, out)
    return out


def _cat(tensors: list[Tensor], dim: int = 0) -> Tensor:
    first = tensors[0]
    if any(tensor.dim() != first.dim() for tensor in tensors):
        raise NotCapturable
    dim = dim % first.dim()
    sizes = [tensor.shape[dim] for tensor in tensors]
    out = torch.empty(*first.shape[:dim], sum(sizes), *first.shape[dim + 1 :])
    for tensor, part in zip(tensors, out.split(sizes, dim), strict=True):
        _copy(tensor, part)
    return out


def _add(a: Tensor, b: Tensor | float, alpha: float = 1) -> Tensor:
    if not isinstance(b, Tensor) or alpha != 1 or a.shape != b.shape or not are_small(a, b):
        raise NotCapturable
    out = torch.empty_like(a)
    extension.add(a.data_ptr(), b.data_ptr(), out.data_ptr(), a.numel())
    return out


def _embedding(weight: Tensor, tokens: Tensor, *of_gradients: int | bool) -> Tensor:
    if not (is_real(weight) and weight.is_contiguous() and tokens.dtype is torch.int64 and tokens.is_contiguous()):
        raise NotCapturable
    out = torch.empty(*tokens.shape, weight.shape[1])
    extension.embedding(
        weight.data_ptr(), tokens.data_ptr(), out.data_ptr(), tokens.numel(), weight.shape[1], len(weight)
    )
    return out


# What core does with tensors between its ops.
BETWEEN: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: _add,
    aten.cat.default: _cat,
    aten.clone.default: _clone,
    aten.embedding.default: _embedding,
}

# Views where that can be, else copies: inference mode hands them over in one piece.
COMPOSITE = {aten.flatten.using_ints, aten.reshape.default, aten.contiguous.default}


def _aliases(result: Any, args: Any) -> bool:
    """Is the result nothing but memory of the arguments, in another shape?"""
    known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
    made = tree_leaves(result)
    return bool(made) and all(isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() in known for leaf in made)


class _Recorder(TorchDispatchMode):
    """Sees to it that whatever a step does is done by a kernel that writes itself down, and keeps its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.kept.append((args, kwargs))
        if func.namespace == "dsv3":
            kernel = OPS[func._schema.name.removeprefix("dsv3::")].choose(*args, **kwargs)
            if kernel.provider != "native":
                raise NotCapturable(func)
            result = kernel.run(*args, **kwargs)
        elif func in BETWEEN:
            result = BETWEEN[func](*args, **kwargs)
        elif func in COMPOSITE:
            with self:
                return func.decompose(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
            if func._schema.is_mutable or not _aliases(result, args):
                raise NotCapturable(func)
        self.kept.append(result)
        return result


class NativeProgram:
    """A step as a list of calls. NotCapturable, where it contains anything else."""

    def __init__(self, step: Function, inputs: tuple[Tensor, ...]):
        self.inputs = tuple(tensor.clone() for tensor in inputs)
        self.program, recorder = extension.Program(), _Recorder()
        with torch.no_grad():
            step(*self.inputs)  # what a step makes once and keeps (tables, absorbed weights) is no part of the program
            self.program.begin()
            try:
                with recorder:
                    self.result = step(*self.inputs)
            finally:
                self.program.end()
        self.kept = recorder.kept
        self.flat = isinstance(self.result, tuple) and all(isinstance(part, Tensor) for part in self.result)

    def replay(self, *inputs: Tensor) -> Any:
        require_same_shapes(self.inputs, inputs)
        for captured, tensor in zip(self.inputs, inputs, strict=True):
            captured.copy_(tensor)
        self.program.run()
        if self.flat:  # to walk a tree takes as long as a layer
            return tuple([tensor.clone() for tensor in self.result])
        return tree_map_only(Tensor, torch.clone, self.result)


if built():
    CAPTURERS["cpu"] = NativeProgram
