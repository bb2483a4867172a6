"""The walk on a GPU: every kernel of its backend against its specification, again and again for races, and under
compute-sanitizer. `make test-gpu`."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_walk import QUICK
from torch import Tensor
from torch.utils._pytree import tree_leaves
from walk import ARGUMENTS, cell_name, clone, hold, on_device

from dsv3.ops import load
from dsv3.ops.op import use_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
BACKEND = "rocm" if torch.version.hip else "cuda"
REPEATS = 100


def cells() -> list:
    """Kernels that run on this GPU alone; collectives want more than one."""
    return [
        (op, kernel)
        for op in load().values()
        if "group" not in op.signature.parameters
        for kernel in op.kernels.get(BACKEND, ())
        if kernel.usable
    ]


every_kernel = pytest.mark.parametrize("op, kernel", cells(), ids=cell_name)


@every_kernel
def test_kernel_matches_its_specification(op, kernel):
    taken = []

    @settings(QUICK, max_examples=50)
    @given(data=st.data())
    def walk(data):
        taken.append(hold(op, BACKEND, kernel, data.draw(ARGUMENTS[op.name]), "cuda"))

    walk()
    if not any(taken):
        pytest.skip("it takes none of the arguments on this chip")


@every_kernel
@settings(QUICK, max_examples=2)
@given(data=st.data())
def test_kernel_gives_the_same_bits_every_time(op, kernel, data):
    """A race shows as a difference; a float atomic too."""
    args = data.draw(ARGUMENTS[op.name])
    with use_backend(BACKEND):
        first = None
        for _ in range(REPEATS):
            given = on_device(op, clone(args), "cuda")
            if not kernel.supports(*given):
                return
            result = kernel.run(*given)
            bits = [
                leaf.contiguous().reshape(-1).view(torch.uint8)
                for leaf in tree_leaves((result, given))
                if isinstance(leaf, Tensor)
            ]
            first = first or bits
            assert all(map(torch.equal, bits, first))


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")
def test_no_kernel_reads_or_writes_where_it_must_not():
    """The walk once more under compute-sanitizer, in a process without torch's memory pool, which would hide it."""
    walk = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "matches_its_specification", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = ["compute-sanitizer", "--error-exitcode", "9", *walk]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)
    assert done.returncode == 0, done.stdout[-4000:]
