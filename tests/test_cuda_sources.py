"""The kernels in CUDA C++: on fibers of the CPU against their specifications, and through the compilers of the GPUs."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cuda_on_cpu
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_walk import QUICK
from walk import ARGUMENTS, cell_name, hold

from dsv3.backends.cupy import module, permutation, routing, sampling
from dsv3.backends.triton.target import TARGETS
from dsv3.ops import load

CELLS = [(op, kernel) for op in load().values() for kernel in op.kernels.get("cuda", ()) if kernel.provider == "cupy"]


@pytest.fixture
def on_cpu(monkeypatch):
    if cuda_on_cpu.compiler() is None:
        pytest.skip("needs g++")
    monkeypatch.setattr(module, "compiler", cuda_on_cpu.compile_for_cpu)


@pytest.mark.slow
@pytest.mark.parametrize("op, kernel", CELLS, ids=cell_name)
def test_kernel_matches_its_specification(op, kernel, on_cpu):
    taken = []

    @settings(QUICK, max_examples=20)
    @given(data=st.data())
    def walk(data):
        taken.append(hold(op, "cuda", kernel, data.draw(ARGUMENTS[op.name])))

    walk()
    assert any(taken), "it took none of the arguments"


V3 = {"EXPERTS": 256, "GROUPS": 8, "KEPT": 4, "CHOICES": 8, "SOFTMAX": 0, "GROUP_MAX": 0, "RENORMALIZE": 1}
MACROS = {
    "routing.cu": {**V3, "WARPS": routing.WARPS},
    "permutation.cu": {"EXPERTS": 256, "CHUNK": permutation.CHUNK, "ALIGN": 128},
    "sampling.cu": {"THREADS": sampling.THREADS},
}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", MACROS)
def test_a_source_compiles_for_nvidia_without_spills(source, chip, tmp_path):
    macros = [f"-D{name}={value}" for name, value in MACROS[source].items()]
    command = ["nvcc", "-std=c++17", f"-arch={chip}", "-cubin", "-Xptxas", "-v", *macros, str(module.HERE / source)]
    made = subprocess.run([*command, "-o", tmp_path / "unit.cubin"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    kernels = made.stderr.count("bytes spill stores")
    assert kernels == made.stderr.count(" 0 bytes spill stores, 0 bytes spill loads") > 0, made.stderr


CLANG = shutil.which("clang-19")
HIPRTC = Path(__file__).parent / "hiprtc.h"


@pytest.mark.skipif(CLANG is None, reason="needs clang-19")
@pytest.mark.parametrize("chip", ["gfx942", "gfx950"])
@pytest.mark.parametrize("source", MACROS)
def test_a_source_compiles_for_amd_without_scratch_memory(source, chip, tmp_path):
    """As HIP, behind hip.h. Kernels have the names by which they are launched, and keep everything in registers."""
    macros = [f"-D{name}={value}" for name, value in MACROS[source].items()]
    target = ["-x", "hip", f"--offload-arch={chip}", "-nogpulib", "-nogpuinc", "--cuda-device-only", "-O3", "-S"]
    before = ["-include", HIPRTC, "-include", module.HERE / "hip.h"]
    command = [CLANG, "-std=c++17", *target, *macros, *before, module.HERE / source, "-o", tmp_path / "unit.s"]
    made = subprocess.run(command, capture_output=True, text=True)
    if "invalid target ID" in made.stderr:
        pytest.skip(f"this clang does not know {chip}")
    assert made.returncode == 0, made.stderr
    told = (tmp_path / "unit.s").read_text()
    code = (module.HERE / source).read_text(encoding="utf-8")
    assert re.findall(r"^ +\.name: +(\w+)$", told, re.M) == re.findall(r"__global__ void (\w+)", code)
    assert re.findall(r"\.(?:private_segment_fixed_size|[sv]gpr_spill_count): +([1-9]\d*)", told) == []
    assert ".uses_dynamic_stack: true" not in told
    assert max(map(int, re.findall(r"\.group_segment_fixed_size: +(\d+)", told))) <= TARGETS["gfx942"].shared


def test_every_source_has_sizes_to_be_compiled_with():
    assert set(MACROS) == {file.name for file in module.HERE.glob("*.cu")}


def test_cupy_gets_the_source_its_macros_and_addresses(monkeypatch):
    made, calls = [], []

    def function(grid, block, args):
        calls.append((grid, block, args))

    def raw_module(code, options):
        made.append((code, options))
        return SimpleNamespace(get_function=lambda name: function)

    class Stream:
        def __init__(self, address):
            self.address = address

        def __enter__(self):
            assert self.address == 77

        def __exit__(self, *error):
            pass

    cupy = SimpleNamespace(RawModule=raw_module, cuda=SimpleNamespace(ExternalStream=Stream), __spec__=object())
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
    x = torch.zeros(4)
    module._compiled.cache_clear()
    module.launch("sampling.cu", "sample_kernel", (2,), (32,), x, None, 3, 2.5, THREADS=64)
    module.launch("sampling.cu", "sample_kernel", (0,), (32,), x, THREADS=64)
    module._compiled.cache_clear()
    (code, options), ((grid, block, args),) = made[0], calls
    assert "sample_kernel" in code and "-DTHREADS=64" in options and (grid, block) == ((2,), (32,))
    assert args == (x.data_ptr(), 0, 3, 2.5)
    assert [type(arg) for arg in args] == [np.uint64, np.uint64, np.int64, np.float32]
