"""The exchange of tokens on Triton kernels, between two processes. The checks are in expert_parallel_worker.py."""

import pytest

pytest.importorskip("triton", reason="needs triton")

import expert_parallel_worker

from dsv3.backends.triton.target import interpreted

pytestmark = [pytest.mark.interpreter, pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")]


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> list[dict[str, str]]:
    """One start of the processes serves every check."""
    return expert_parallel_worker.run_everywhere(tmp_path_factory.mktemp("expert_parallel"))


@pytest.mark.parametrize("name", expert_parallel_worker.CHECKS)
def test_two_processes(failures, name):
    order = list(expert_parallel_worker.CHECKS)
    for rank, failed in enumerate(failures):
        assert name not in failed, f"on rank {rank}:\n{failed[name]}"
        for other in failed:
            if order.index(other) < order.index(name):
                pytest.skip(f"not run, because {other} failed on rank {rank}")
