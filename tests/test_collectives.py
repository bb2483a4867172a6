"""Collectives and the exchange of tokens between two processes over gloo. The checks are in collectives_worker.py."""

import collectives_worker
import pytest
import torch
from arguments.collectives import world
from two_processes import assert_passed, run_everywhere

from dsv3.ops import collectives

EVERYTHING = [*collectives_worker.CHECKS, collectives_worker.dry_run_of_2048_ranks.__name__]


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> list[dict[str, str]]:
    """One start of the processes serves every check."""
    return run_everywhere(collectives_worker.run, tmp_path_factory.mktemp("collectives"))


@pytest.mark.parametrize("name", EVERYTHING)
def test_two_processes(failures, name):
    assert_passed(failures, name, EVERYTHING)


def test_a_process_alone_exchanges_with_itself():
    x, idx = torch.arange(6.0).view(3, 2), torch.tensor([[1, 0], [1, 3], [2, 1]], dtype=torch.int32)
    splits = collectives.ep_splits(idx, 4, world())
    assert splits == ([6], [6])
    received, expert, handle = collectives.ep_dispatch(x, idx, 4, *splits, world())
    assert expert.tolist() == [0, 1, 1, 1, 2, 3]
    assert torch.equal(received, x[[0, 0, 1, 2, 2, 1]])
    assert torch.equal(collectives.ep_combine(received, handle, *splits, world()), x.repeat_interleave(2, 0))
    for collective in (collectives.all_reduce, collectives.all_gather, collectives.reduce_scatter):
        assert torch.equal(collective(x, world()), x)
