"""Kernels in C++ for few rows of float32: the calls of a decoding step, which PyTorch's operators spend on overhead.

A step of a small model is some 90 calls, each of a few operators that take 2 to 20 us to say what takes one to compute.
Here each is one call of a function of `extension`, which gets addresses and sizes. Everything bigger, and every other
dtype, is left to PyTorch, which has threads and better products: `supports` of each kernel says where that begins.

setup.py builds the extension for several kinds of CPU; it is missing where there was no compiler.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

# What torch calls the CPU (ATEN_CPU_CAPABILITY overrides it) -> modules that it can run, the best first.
MODULES = {
    "AVX512": ("_avx512", "_avx2"),
    "AVX512_VNNI": ("_avx512", "_avx2"),
    "AVX2": ("_avx2",),
    "DEFAULT": ("_any",),
}

ROWS = 32  # of a product
SMALL_PRODUCT = 1 << 23  # multiplications
SMALL = 1 << 16  # numbers that are read once


def _load() -> Any:
    for name in MODULES.get(torch.backends.cpu.get_cpu_capability(), ("_any",)):
        try:
            return import_module(f".{name}", __name__)
        except ImportError:
            continue
    return None


extension: Any = _load()


def built() -> bool:
    return extension is not None


def is_real(x: Tensor) -> bool:
    """Float32 that lies in memory of this machine (a tensor on meta does not)."""
    return x.dtype is torch.float32 and x.is_cpu


def are_small(*tensors: Tensor) -> bool:
    """Contiguous, real, and few numbers in each."""
    return all(is_real(x) and x.numel() <= SMALL and x.is_contiguous() for x in tensors)
