"""`dsv3 plan --serve` on the command line."""

import json
from pathlib import Path

import pytest

from dsv3 import cli

pytestmark = pytest.mark.slow

SMALL = ("plan", "--serve", "--model", "dsv3-15m", "--node", "1xh200")
V3 = ("plan", "--serve", "--model", "deepseek-v3-671b", "--node")


def answer(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def report(capsys: pytest.CaptureFixture[str], *argv: str) -> dict:
    return json.loads(answer(capsys, *argv, "--json"))


def test_the_plan_says_what_it_assumes_and_what_it_leaves_out(capsys):
    out = answer(capsys, *V3, "8xh200")
    for text in (
        "671,026,419,200 parameters, 36,625,618,432 active", "70,272 bytes a token, 9.21 GB a sequence of 131,072",
        "2.23 TFLOP", "141 GB, 4.8 TB/s, 989", "data sheet", "40% of that peak", "3 GB are kept", "touch 57.4 experts",
        "not included: communication between devices and launches", "tp 1, dp 8",
    ):  # fmt: skip
        assert text in out


def test_the_same_as_json(capsys):
    found = report(capsys, *V3, "8xh200", "--cache", "fp8")
    layouts = {row["layout"]: row for row in found["layouts"]}
    assert list(layouts) == ["all sharded", "tp 8, dp 1", "tp 4, dp 2", "tp 2, dp 4", "tp 1, dp 8"]
    assert found["fits"] and layouts["tp 1, dp 8"]["sequences"] == 56
    assert layouts["tp 1, dp 8"]["tpot_ms"] < 100
    assert set(layouts["tp 8, dp 1"]["cost_model"]) == {"step", "token", "context"}


def test_a_plan_that_does_not_fit_is_an_answer(capsys):
    out = answer(capsys, *V3, "8xh100", "--simulate")
    assert "does not fit: needs 88.1 GB a device, has 80.0 GB; take more devices or larger ones\n" in out
    assert "no simulation: no layout has room for 9 sequences of 131,072 tokens" in out
    assert "or --weights fp8" in answer(capsys, *V3, "8xh200", "--weights", "bf16")


def test_sequences_that_do_not_fit_are_counted(capsys):
    out = answer(capsys, *V3, "8xh200", "--sequences", "100")
    assert "100 sequences of 131,072 tokens do not fit: 32 do" in out


def test_the_context_is_the_models_where_that_is_shorter(capsys):
    assert report(capsys, *SMALL)["context"] == 4096


def test_another_number_for_the_node_is_used_and_told(capsys):
    found = report(capsys, *SMALL, "--assume", "bandwidth-tbs=2.4", "--assume", "overhead-ms=7")
    assert found["assumptions"]["bandwidth_tbs"] == 2.4
    assert found["assumptions"]["source"].endswith("bandwidth-tbs as given")
    assert found["layouts"][0]["tpot_one_ms"] > 7


@pytest.mark.slow
def test_a_simulation_compares_a_budget_of_time_with_one_of_tokens_and_draws_it(capsys, tmp_path: Path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "latency.png"
    argv = (*SMALL, "--context", "2048", "--assume", "overhead-ms=20", "--simulate", "--plot", str(picture))
    out = answer(capsys, *argv)
    assert "simulated on tp 1, dp 1: 1 sequences decode while a prompt of 1,792 tokens comes in" in out
    assert "at most 50 ms a step" in out and "at most 2,048 tokens a step" in out
    assert "between two tokens, p99, ms" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_simulation_of_random_requests_reports_their_times(capsys):
    argv = (*SMALL, "--simulate", "--rate", "50", "--prompt", "100", "--output", "5", "--step-ms", "30")
    outcomes = report(capsys, *argv)["simulation"]["outcomes"]
    assert list(outcomes) == ["at most 30 ms a step", "at most 2,048 tokens a step"]
    assert all(outcome["ttft_p99_ms"] >= outcome["ttft_p50_ms"] > 0 for outcome in outcomes.values())


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (("plan", "--model", "dsv3-2m", "--node", "1xh200"), "say what is to be planned: --serve"),
        (("plan", "--serve", "--node", "1xh200"), "--model"),
        (("plan", "--serve", "--model", "deepseek-v3", "--node", "8xh200"), "did you mean 'deepseek-v3-671b'?"),
        (("plan", "--serve", "--model", "dsv3-2m", "--node", "8xh20"), "did you mean 8xh200?"),
        (("plan", "--serve", "--model", "dsv3-2m", "--node", "16xh200"), "8 routed experts"),
        ((*SMALL, "--context", "5000"), "--context must be from 2 to the model's 4096 tokens, got 5000"),
        ((*SMALL, "--sequences", "0"), "--sequences must be at least 1, got 0"),
        ((*SMALL, "--weights", "int4"), "unknown HOW 'int4'"),
        ((*SMALL, "--assume", "tflops"), "tflops must be a number above 0"),
        ((*SMALL, "--plot", "x.png"), "--plot draws a simulation: give --simulate, too"),
        ((*SMALL, "--simulate", "--tp", "3"), "--tp 3 does not divide this node and model; 1 do"),
        ((*SMALL, "--simulate", "--step-ms", "0"), "must be above 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_one_line(capsys, argv, line):
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and line in err and err.count("\n") == 1
