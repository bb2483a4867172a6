"""A distillation as a whole: from questions to a student, of whatever kind, and on from where it was interrupted."""

import json
from pathlib import Path
from typing import Any

import distilling
import finetuning
import pytest
import tiny_model
import torch
from distilling import Teacher, config_of, questions, sum_of, thinking, write_rows
from tiny_model import TOKENIZER, fails

from dsv3 import backends
from dsv3.core.model import DeepseekV3
from dsv3.core.tokenizer import Tokenizer
from dsv3.errors import UserError
from dsv3.parallel.data import DataParallel
from dsv3.training.chat_data import load_rows
from dsv3.training.distill.config import DistillConfig
from dsv3.training.distill.run import distill, student_settings, train_student
from dsv3.training.metrics import read_metrics
from dsv3.training.sft.run import Sft

pytestmark = pytest.mark.slow  # whole runs, with their checkpoints and logs

CONFIGS = Path(__file__).parent.parent / "training" / "configs"
SHIPPED = sorted((CONFIGS / "distill").glob("*.toml"))
TUNING = {
    "steps": 6, "data": {"seq_len": 128}, "batch": {"samples": 8}, "checkpoint": {"every": 2, "keep": 1},
    "optim": {"lr": 1e-2, "schedule": []},
}  # fmt: skip


@pytest.fixture(autouse=True)
def cpu() -> Any:
    with backends.use_backend("cpu"):
        yield


def knows(question: str, seed: int) -> str:
    return thinking(sum_of(question), f"I add the two numbers, for the {seed % 2}th time")


def collected(folder: Path, **tables: Any) -> tuple[DistillConfig, str]:
    """A distillation whose traces are there, and their fingerprint."""
    prompts = write_rows(folder / "prompts.jsonl", questions(6))
    config = config_of(folder, prompts, **tables)
    return config, distilling.run(config, Teacher(knows))["fingerprint"]


def ours(folder: Path) -> dict[str, Any]:
    if not (folder / "student").exists():
        tiny_model.save(folder / "student", "r1")
    return TUNING | {"model": f"{folder}/student"}


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run_dir / "metrics.jsonl")]


# --- the student ---


def test_the_student_learns_the_traces_and_what_comes_beside_them(tmp_path: Path) -> None:
    more = finetuning.write_rows(tmp_path / "more.jsonl", [finetuning.conversation(number) for number in range(3)])
    prompts = {"prompts": [f"{tmp_path}/prompts.jsonl"], "conversations": [str(more)]}
    config, fingerprint = collected(tmp_path, student=ours(tmp_path), stages=["sft"], data=prompts)
    model = train_student(config, "cpu", fingerprint, DataParallel())
    assert model == tmp_path / "run" / "model"
    manifest = json.loads((tmp_path / "run" / "sft" / "samples" / "manifest.json").read_text())
    assert manifest["sets"]["train"]["counts"]["rows"] == 12 + 3
    found = losses(tmp_path / "run" / "sft")
    assert found[-1] < found[0]
    assert Tokenizer.load(model).vocab_size == TOKENIZER.vocab_size
    trained = DeepseekV3.from_pretrained(model)
    assert not torch.equal(trained.lm_head.weight, DeepseekV3.from_pretrained(tmp_path / "student").lm_head.weight)


def test_a_finished_distillation_does_nothing_and_other_traces_are_not_mixed_in(tmp_path: Path) -> None:
    config, fingerprint = collected(tmp_path, student=ours(tmp_path), stages=["sft"])
    train_student(config, "cpu", fingerprint, DataParallel())
    weights = tmp_path / "run" / "sft" / "model" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert train_student(config, "cpu", fingerprint, DataParallel()) == tmp_path / "run" / "model"
    assert weights.stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"the traces have changed since .*sft was begun: remove that folder"):
        train_student(config, "cpu", "another", DataParallel())


def test_a_student_that_was_interrupted_ends_to_the_bit_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, advance = [], Sft._advance
    for name, stops in (("whole", ()), ("parts", (1, 3))):
        (tmp_path / name).mkdir()
        student = TUNING | {"model": str(tiny_model.save(tmp_path / name / "student", "r1"))}
        config, fingerprint = collected(tmp_path / name, student=student, stages=["sft"])
        for stop in stops:

            def dying(self: Any, log: Any, stop: int = stop) -> None:
                if self.step == stop:
                    raise KeyboardInterrupt
                advance(self, log)

            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(Sft, "_advance", dying)
                train_student(config, "cpu", fingerprint, DataParallel())
            assert not (tmp_path / name / "run" / "model").exists()
        model = train_student(config, "cpu", fingerprint, DataParallel())
        assert model is not None
        weights.append((model / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_stages_follow_each_other_each_from_the_model_before(tmp_path: Path) -> None:
    teacher = tiny_model.save(tmp_path / "teacher", "r1")
    beside = {"teacher": {"model": str(teacher)}, "optim": {"lr": 1e-3}}
    config, fingerprint = collected(
        tmp_path,
        student=ours(tmp_path) | {"steps": 2},
        stages=["sft", "logits", "onpolicy"],
        logits=beside | {"steps": 2, "k": 4, "data": {"seq_len": 128}, "batch": {"samples": 4}},
        onpolicy=beside | {"length": 2, "samples": 4, "on_policy": 0.5, "max_tokens": 8},
    )
    model = train_student(config, "cpu", fingerprint, DataParallel())
    assert model is not None
    for name in ("sft", "logits", "onpolicy"):
        assert len(losses(tmp_path / "run" / name)) == 2
    last = tmp_path / "run" / "onpolicy" / "model" / "model.safetensors"
    assert (model / "model.safetensors").read_bytes() == last.read_bytes()
    logits = student_settings(config, "logits", str(tmp_path / "run" / "sft" / "model"))
    assert logits.model == f"{tmp_path}/run/sft/model" and logits.data.train == (f"{tmp_path}/run/traces.jsonl",)


def test_an_endpoint_has_no_probabilities_to_learn_from(tmp_path: Path) -> None:
    config, fingerprint = collected(tmp_path, student=ours(tmp_path), stages=["logits"])
    with pytest.raises(UserError, match=r"logits\.teacher\.model is not set: an endpoint gives no probabilities"):
        train_student(config, "cpu", fingerprint, DataParallel())


def test_a_dense_student_of_transformers_learns_them_too(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from dense_student import write_student

    student = TUNING | {"model": str(write_student(tmp_path / "qwen", "qwen2", tie_word_embeddings=True))}
    config, fingerprint = collected(tmp_path, student=student, stages=["sft"])
    model = train_student(config, "cpu", fingerprint, DataParallel())
    assert model is not None
    found = losses(tmp_path / "run" / "sft")
    assert found[-1] < found[0]
    assert json.loads((model / "config.json").read_text())["model_type"] == "qwen2"
    assert (model / "chat_template.jinja").exists()


def test_nothing_kept_is_said_where_the_student_would_begin(tmp_path: Path) -> None:
    prompts = write_rows(tmp_path / "prompts.jsonl", questions(2))
    config = config_of(tmp_path, prompts, student=ours(tmp_path), stages=["sft"])
    report = distilling.run(config, Teacher(lambda question, seed: thinking("no idea")))
    with pytest.raises(UserError, match="no sample is left to learn from"):
        train_student(config, "cpu", report["fingerprint"], DataParallel())


# --- verified by a judge ---


def test_where_no_rule_can_tell_a_judge_decides() -> None:
    from dsv3.training.distill.filters import is_right

    names, minimum = ["accuracy_math", "judge"], {"judge": 0.7}
    assert is_right("stop", {"accuracy_math": 0.0, "judge": 1.0}, names, minimum) is False, "a rule is believed first"
    assert is_right("stop", {"accuracy_math": None, "judge": 0.8}, names, minimum) is True
    assert is_right("stop", {"accuracy_math": None, "judge": 0.6}, names, minimum) is False
    assert is_right("stop", {"accuracy_math": None, "judge": None}, names, minimum) is None
    assert is_right("stop", {"accuracy_math": None, "judge": 0.8}, names, {}) is None, "only where its least is named"


# --- settings and errors ---


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_configurations_load_and_survive_writing(file: Path, tmp_path: Path) -> None:
    config = DistillConfig.load(file)
    (tmp_path / "copy.toml").write_text(config.to_toml())
    assert DistillConfig.load(tmp_path / "copy.toml") == config
    assert config.stages and config.data.prompts and any(r.name.startswith("accuracy") for r in config.rewards)


def test_the_published_recipe_has_the_published_numbers() -> None:
    config = DistillConfig.load(CONFIGS / "distill" / "r1-paper.toml")
    student = config.student
    (phase,) = student.optim.schedule
    assert (student.optim.lr, phase.shape, phase.lr) == (8e-5, "cosine", pytest.approx(8e-6))
    assert (student.batch.samples, student.data.seq_len) == (64, 32768) and 2 <= student.epochs <= 3
    assert config.stages == ("sft",), "without reinforcement, and without probabilities"
    assert (config.sampling.temperature, config.sampling.top_p, config.sampling.max_tokens) == (0.6, 0.95, 32768)
    assert config.filter.language and config.filter.max_paragraph and not config.filter.code_blocks


def test_a_gold_answer_that_does_not_parse_is_refused_with_its_row(tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    rows = [*questions(2), {"prompt": "What is it?", "answer": "\\frac{"}]
    config = config_of(tmp_path, write_rows(tmp_path / "prompts.jsonl", rows), rewards=[{"name": "accuracy_math"}])
    with pytest.raises(UserError, match=r"row 3 \(.*prompts\.jsonl, line 3\): answer: "):
        distilling.run(config, Teacher(knows))


def test_the_command_line_runs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.toml").write_text(f'run_dir = "{tmp_path}/run"\n')
    assert "data.prompts is empty" in fails(capsys, "train", "distill", tmp_path / "a.toml")
    write_rows(tmp_path / "prompts.jsonl", questions(1))
    override = f'data.prompts=["{tmp_path}/prompts.jsonl"]'
    assert "teacher.model" in fails(capsys, "train", "distill", tmp_path / "a.toml", override)
    served = ("teacher.endpoint=http://127.0.0.1:9/v1", "teacher.served_model=x")
    assert "does not answer" in fails(capsys, "train", "distill", tmp_path / "a.toml", override, *served)


def test_a_local_teacher_is_asked_by_the_command_itself(tmp_path: Path) -> None:
    """From the settings alone: a random model writes nothing right, and the report says so."""
    teacher = tiny_model.save(tmp_path / "teacher", "r1")
    prompts = write_rows(tmp_path / "prompts.jsonl", questions(3))
    config = config_of(
        tmp_path, prompts, teacher={"model": str(teacher), "batch": 2}, sampling={"samples": 2, "max_tokens": 8}
    )
    assert distill(config, "cpu") == tmp_path / "run"
    report = json.loads((tmp_path / "run" / "filter_report.json").read_text())
    assert report["samples"] == 6 and report["kept"] == 0
    assert list(load_rows(tmp_path / "prompts.jsonl"))
