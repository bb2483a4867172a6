"""What a chip can do, as far as kernels ask: its FP8 format, its shared memory, how many of its units there are."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

from ...ops.formats import E4M3, E4M3_FNUZ
from ...ops.op import active_backend


@dataclass(frozen=True)
class Target:
    """name: as compilers call it. backend: "cuda" or "rocm".

    fp8: the format that the matrix unit multiplies, None where it multiplies none: there FP8 is decoded in the kernel.
    shared: bytes of shared memory (LDS) that one program may use. units: multiprocessors (compute units) of the usual
    card; a persistent kernel starts as many programs. warp: threads of a warp (wavefront).
    """

    name: str
    backend: str
    fp8: torch.dtype | None
    shared: int
    units: int
    warp: int = 32

    @property
    def decodes_fp8(self) -> bool:
        return self.fp8 is None


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", None, 166_912, 108),  # A100
        Target("sm_89", "cuda", E4M3, 101_376, 142),  # L40S, RTX 4090; and sm_86 and sm_120, which share as much
        Target("sm_90", "cuda", E4M3, 232_448, 132),  # H100, H200
        Target("gfx942", "rocm", E4M3_FNUZ, 65_536, 304, 64),  # MI300X
        Target("gfx950", "rocm", E4M3, 163_840, 256, 64),  # MI350X
    )
}
USUAL = {"cuda": TARGETS["sm_90"], "rocm": TARGETS["gfx942"]}  # for whom the interpreter plays

_chosen: Target | None = None


def interpreted() -> bool:
    """Do Triton kernels run in the interpreter of this process?"""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def nearest(major: int, minor: int, shared: int) -> Target:
    """The newest target whose tiles fit into a card of this compute capability: preferably one not newer than the card.

    shared: bytes that one program may use there. Raises LookupError for a card older than sm_80.
    """
    fitting = [target for target in TARGETS.values() if target.backend == "cuda" and target.shared <= shared]
    if (major, minor) < (8, 0) or not fitting:
        raise LookupError(f"sm_{major}{minor} is older than sm_80")
    return max(fitting, key=lambda target: (int(target.name[3:]) <= 10 * major + minor, int(target.name[3:])))


@cache
def _has_gpu() -> bool:
    """Asked once: the driver takes microseconds to answer, and a decoding step asks a hundred times."""
    return torch.cuda.is_available()


@cache
def _of_device(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        name = properties.gcnArchName.split(":")[0]
        if name not in TARGETS:
            raise LookupError(f"{name} is not one of {', '.join(n for n in TARGETS if n.startswith('gfx'))}")
        target = TARGETS[name]
    else:
        target = nearest(properties.major, properties.minor, properties.shared_memory_per_block_optin)
    fp8 = target.fp8 if torch.version.hip or (properties.major, properties.minor) >= (8, 9) else None
    return Target(
        target.name, target.backend, fp8, target.shared, properties.multi_processor_count, properties.warp_size
    )


def forget_device() -> None:
    """Look again at the next question: for tests, which change the device."""
    _has_gpu.cache_clear()
    _of_device.cache_clear()


def current_target() -> Target:
    """The chip to launch for: the chosen one, that of the current device, or, interpreted, the backend's usual one."""
    if _chosen is not None:
        return _chosen
    if _has_gpu():
        return _of_device(torch.cuda.current_device())
    return USUAL[active_backend()]


@contextmanager
def use_target(name: str) -> Iterator[Target]:
    """Launch for this chip in a `with` block: interpreted, or recorded for the ahead-of-time compiler."""
    global _chosen
    previous, _chosen = _chosen, TARGETS[name]
    try:
        yield _chosen
    finally:
        _chosen = previous
