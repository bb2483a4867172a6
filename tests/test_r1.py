"""The R1 pipeline, whole: every stage follows from the one before it, and an interruption anywhere changes nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import r1_pipeline as tiny
from r1_pipeline import config_of, prepare, run

from dsv3.training import loop
from dsv3.training.chat_data import encode_example, load_rows
from dsv3.training.distill import worklog
from dsv3.training.grpo.config import GrpoConfig
from dsv3.training.metrics import read_metrics
from dsv3.training.sft.config import SftConfig

pytestmark = pytest.mark.slow

RUNS = ("zero", "dev1", "dev2", "dev3", "r1/reasoning", "r1/general", "students/small")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("r1"))


@pytest.fixture(scope="module")
def finished(data: Path) -> Path:
    assert run(config_of(data, data / "run")) == data / "run" / "students" / "small" / "model"
    return data / "run"


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def report_of(run_dir: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((run_dir / "r1_report.json").read_text())
    return report


def outcome(run_dir: Path) -> dict[str, Any]:
    """What a pipeline leaves that must not depend on when it was interrupted."""
    weights = {name: (run_dir / name / "model" / "model.safetensors").read_bytes() for name in (*RUNS, "r1")}
    logs = {name: [record["loss"] for record in read_metrics(run_dir / name / "metrics.jsonl")] for name in RUNS}
    made = {name: (run_dir / name).read_text() for name in ("cold_start/cold_start.jsonl", "rejection/traces.jsonl")}
    report = json.loads(
        (run_dir / "r1_report.json").read_text(),
        object_hook=lambda part: {key: part[key] for key in part if key not in ("fingerprint", "seconds")},
    )
    found = json.dumps({"logs": logs, "made": made, "report": report}).replace(str(run_dir), "RUN")
    return {"weights": weights, "rest": json.loads(found)}


def test_every_stage_starts_from_what_the_one_before_it_made(data: Path, finished: Path) -> None:
    def grpo(name: str) -> GrpoConfig:
        return GrpoConfig.load(finished / name / "settings.toml")

    def sft(name: str) -> SftConfig:
        return SftConfig.load(finished / name / "settings.toml")

    base = f"{data}/base"
    assert (grpo("zero").model, grpo("zero").data.format) == (base, "r1-zero"), "no word of fine-tuning before it"
    assert sft("dev1").model == base and sft("dev1").data.format == "r1"
    assert sft("dev1").data.train == (f"{finished}/cold_start/cold_start.jsonl", f"{data}/given.jsonl")
    assert (grpo("dev2").model, grpo("dev2").data.format) == (f"{finished}/dev1/model", "r1")
    assert sft("dev3").model == base, "the second fine-tuning starts from the base again"
    assert sft("dev3").data.train == (f"{finished}/rejection/traces.jsonl", f"{data}/other.jsonl")
    assert grpo("r1/reasoning").model == f"{finished}/dev3/model"
    assert grpo("r1/general").model == f"{finished}/r1/reasoning/model"
    assert sft("students/small").data.train == sft("dev3").data.train
    final, last = (finished / name / "model" / "model.safetensors" for name in ("r1", "r1/general"))
    assert final.read_bytes() == last.read_bytes()


def test_general_prompts_come_in_the_last_steps_with_rules_that_are_checked(finished: Path) -> None:
    first, last = (rows(finished / "r1" / name / "completions.jsonl") for name in ("reasoning", "general"))
    assert all("constraints" not in line["rewards"] for line in first)
    assert all("constraints" in line["rewards"] for line in last)
    log = read_metrics(finished / "r1" / "general" / "metrics.jsonl")
    assert len(log) == 1 and log[0]["rewards/constraints/mean"] is not None
    assert "rewards/constraints/mean" not in read_metrics(finished / "r1" / "reasoning" / "metrics.jsonl")[0]


def test_cold_start_traces_are_right_readable_and_some_of_them_mend_an_error(finished: Path) -> None:
    made = rows(finished / "cold_start" / "cold_start.jsonl")
    forms = {row["provenance"]["form"] for row in made}
    assert forms == {"rules", "correction"}
    for row in made:
        assert f"\\boxed{{{row['answer']}}}" in row["messages"][-1]["content"]
    mended = [row for row in made if row["provenance"]["form"] == "correction"]
    for row in mended:
        thought, wrong = row["messages"][-1]["reasoning_content"], str(int(row["answer"]) + 1)
        attempt, doubt, correction = thought.split("\n\n")
        assert attempt.endswith(f"the answer is {wrong}") and wrong in doubt
        assert correction == tiny.thought(int(row["answer"]))
    loaded = list(load_rows(finished / "cold_start" / "cold_start.jsonl"))
    assert all(encode_example(row, tiny.TOKENIZER, "r1") for row in loaded)


def test_the_report_has_all_stages_and_reflection_before_and_after(finished: Path) -> None:
    report = report_of(finished)
    assert set(report["stages"]) == {"cold_start", "rejection", *RUNS}
    assert report["stages"]["cold_start"]["given"] == len(tiny.NUMBERS)
    assert set(report["reflection"]) == {"zero", "dev2", "r1"}
    for both in report["reflection"].values():
        for found in both.values():
            matrix = found["reflection"]
            cells = ("right_right", "wrong_right", "right_wrong", "wrong_wrong_same", "wrong_wrong_changed")
            assert sum(matrix[cell] for cell in cells) + matrix["no_candidate"] + matrix["unfinished"] == 4
    page = (finished / "r1_report.md").read_text()
    assert "| before dev2 | dev1 |" in page and "| after r1 | r1 |" in page
    assert f"| dev3 | 24 steps, loss {report['stages']['dev3']['loss']:.3f} |" in page


def test_a_finished_pipeline_does_nothing(data: Path, finished: Path) -> None:
    def stamps() -> dict[Path, int]:
        kept = {"config.toml", "r1_report.json", "r1_report.md"}
        files = [path for path in finished.rglob("*") if path.is_file() and path.name not in kept]
        return {path: path.stat().st_mtime_ns for path in files if "r1/model" not in str(path)}

    before, report = stamps(), report_of(finished)
    assert run(config_of(data, data / "run")) == finished / "students" / "small" / "model"
    assert stamps() == before and report_of(finished) == report


class Killed(BaseException):
    pass


def test_a_pipeline_that_is_killed_again_and_again_ends_as_the_one_that_was_not(
    data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each life ends after a few steps of training or samples, within stages and at their edges."""
    left, done = 0, list[str]()

    def spend(what: str) -> None:
        nonlocal left
        done.append(what)
        left -= 1
        if left < 0:
            raise Killed

    advance, append = loop.TrainingRun._advance, worklog.WorkLog.append

    def dying_advance(self: Any, log: Any) -> None:
        advance(self, log)
        spend(f"{self.directory.relative_to(tmp_path)} {self.step}")

    def dying_append(self: Any, record: dict[str, Any]) -> None:
        append(self, record)
        spend(f"{self.directory.relative_to(tmp_path)}/{self.name} {record['prompt']} {record['seed']}")

    monkeypatch.setattr(loop.TrainingRun, "_advance", dying_advance)
    monkeypatch.setattr(worklog.WorkLog, "append", dying_append)
    lives = 0
    for lives in range(1, 30):
        left = (23, 31, 17)[lives % 3]
        try:
            run(config_of(data, tmp_path / "run"))
        except Killed:
            continue
        break
    assert lives > 5, "it was killed"
    assert outcome(tmp_path / "run") == outcome(finished)
    repeated = {what: done.count(what) for what in done if done.count(what) > 1}
    assert all("/samples " not in what and "/scores" not in what for what in repeated), "no sample is drawn twice"
    assert len(repeated) <= 8 * lives, "training goes on from its last checkpoint, eight steps back at most"


@pytest.mark.long
def test_a_stage_in_processes_of_its_own_is_the_stage(data: Path, finished: Path, tmp_path: Path) -> None:
    """Two processes started for a stage learn what this one did, up to rounding."""
    given = {"cold_start": [f"{data}/given.jsonl"]}
    for name, processes in (("one", 0), ("two", 2)):
        config = config_of(data, tmp_path / name, stages=["dev1"], data=given, processes=processes)
        assert run(config) == tmp_path / name / "dev1" / "model"
    one, two = (read_metrics(tmp_path / name / "dev1" / "metrics.jsonl") for name in ("one", "two"))
    assert [record["loss"] for record in two[:8]] == pytest.approx([record["loss"] for record in one[:8]], rel=1e-3)
