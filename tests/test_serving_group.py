"""The engine over four processes: tensor parallelism, and attention with each group's own requests."""

import pytest
import serving_group_worker
from two_processes import assert_passed, run_everywhere

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> list[dict[str, str]]:
    """One start of the processes serves every check."""
    return run_everywhere(serving_group_worker.run, tmp_path_factory.mktemp("group"), serving_group_worker.WORLD)


@pytest.mark.parametrize("name", serving_group_worker.CHECKS)
def test_four_processes(failures, name):
    assert_passed(failures, name, list(serving_group_worker.CHECKS))
