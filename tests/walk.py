"""How a kernel is held to its specification: the pieces that every test of the walk shares."""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import arguments
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import dsv3.ops
from dsv3 import backends
from dsv3.ops.op import OPS, Kernel, Near, Op, use_backend

NARROW = (torch.bfloat16, torch.float16)


def load_everything() -> dict[str, st.SearchStrategy]:
    """Import every op family, every backend's kernels and every family's strategies; return the strategies by op."""
    dsv3.ops.load()
    for backend in backends.discover().values():
        backend.load()
    found: dict[str, st.SearchStrategy] = {}
    for module in pkgutil.iter_modules(arguments.__path__):
        found |= getattr(importlib.import_module(f"arguments.{module.name}"), "ARGUMENTS", {})
    return found


ARGUMENTS = load_everything()


def cells() -> list[tuple[Op, str, Kernel]]:
    """Every (op, backend, kernel) that this machine can run; the specification of every op stands for itself."""
    kernels = [
        (op, backend, kernel)
        for op in OPS.values()
        for backend, kernels in op.kernels.items()
        for kernel in kernels
        if kernel.usable
    ]
    return [(op, "specification", op.specification) for op in OPS.values()] + kernels


def cell_name(value: Any) -> str:
    return getattr(value, "name", getattr(value, "provider", value))


def clone(args: Any) -> Any:
    return tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, args)


def is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize > 1


def widen(args: Any) -> Any:
    """The same arguments in float64: real tensors and dtypes asked for. FP8 values, integers and bytes are kept."""

    def wide(value: Any) -> Any:
        if is_real(value):
            return value.double()
        return torch.float64 if value in (torch.float32, torch.bfloat16) else value

    return tree_map(wide, args)


def outputs(result: Any) -> tuple[Tensor, ...]:
    """The tensors that an op returned, those within lists too."""
    return tuple(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))


def assert_near(got: Tensor, want: Tensor, near: Near, narrow: bool, name: str) -> None:
    """Equal where the output is exact; else near as a whole and in its worst row."""
    assert got.shape == want.shape, f"{name}: {tuple(got.shape)} instead of {tuple(want.shape)}"
    tolerance = near.bf16 if narrow or got.dtype in NARROW else near.f32
    if not got.is_floating_point() or tolerance == 0.0:
        as_numbers = got.dtype not in (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
        same = got.double() if got.is_floating_point() else got
        assert (
            torch.equal(same.nan_to_num(7.0), want.to(same.dtype).nan_to_num(7.0))
            if as_numbers
            else (torch.equal(got.view(torch.uint8), want.to(got.dtype).view(torch.uint8)))
        ), f"{name}: not equal"
        return
    got, want = got.double(), want.double()
    infinite = want.isinf()
    assert torch.equal(got[infinite], want[infinite]), f"{name}: infinities differ"
    got, want = got.masked_fill(infinite, 0.0), want.masked_fill(infinite, 0.0)
    assert torch.isfinite(got).all(), f"{name}: not finite"
    if got.dim() == 0:
        got, want = got[None], want[None]
    error, size = (got - want).norm(dim=-1), want.norm(dim=-1)
    assert error.norm() <= tolerance * size.norm() + 1e-30, f"{name}: off by {(error.norm() / size.norm()).item():.2e}"
    if got.dim() > 1:  # one wrong row must not hide among many right ones; rows of noise near zero may
        floor = size.max() * 1e-3
        assert (error <= 4 * tolerance * size.clamp_min(floor) + 1e-30).all(), f"{name}: a row is off"


def on_device(op: Op, args: tuple, device: str) -> tuple:
    """The same arguments on a device; what an op wants on the host (`lens_cpu`) stays there."""

    def move(name: str, value: Any) -> Any:
        moved = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, value)
        return value if name.endswith("_cpu") else moved

    return tuple(move(name, value) for name, value in zip(op.signature.parameters, args, strict=False))


def hold(
    op: Op,
    backend: str,
    kernel: Kernel,
    args: tuple,
    device: str = "cpu",
    allowance: Callable[[Op, Near], Near] = lambda op, near: near,
) -> bool:
    """Run one kernel on `args` and compare with the specification in float64 (in the arguments' dtype where the op
    specifies its rounding); False if it does not take them. allowance: what is asked of each output in place of the
    op's tolerance."""
    with use_backend(backend):
        for_kernel, for_oracle = on_device(op, clone(args), device), clone(args) if op.rounds else widen(clone(args))
        if not kernel.supports(*for_kernel):
            return False
        got = kernel.run(*for_kernel)
    got, for_kernel = tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, (got, for_kernel))
    want = op.oracle(*for_oracle)
    narrow = any(isinstance(leaf, Tensor) and leaf.dtype in NARROW for leaf in tree_leaves(args))
    got, want = outputs(got), outputs(want)
    assert len(got) == len(want)
    nears = op.tolerance if isinstance(op.tolerance, tuple) else (op.tolerance,) * len(got)
    nears += nears[-1:] * (len(got) - len(nears))  # the last output may be a list
    nears = tuple(allowance(op, near) for near in nears)
    for index, (one, other, near) in enumerate(zip(got, want, nears, strict=True)):
        assert_near(one, other, near, narrow, f"{op.name}[{index}]")
    for name, one, other in zip(op.signature.parameters, for_kernel, for_oracle, strict=False):
        for written, expected in zip(tree_leaves(one), tree_leaves(other), strict=True):
            if isinstance(written, Tensor) and name in op.mutates:
                assert_near(written, expected, nears[0] if nears else op.tolerance, narrow, f"{op.name}({name})")
    return True
