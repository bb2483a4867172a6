"""Stand-ins for vendors' libraries: the signatures that were read, what they demand, the answer by the specification.

Where a library leaves memory unwritten or undefined, a stand-in leaves NaN.
"""

import sys
import types
from typing import Any

import pytest

from dsv3.backends import probing
from dsv3.ops.op import Kernel, Op


def install(monkeypatch: pytest.MonkeyPatch, **modules: Any) -> None:
    """Put modules under the names of libraries (`a__b` stands for a.b) and forget what was found before."""
    monkeypatch.setattr(probing, "_found", {})
    monkeypatch.setattr(probing, "REASONS", {})
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name.replace("__", "."), module)


def module(name: str, **attributes: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__dict__.update(attributes)
    return made


def adapter(op: Op, provider: str, backend: str = "cuda") -> Kernel:
    """The kernel of this provider."""
    (kernel,) = [kernel for kernel in op.kernels[backend] if kernel.provider == provider]
    return kernel
