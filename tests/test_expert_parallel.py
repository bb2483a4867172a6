"""The exchange of tokens on Triton kernels, between two processes. The checks are in expert_parallel_worker.py."""

import pytest

pytest.importorskip("triton", reason="needs triton")

import expert_parallel_worker
from two_processes import assert_passed, run_everywhere

from dsv3.backends.triton.target import interpreted

pytestmark = [pytest.mark.interpreter, pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")]


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> list[dict[str, str]]:
    """One start of the processes serves every check."""
    return run_everywhere(expert_parallel_worker.run, tmp_path_factory.mktemp("expert_parallel"))


@pytest.mark.parametrize("name", expert_parallel_worker.CHECKS)
def test_two_processes(failures, name):
    assert_passed(failures, name, list(expert_parallel_worker.CHECKS))
