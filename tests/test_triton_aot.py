"""Every Triton kernel, compiled for chips that are not here: it compiles, fits, and spills nothing."""

import pytest

pytest.importorskip("triton", reason="needs triton")

from walk import load_everything

from dsv3.backends.triton import tables
from dsv3.backends.triton.reference import REASONS
from dsv3.backends.triton.target import TARGETS, interpreted, nearest
from dsv3.bench import page
from dsv3.bench.compiled import compile_workload, survey
from dsv3.bench.workloads import all_workloads
from dsv3.ops import load

load_everything()
compiles = pytest.mark.skipif(interpreted(), reason="this process interprets")
CHIPS = [name for name in TARGETS if name != "sm_89"]  # sm_89 compiles as sm_80 does, with FP8; `make test-aot` has it
WORKLOADS = [workload for workloads in all_workloads().values() for workload in workloads]
FIRST = [workloads[0] for workloads in all_workloads().values()]


def holds(workload, chip):
    row = compile_workload(workload, TARGETS[chip])
    assert row.faults == []
    return row


@compiles
@pytest.mark.compiled
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("workload", FIRST, ids=lambda workload: workload.op)
def test_the_first_workload_of_an_op_compiles_without_faults(workload, chip):
    holds(workload, chip)


@compiles
@pytest.mark.aot
@pytest.mark.parametrize("chip", TARGETS)
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: f"{workload.op}: {workload.name}")
def test_every_workload_compiles_without_faults(workload, chip):
    holds(workload, chip)


@compiles
@pytest.mark.aot
@pytest.mark.timeout(3000)  # it compiles everything, where no cache has it yet
def test_the_page_is_that_of_the_code(tmp_path):
    """`dsv3 bench ops --compile --page docs/kernels.md` writes it anew."""
    written = tmp_path / "kernels.md"
    page.write(list(survey()), str(written))
    committed = (page.ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert written.read_text(encoding="utf-8") == committed


@pytest.mark.parametrize("backend", ["cuda", "rocm"])
def test_an_op_has_a_kernel_on_gpus_or_a_reason_to_have_none(backend):
    without = {name for name, op in load().items() if not op.kernels.get(backend)}
    assert without == set(REASONS)


def test_every_op_with_a_triton_kernel_has_a_workload():
    with_kernels = {
        name for name, op in load().items() if any(k.provider == "triton" for k in op.kernels.get("cuda", ()))
    }
    assert with_kernels <= set(all_workloads())


@pytest.mark.parametrize("chip", TARGETS)
def test_a_table_has_rows_for_every_kernel_and_a_last_one_without_bounds(chip):
    table = tables.table(chip, TARGETS[chip].backend)
    assert set(table) == set(tables.table("sm_90", "cuda"))
    for rows in table.values():
        assert all("up_to" in row for row in rows[:-1]) and "up_to" not in rows[-1]
        assert all(set(row) <= {"up_to", "tile", "measured"} for row in rows)


@pytest.mark.parametrize(
    "capability, shared, name",
    [
        ((8, 0), 166_912, "sm_80"),
        ((8, 6), 101_376, "sm_89"),
        ((8, 9), 101_376, "sm_89"),
        ((9, 0), 232_448, "sm_90"),
        ((10, 0), 232_448, "sm_90"),
        ((12, 0), 101_376, "sm_89"),
    ],
)
def test_a_card_takes_the_tiles_that_fit_into_it(capability, shared, name):
    assert nearest(*capability, shared).name == name


def test_a_card_older_than_every_table_is_refused():
    with pytest.raises(LookupError, match="sm_75 is older than sm_80"):
        nearest(7, 5, 65_536)
