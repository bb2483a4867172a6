"""Checks between processes over gloo (two by default): started once, and each told of by a test of its own."""

import json
import os
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import spawn

WORLD = 2
Check = Callable[[int, str], None]  # rank, name of the group


def run_checks(rank: int, folder: str, checks: Mapping[str, Check], world: int = WORLD) -> dict[str, str]:
    """In a process: run the checks until one fails -> the failure of this rank, by check."""
    torch.set_num_threads(1)
    meeting, patience = f"file://{folder}/rendezvous", timedelta(seconds=60)  # for a rank that failed alone
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=patience)
    failures = {}
    for name, function in checks.items():
        try:
            function(rank, dist.group.WORLD.group_name)
            dist.barrier()
        except Exception:
            failures[name] = traceback.format_exc()
            break  # the other rank may wait in another collective: what follows would not be what it says
    dist.destroy_process_group()
    return failures


def leave(failures: dict[str, str], rank: int, folder: str) -> None:
    """Write them where `run_everywhere` reads them."""
    Path(folder, f"{rank}.json").write_text(json.dumps(failures))


def run_everywhere(run: Callable[[int, str], None], folder: Path, world: int = WORLD) -> list[dict[str, str]]:
    """Start the processes, each with `run(rank, folder)`, wait, and return what each one left."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    spawn(run, (str(folder),), nprocs=world)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def assert_passed(failures: list[dict[str, str]], name: str, order: list[str]) -> None:
    """Fail where the check did; skip where an earlier one failed, so that this one was not run."""
    for rank, failed in enumerate(failures):
        assert name not in failed, f"on rank {rank}:\n{failed[name]}"
        for other in failed:
            if other in order and order.index(other) < order.index(name):
                pytest.skip(f"not run, because {other} failed on rank {rank}")
