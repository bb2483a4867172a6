"""The C++ kernels of the cpu backend, one module per kind of CPU; all else stands in pyproject.toml.

They are optional: where there is no compiler, or no Python.h, the package installs without, and PyTorch computes.
"""

import platform
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

NATIVE = Path("backends/cpu/native")
X86 = platform.machine().lower() in ("x86_64", "amd64")
# Module -> what the compiler may use. native/__init__.py takes the first that the CPU can run.
X86_KINDS = {"_avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"], "_avx2": ["-march=x86-64-v3"]}
KINDS: dict[str, list[str]] = X86_KINDS if X86 else {"_any": []}

setup(
    script_name="setup.py",  # or this file is taken for a module of the package, as which it would be installed
    ext_modules=[
        Pybind11Extension(
            f"dsv3.backends.cpu.native.{kind}",
            sorted(map(str, NATIVE.glob("*.cpp"))),
            depends=sorted(map(str, NATIVE.glob("*.h"))),
            include_dirs=[str(NATIVE)],
            define_macros=[("MODULE", kind)],
            extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math", *flags],
            cxx_std=17,
            optional=True,
        )
        for kind, flags in KINDS.items()
    ],
)
