"""Compiling kernels ahead of time, for chips that are not here, and reading off what they would use.

A launcher runs on tensors of the meta device while its launches are recorded; each is then compiled as Triton's own
launch would have specialised it: sizes that are 1 or divisible by 16, aligned pointers (without that, Triton compiles a
kernel that nobody would run: no asynchronous copies, no multiple buffers).

A kernel that compiles may still not run: a program must fit into the chip's shared memory, and registers that spill to
memory make it slow. `Build.faults` says both.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from .. import first_line
from .runtime import Launch
from .target import Target

TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv", torch.float8_e4m3fnuz: "fp8e4b8",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip


@dataclass(frozen=True)
class Build:
    """What compiling one launch for one target gave.

    shared: bytes of shared memory of a program. spills: registers (AMD) or bytes (NVIDIA) that go to memory, of a
    thread. registers: of a thread. matrix: the matrix instructions that the code holds. copies: it copies to shared
    memory asynchronously (cp.async, TMA).
    """

    kernel: str
    target: str
    options: dict[str, Any]
    shared: int = 0
    spills: int = 0
    registers: int = 0
    matrix: tuple[str, ...] = ()
    copies: bool = False
    error: str = ""
    faults: list[str] = field(default_factory=list)


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def _is_aligned(value: Any) -> bool:
    """As Triton sees it: memory of torch's allocator, unless a view begins in the middle of 16 bytes."""
    if isinstance(value, Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0
    return isinstance(value, int) and not isinstance(value, bool) and value % 16 == 0


def source_of(launch: Launch) -> ASTSource:
    """The kernel, specialised as this launch would specialise it."""
    fixed = {param.name for param in launch.kernel.params if param.is_constexpr}
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        constant = name in fixed or value is None or (isinstance(value, int) and value == 1)
        signature[name] = "constexpr" if constant else _type_of(value)
        if constant:
            constants[(place,)] = value
        elif _is_aligned(value):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def gpu_target(target: Target) -> GPUTarget:
    arch = int(target.name[3:]) if target.backend == "cuda" else target.name
    return GPUTarget("cuda" if target.backend == "cuda" else "hip", arch, target.warp)


def build(launch: Launch, target: Target) -> Build:
    """Compile; an error of the compiler becomes `error`, everything that would keep the kernel from running a fault."""
    name = launch.kernel.fn.__name__
    try:
        compiled = triton.compile(source_of(launch), target=gpu_target(target), options=launch.options)
    except Exception as error:  # whatever the compiler's passes raise
        text = f"{type(error).__name__}: {first_line(error)}"
        return Build(name, target.name, launch.options, error=text, faults=[text])
    read = _read_nvidia if target.backend == "cuda" else _read_amd
    found = {"shared": compiled.metadata.shared, **read(compiled.asm, target)}
    faults = []
    if found["shared"] > target.shared:
        faults.append(f"{found['shared']:,} bytes of shared memory, of {target.shared:,}")
    if found["spills"]:
        faults.append(f"spills {found['spills']}")
    uses_dot = "tt.dot" in compiled.asm["ttir"]
    if uses_dot and not found["matrix"] and _is_narrow(launch):
        faults.append("no matrix instructions")
    return Build(name, target.name, launch.options, faults=faults, **found)


def _is_narrow(launch: Launch) -> bool:
    """Does it multiply numbers that matrix units take? float32 they do not, at full precision."""
    dtypes = {value.dtype for value in launch.arguments.values() if isinstance(value, Tensor)}
    return bool(dtypes & {torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e4m3fnuz})


def _read_nvidia(asm: dict[str, Any], target: Target) -> dict[str, Any]:
    """ptxas says what Triton only learns on a device. The names sm_90a and so on unlock wgmma."""
    ptx = asm["ptx"]
    arch = re.search(r"^\.target (\S+?)(?:,|\s|$)", ptx, re.M)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [
            get_ptxas(int(target.name[3:])).path,
            "-v",
            f"--gpu-name={arch[1] if arch else target.name}",
            str(path),
            "-o",
            f"{path}.cubin",
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", said)))
    registers = max(map(int, re.findall(r"Used (\d+) registers", said)), default=0)
    matrix = sorted(set(re.findall(r"(wgmma\.mma_async[\w.]*|mma\.sync[\w.]*)", ptx)))
    return {
        "spills": spills, "registers": registers, "matrix": tuple(matrix),
        "copies": "cp.async" in ptx,
    }  # fmt: skip


def _read_amd(asm: dict[str, Any], target: Target) -> dict[str, Any]:
    code = asm["amdgcn"]

    def count(name: str) -> int:
        return sum(map(int, re.findall(rf"\.{name}:\s+(\d+)", code)))

    return {
        "spills": count("vgpr_spill_count"), "registers": count("vgpr_count"),
        "matrix": tuple(sorted(set(re.findall(r"v_mfma_\w+", code)))),
    }  # fmt: skip
