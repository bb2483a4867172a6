"""The quickstart as a person meets it: what it leaves, what it says, and how it goes on after it was stopped."""

import argparse
import html
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3 import UserError, backends, cli
from dsv3.core.model import DeepseekV3
from dsv3.core.tokenizer import Tokenizer
from dsv3.quickstart import arithmetic, base, folder, measure, reasoning, stages
from dsv3.training.config import PretrainConfig
from dsv3.training.data.sources import Document, MemorySource
from dsv3.training.metrics import read_metrics
from dsv3.training.pretrain import Pretraining
from dsv3.training.verbs import STAGES

pytestmark = pytest.mark.slow  # whole runs, with their checkpoints and logs

VOCABULARY = 400
TINY_PRETRAIN = (
    "length=8 steps", "optim.lr=1e-2", "optim.warmup_steps=2", "batch.sequences=4", "batch.micro_batch=4",
    "data.seq_len=32", "eval.every=4", "eval.batches=2", "sample.every=0", "checkpoint.every=4",
    f"model.vocab_size={VOCABULARY}", "model.hidden_size=32", "model.intermediate_size=40",
    "model.moe_intermediate_size=16", "model.num_hidden_layers=2", "model.max_position_embeddings=512",
)  # fmt: skip


TINY_STUDENT = (
    "steps=3", "batch.samples=4", f"fresh.vocab_size={VOCABULARY}", "fresh.hidden_size=16",
    "fresh.intermediate_size=24", "fresh.moe_intermediate_size=16", "fresh.num_hidden_layers=2",
)  # fmt: skip
# A model of this size is never right: all that it writes teaches the student, which is enough to see the stages work.
TINY = {
    "pretrain": TINY_PRETRAIN,
    "sft": ("steps=3", "batch.samples=4"),
    "grpo": ("length=2 steps", "prompts_per_step=2", "group_size=2", "rollout.max_tokens=6"),
    "distill": (
        "data.limit=8", "sampling.samples=1", "sampling.max_tokens=6", "rewards=[]", "filter.style=any",
        "filter.language=0", *(f"student.{value}" for value in TINY_STUDENT),
    ),
}  # fmt: skip


def sources() -> list[MemorySource]:
    code = [
        Document(f"f{n}", f"def f{n}(x):\n    return x + {n}\n" + "# a cat is a cat\n" * (n % 7)) for n in range(600)
    ]
    language = [Document(f"t{n}", f"The cat number {n} sat on the mat. " * (3 + n % 5)) for n in range(600)]
    return [MemorySource("code", code), MemorySource("language", language)]


def nothing() -> list[MemorySource]:
    raise AssertionError("the machine is searched for text again")


def shrink(patch: pytest.MonkeyPatch) -> None:
    """Questions and traces in dozens instead of thousands."""
    for module, name, count in (
        (reasoning, "TRACES", 60), (reasoning, "PROMPTS", 30), (reasoning, "MEASURED", 20),
        (arithmetic, "TRANSCRIPTS", 200), (base, "TOKENIZER_TASKS", 100), (measure, "MAX_TOKENS", 8),
    ):  # fmt: skip
        patch.setattr(module, name, count)


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        yield


def train_here(kind: str, settings: Path, processes: int, backend: str, folder: object) -> None:
    STAGES[kind].run(STAGES[kind].config().load(settings), backend)


def train_nothing(*_: object) -> None:
    raise AssertionError("the model is trained again")


def run(out: Path, **changes: object) -> dict:
    options = {"overrides": TINY, "sources": sources, "train": train_here, "backend": "cpu"} | changes
    return stages.quickstart(out, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if ".tmp" in path.name]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quickstart") / "out"
    run(out)
    return out


def test_it_leaves_a_model_its_tokenizer_pictures_and_a_report(finished: Path) -> None:
    model = DeepseekV3.from_pretrained(finished / "model", backend="cpu")
    tokenizer = Tokenizer.load(finished / "model")
    assert model.config.vocab_size == tokenizer.vocab_size == VOCABULARY
    assert tokenizer.encode("1234") == [tokenizer.encode(digit)[0] for digit in "1234"]
    for picture in ("loss.png", "expert_load.png", "quickstart.png"):
        assert (finished / picture).read_bytes().startswith(b"\x89PNG")
        assert (finished / picture).stat().st_size < 200_000
    assert leftovers(finished) == []


def test_the_report_has_the_figures_of_the_run(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    records = read_metrics(finished / "pretrain" / "metrics.jsonl")
    assert report["steps"] == 8 and report["tokens"] == 8 * 4 * 32
    assert set(report["data"]) == {"code", "language", "sessions"}
    for name in ("code", "language"):
        values = report["bits_per_byte"][name]
        assert values["after"] == records[-1][f"validation/{name}"] < values["before"]
        assert report["data"][name]["train"]["tokens"] > 0
    assert report["expert_max_violation"]["peak"] == max(record["max_violation"] for record in records)
    assert set(report["seconds"]) == {*stages.USUAL, "total"} - {"report"}
    model = DeepseekV3.from_pretrained(finished / "pretrain" / "model", backend="cpu")
    assert sum(report["parameters"].values()) == sum(parameter.numel() for parameter in model.parameters())
    prompts = [completion["prompt"] for completion in report["completions"]]
    assert prompts == list(PretrainConfig.load(stages.SETTINGS).sample.prompts)


def test_a_finished_one_is_left_as_it_is(finished: Path) -> None:
    before = contents(finished)
    report = run(finished, sources=nothing, train=train_nothing)
    assert report == json.loads((finished / "report.json").read_text())
    assert contents(finished) == before


@pytest.mark.slow
def test_transformers_computes_the_same_logits(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(finished / "model", attn_implementation="eager").eval()
    ours = DeepseekV3.from_pretrained(finished / "model", backend="cpu")
    text = "def f7(x):\n    return x + 7\n"
    ids = Tokenizer.load(finished / "model").encode(text)
    assert AutoTokenizer.from_pretrained(finished / "model")(text, add_special_tokens=False)["input_ids"] == ids
    with torch.no_grad():
        want, got = theirs(torch.tensor([ids])).logits, ours(torch.tensor([ids])).logits
    assert ((got - want).norm() / want.norm()).item() < 1e-5
    assert theirs.dtype == torch.float32


def test_measurements_are_told_as_they_were_made(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    for name in ("sft", "grpo", "student", "baseline"):
        found = json.loads((finished / "measured" / f"{name}.json").read_text())
        assert report["reasoning"][name] == found
        assert found["greedy"]["accuracy"] == sum(found["right"]) / len(found["right"])
        assert len(found["right"]) == found["greedy"]["problems"] == 20
    for name, before in (("grpo", "sft"), ("student", "baseline")):
        scores = [report["reasoning"][key]["greedy"]["accuracy"] for key in (name, before)]
        assert report["gains"][name]["accuracy"] == pytest.approx(scores[0] - scores[1])
    samples = [json.loads(line) for line in (finished / "zero" / "metrics.jsonl").read_text().splitlines()]
    assert report["zero"]["samples"] == sum(2 * sample["groups"] for sample in samples) > 0


def test_the_page_stands_alone_and_shows_what_was_written(finished: Path) -> None:
    page, report = (finished / "report.html").read_text(), json.loads((finished / "report.json").read_text())
    assert "http://" not in page and "https://" not in page and "<script" not in page
    assert page.count("data:image/png;base64,") == 3
    for sample in report["reasoning"]["grpo"]["samples"]:
        assert html.escape(sample["question"]) in page and html.escape(sample["text"]) in page


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


ORDER = (
    (base.BaseModel, "tokenizer"), (base.BaseModel, "data"), (base.BaseModel, "pretrain"),
    (reasoning.Reasoning, "tasks"), (reasoning.Reasoning, "zero"), (reasoning.Reasoning, "sft"),
    (reasoning.Reasoning, "grpo"), (reasoning.Reasoning, "distill"), (reasoning.Reasoning, "baseline"),
    (reasoning.Reasoning, "measure"), (reasoning.Reasoning, "evaluate"),
    (stages.Quickstart, "_model"), (stages.Quickstart, "_report"),
)  # fmt: skip


@pytest.mark.slow
def test_interrupted_before_every_stage_it_goes_on_from_there(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    for number, (place, name) in enumerate(ORDER):
        done = contents(out)
        # Once there is data, the text of the machine no longer matters: packages may have been installed meanwhile.
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(place, name, interrupted)
            run(out, sources=sources if number < 3 else nothing)
        kept = contents(out)
        assert {file for file in done if done[file] != kept[file]} <= {"quickstart.json"}, name  # seconds of stages
    run(out, sources=nothing, train=train_nothing)
    same = (
        "model/model.safetensors",
        "student/model/model.safetensors",
        "measured/student.json",
        "tasks/prompts.jsonl",
    )
    for file in same:
        assert (out / file).read_bytes() == (finished / file).read_bytes(), file


@pytest.mark.slow
def test_interrupted_within_a_stage_it_leaves_nothing_half_done(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    places: tuple[tuple[Any, str], ...] = (
        (Tokenizer, "save"), (base, "prepare"), (reasoning, "write_rows"), (reasoning, "measure"),
        (reasoning, "evaluate"),        (stages, "draw"), (stages, "draw_summary"), (stages, "write_page"),
    )  # fmt: skip
    for place, name in places:
        function = getattr(place, name)

        def torn(*args: object, function: Any = function, **options: object) -> None:
            function(*args, **options)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(place, name, torn)
            run(out)
        assert leftovers(out) == [], name
        assert not (out / "report.json").exists()
    run(out, train=train_nothing)
    assert (out / "model/model.safetensors").read_bytes() == (finished / "model/model.safetensors").read_bytes()


def test_interrupted_training_goes_on_from_its_checkpoint(finished: Path, tmp_path: Path) -> None:
    out, advance = tmp_path / "out", Pretraining._advance

    def stopped_at_step_5(self: Pretraining, log: Any) -> None:
        advance(self, log)
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Pretraining, "_advance", stopped_at_step_5)
        run(out)
    assert not (out / "model").exists()
    assert (out / "pretrain" / "checkpoints" / "latest").read_text() == "step-00000005\n"
    run(out, sources=nothing)
    assert contents(out)["model/model.safetensors"] == contents(finished)["model/model.safetensors"]


# --- on the command line, in processes of its own ---


def started(out: Path, processes: int) -> subprocess.Popen[str]:
    """The tiny quickstart as a command of its own, in a process group of its own, as a shell would start it."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [sys.executable, __file__, str(out), str(processes)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out, err


@pytest.mark.slow
def test_two_processes_are_stopped_by_ctrl_c_and_go_on(finished: Path, tmp_path: Path) -> None:
    process = started(tmp_path / "out", 2)
    assert process.stderr is not None
    read = []
    for line in process.stderr:
        read.append(line)
        if "step 1:" in line:
            os.killpg(process.pid, signal.SIGINT)  # the terminal sends it to the whole group
            break
    code, out, err = ended(process)
    assert (code, out) == (130, ""), "".join(read) + err
    assert "the checkpoint is saved, run the same command to go on" in err
    assert err.endswith("dsv3: interrupted; run the same command to go on\n")
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "model").exists()

    code, out, err = ended(started(tmp_path / "out", 2))
    assert code == 0, err
    assert "going on from" in err and "found on this machine" not in err
    assert f"dsv3 chat {tmp_path / 'out' / 'model'}" in out
    ours, theirs = (read_metrics(folder / "pretrain" / "metrics.jsonl") for folder in (tmp_path / "out", finished))
    assert [record["step"] for record in ours] == list(range(8))
    assert ours[-1]["loss"] == pytest.approx(theirs[-1]["loss"], rel=1e-3)  # the order of sums is another


@pytest.mark.slow
def test_killed_its_processes_end_too_and_the_next_run_goes_on(tmp_path: Path) -> None:
    process = started(tmp_path / "out", 2)
    assert process.stderr is not None
    assert any("step 1:" in line for line in process.stderr)
    process.kill()
    process.wait()
    code, _, err = ended(started(tmp_path / "out", 2))
    assert code == 0, err
    assert (tmp_path / "out" / "report.json").exists()


def test_an_error_of_the_run_is_said_once(tmp_path: Path) -> None:
    settings = tmp_path / "pretrain.toml"
    settings.write_text("lenght = 3")
    line = f"import dsv3.training.launch as l; l.launch(['train', 'pretrain', {str(settings)!r}], 2)"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, timeout=60)
    assert done.stderr.count("unknown key lenght; did you mean length?") == 1
    assert done.stderr.splitlines()[-1].startswith(
        "dsv3.training.launch.ProcessFailed: a process ended with exit code 2"
    )


# --- wrong input ---


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert cli.main(["quickstart", *map(str, argv), "--backend", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("dsv3: error: ") and err.count("\n") == 1
    return err


@pytest.fixture
def process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_active", None)
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")


@pytest.mark.usefixtures("process_of_its_own")
class TestWrongInput:
    def test_a_folder_of_other_files_is_left_alone(self, capsys, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("mine")
        assert "holds 'thesis.tex', which is not quickstart's" in fails(capsys, "--out", tmp_path)
        assert contents(tmp_path) == {"thesis.tex": b"mine"}

    def test_a_file_for_a_folder_is_named(self, capsys, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        for out in (tmp_path / "file", tmp_path / "file" / "below"):
            assert f"{out}: cannot be written" in fails(capsys, "--out", out)

    def test_no_process_at_all_is_refused(self, capsys, tmp_path: Path) -> None:
        assert "--processes must be 1 or more, not 0" in fails(capsys, "--out", tmp_path / "x", "--processes", 0)
        assert not (tmp_path / "x").exists()

    def test_another_seed_needs_another_folder(self, capsys, finished: Path) -> None:
        before = contents(finished)
        assert "begun with --seed 0, not 3: choose another --out" in fails(capsys, "--out", finished, "--seed", 3)
        assert contents(finished) == before

    def test_a_folder_in_use_is_not_worked_in(self, capsys, monkeypatch, tmp_path: Path) -> None:
        monkeypatch.setattr(folder, "PATIENCE", 0.0)
        with folder.Folder(tmp_path / "out", 0, print):
            assert "another quickstart is at work there" in fails(capsys, "--out", tmp_path / "out")


def test_a_model_that_does_not_learn_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it has not learnt: held-out code takes \d.* --seed"):
        nothing_learnt = [*TINY_PRETRAIN, "optim.lr=1e-20", "optim.weight_decay=0", "balance.gamma=0"]
        run(tmp_path / "out", overrides=TINY | {"pretrain": nothing_learnt})
    assert not (tmp_path / "out" / "model").exists()


def test_the_same_again_as_json(capsys: pytest.CaptureFixture[str], finished: Path, process_of_its_own: None) -> None:
    assert cli.main(["quickstart", "--out", str(finished), "--json", "--backend", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((finished / "report.json").read_text())


if __name__ == "__main__":
    # What the command line runs, on the tiny settings. The processes of the run import the package alone.
    shrink(pytest.MonkeyPatch())
    stages.quickstart = partial(stages.quickstart, overrides=TINY, sources=sources)
    options = {"out": sys.argv[1], "processes": int(sys.argv[2]), "seed": None, "backend": "cpu", "json": False}
    sys.exit(stages.run(argparse.Namespace(**options)))
