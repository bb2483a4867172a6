"""`dsv3 bench ops`: the roofline, the search for tiles, the command."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="needs triton")

from dsv3 import cli
from dsv3.backends import discover
from dsv3.backends.triton import tables
from dsv3.backends.triton.target import use_target
from dsv3.bench.ops import time_ops
from dsv3.bench.roofline import Peaks, operand_width
from dsv3.bench.tune import Found, descend, neighbours, rows_of
from dsv3.errors import UserError

TILES = st.fixed_dictionaries(
    {"BM": st.sampled_from([16, 64, 256]), "num_warps": st.sampled_from([1, 4, 16]), "SWAP": st.booleans()}
)


def test_the_roofline_is_the_slower_of_memory_and_compute():
    peaks = Peaks(bandwidth=100.0, products={2: 1000.0, 4: 500.0})
    assert peaks.least_seconds(flops=1000, moved=50, width=2) == (1.0, "compute")
    assert peaks.least_seconds(flops=1000, moved=500, width=2) == (5.0, "memory")
    assert peaks.least_seconds(flops=1000, moved=50, width=4) == (2.0, "compute")
    assert peaks.least_seconds(flops=1000, moved=50, width=1) == (1.0, "compute")  # no FP8 here: as bfloat16


def test_an_op_is_held_to_the_unit_that_could_compute_its_narrowest_operand():
    fp8, scale = torch.zeros(2, 2, dtype=torch.float8_e4m3fn), torch.ones(2)
    assert operand_width((fp8, scale, torch.bfloat16)) == 1
    assert operand_width((scale, [scale.bfloat16()])) == 2


@given(start=TILES, goal=TILES)
def test_the_search_finds_the_best_tile_of_a_smooth_landscape(start, goal):
    def time(tile):
        return (
            1.0
            + sum((tile[name].bit_length() - goal[name].bit_length()) ** 2 for name in ("BM", "num_warps"))
            + (tile["SWAP"] != goal["SWAP"])
        )

    assert descend(start, time) == (goal, 1.0)


@given(tile=TILES)
def test_a_neighbour_differs_in_one_entry_and_stays_within_bounds(tile):
    for other in neighbours(tile):
        assert sum(tile[name] != other[name] for name in tile) == 1
        assert 1 <= other["num_warps"] <= 16


def test_tiles_that_cannot_run_are_passed_over_and_a_first_one_is_refused():
    assert descend({"BM": 16}, lambda tile: 1 / tile["BM"] if tile["BM"] <= 32 else None) == ({"BM": 32}, 1 / 32)
    with pytest.raises(UserError, match="mend the table first"):
        descend({"BM": 16}, lambda tile: None)


def test_rows_go_from_small_to_large_and_the_last_has_no_bounds():
    found = [Found("gemm", (("M", size),), {"BM": size}, 1e-6) for size in (4096, 16, 64)]
    rows = rows_of(found, "H200")
    assert [row.get("up_to") for row in rows] == [{"M": 16}, {"M": 64}, None]
    assert rows[0]["measured"]["us"] == 1.0


def test_a_launch_asks_the_table_and_a_search_may_answer_instead():
    with use_target("sm_90"), tables.listening() as asked:
        usual = tables.tile("quantize_tiles", T=4096)
        with tables.forced("quantize_tiles", {"ROWS": 1}):
            assert tables.tile("quantize_tiles", T=4096) == {"ROWS": 1}
        assert tables.tile("quantize_tiles", T=4096) == usual
    assert asked == [("quantize_tiles", (("T", 4096),))] * 3


def test_every_kernel_is_timed_beside_the_specification():
    rows = list(time_ops(["dequantize_blocks"], discover()["cpu"], first=True, longest=10.0))
    assert {row.provider for row in rows} >= {"torch", "specification"}
    assert all(row.seconds > 0 and row.fraction > 0 and row.ratio >= 1 for row in rows)
    assert min(row.ratio for row in rows) == 1.0


def test_a_call_that_would_take_too_long_is_left_out_and_says_so():
    rows = list(time_ops(["dequantize_blocks"], discover()["cpu"], first=True, longest=1e-9))
    assert all(row.seconds is None and "left out" in row.note for row in rows)


def test_the_command_prints_a_row_per_kernel_as_json(capsys):
    assert cli.main(["bench", "ops", "--ops", "dequantize_blocks", "--json", "--backend", "cpu"]) == 0
    assert {row["op"] for row in json.loads(capsys.readouterr().out)} == {"dequantize_blocks"}


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--ops", "softmax"], "no workload for an op 'softmax'"),
        (["--chips", "sm_90"], "belong to --compile"),
        (["--compile", "--chips", "sm_91"], "unknown chip 'sm_91'; there are sm_80"),
        (["--compile", "--page", "x.md", "--first"], "--page is about all kernels"),
        (["--compile", "--page", "nowhere/x.md"], "there is no folder nowhere; make it first"),
        (["--tune", "--backend", "cpu"], "--tune is for GPUs, and the backend is cpu"),
        (["--tune", "--compile"], "not allowed with"),
    ],
)
def test_wrong_input_is_one_line(arguments, says, capsys):
    assert cli.main(["bench", "ops", *arguments]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
