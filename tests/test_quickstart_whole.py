"""The quickstart as it is shipped, on the text of this machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_each_half_of_the_recipe_gains_ten_points(tmp_path: Path) -> None:
    """Relative gains only: what a seed ends at differs by twenty points between machines and versions."""
    command = [sys.executable, "-m", "dsv3", "quickstart", "--out", str(tmp_path / "out"), "--json", "--backend", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2900)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    for bits in report["bits_per_byte"].values():
        assert bits["after"] < bits["before"] - 1
    assert report["gains"]["grpo"]["accuracy"] >= 0.10, report["gains"]
    assert report["gains"]["student"]["accuracy"] >= 0.10, report["gains"]
    scores = report["reasoning"]
    assert scores["grpo"]["greedy"]["truncated"] < 0.02
    assert scores["grpo"]["greedy"]["chinese_thoughts"] > scores["sft"]["temperature 1"]["chinese_thoughts"]
    assert report["zero"]["samples"] > 0
