"""Arguments of V3's sizes for every op that has a kernel: what is compiled ahead of time, timed and tuned."""

from importlib import import_module
from pkgutil import iter_modules

from .maker import WORKLOADS, Maker, Workload

__all__ = ["Maker", "Workload", "all_workloads"]


def all_workloads() -> dict[str, list[Workload]]:
    """By op; the first of an op stands for the others where time is short."""
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    return WORKLOADS
