"""`dsv3 bench ops --compile`: every Triton kernel, compiled for chips that are not here."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..backends import discover
from ..backends.triton.aot import Build, build
from ..backends.triton.runtime import recording
from ..backends.triton.target import TARGETS, Target, use_target
from ..ops import load
from ..ops.formats import E4M3
from ..ops.op import use_backend
from .workloads import Maker, Workload, all_workloads


@dataclass(frozen=True)
class Row:
    """What a workload launches on a chip. builds: of its kernels in order; none where no Triton kernel takes it."""

    op: str
    workload: str
    target: str
    builds: list[Build]

    @property
    def faults(self) -> list[str]:
        return [f"{build.kernel}: {fault}" for build in self.builds for fault in build.faults]


def compile_workload(workload: Workload, target: Target) -> Row:
    """Record what the op's Triton kernel launches for this workload on this chip, and compile that."""
    op = load()[workload.op]
    with use_backend(target.backend), use_target(target.name), recording() as launches:
        args = workload.make(Maker("meta", target.fp8 or E4M3))
        for kernel in op.kernels.get(target.backend, ()):
            if kernel.provider == "triton" and kernel.supports(*args):
                kernel.run(*args)
                break
    return Row(workload.op, workload.name, target.name, [build(launch, target) for launch in launches])


def survey(ops: Iterable[str] = (), chips: Iterable[str] = (), first: bool = False) -> Iterator[Row]:
    """Rows of the named ops and chips (all by default); first: of each op's first workload only."""
    for backend in discover().values():
        backend.load()
    wanted, chips = set(ops), set(chips)
    for name, workloads in sorted(all_workloads().items()):
        if wanted and name not in wanted:
            continue
        for workload in workloads[:1] if first else workloads:
            for target in TARGETS.values():
                if not chips or target.name in chips:
                    yield compile_workload(workload, target)
