"""A fine-tuning run learns what the assistant says, to the same effect however its samples are laid out."""

import json
from pathlib import Path
from typing import Any

import finetuning as tiny
import numpy as np
import pytest
import torch
from tiny_model import TOKENIZER, fails

from dsv3 import backends
from dsv3.core.config import ModelConfig
from dsv3.core.encoding import encode_chat
from dsv3.core.generate import SamplingParams, SimpleRollout
from dsv3.core.model import DeepseekV3
from dsv3.core.tokenizer import Tokenizer
from dsv3.errors import UserError
from dsv3.parallel.data import DataParallel
from dsv3.training.checkpointing import verify
from dsv3.training.progress import Progress
from dsv3.training.sft.config import SftConfig
from dsv3.training.sft.run import Sft

pytestmark = pytest.mark.slow  # whole runs, with their checkpoints and logs

SHIPPED = sorted((Path(__file__).parent.parent / "training" / "configs" / "sft").glob("*.toml"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.prepare(tmp_path_factory.mktemp("sft"))


def opened(config: SftConfig) -> Sft:
    with backends.use_backend("cpu"):
        return Sft(config, DataParallel(), Progress(False))


def gradients(run: Sft) -> torch.Tensor:
    """Of the first step, the update left out."""
    run.update = lambda *args: {}  # type: ignore[method-assign]
    with backends.use_backend("cpu"):
        run.optimize(0)
    return torch.cat([view.reshape(-1) for view in run.gradients.views])


# --- the loss ---


def test_the_loss_is_that_of_every_sample_alone(data: Path, tmp_path: Path) -> None:
    """Packed samples do not see each other: their loss is what the model gives to each of them by itself."""
    run = opened(tiny.config_of(data, tmp_path / "run"))
    units = run.plan.step(0)
    total = learnt = 0.0
    with backends.use_backend("cpu"), torch.no_grad():
        for sample in np.concatenate(units):
            ids, mask = run.samples[int(sample)]
            logits = run.model(torch.from_numpy(ids)[None]).logits[0]
            logp = logits[:-1].log_softmax(-1)[torch.arange(len(ids) - 1), torch.from_numpy(ids[1:])]
            total -= logp[torch.from_numpy(mask[1:])].double().sum().item()
            learnt += mask[1:].sum()
    run.update = lambda *args: {}  # type: ignore[method-assign]
    with backends.use_backend("cpu"):
        values = run.optimize(0)
    assert values["loss"] == pytest.approx(total / learnt, rel=1e-5)
    assert values["batch_learnt"] == learnt


@pytest.mark.parametrize("normalise", ["tokens", "samples"])
def test_passes_of_any_size_make_the_same_gradient(data: Path, tmp_path: Path, normalise: str) -> None:
    options = (f"batch.normalise={normalise}", "balance.alpha=0.01", "mtp_weight=0.3")
    whole, cut = (
        gradients(opened(tiny.config_of(data, tmp_path / str(size), *options, f"batch.micro_tokens={size}")))
        for size in (100_000, 1)
    )
    torch.testing.assert_close(whole, cut, rtol=1e-3, atol=1e-6)


def test_rows_of_packed_samples_are_a_batch_like_any_other(data: Path, tmp_path: Path) -> None:
    rows = opened(tiny.config_of(data, tmp_path / "rows", "batch.samples=0", "batch.tokens=512"))
    units = rows.plan.step(0)
    assert len(units) == 4 and all(rows.samples.lengths[unit].sum() <= 128 for unit in units)
    single = opened(tiny.config_of(data, tmp_path / "single", "batch.samples=4"))
    single.plan.step = lambda step: [np.array([sample]) for unit in units for sample in unit]  # type: ignore
    torch.testing.assert_close(gradients(rows), gradients(single), rtol=1e-3, atol=1e-6)


def test_normalising_by_samples_gives_each_sample_the_same_weight(data: Path, tmp_path: Path) -> None:
    run = opened(tiny.config_of(data, tmp_path / "run", "batch.normalise=samples"))
    run.update = lambda *args: {}  # type: ignore[method-assign]
    with backends.use_backend("cpu"):
        loss = run.optimize(0)["loss"]
        means = []
        for sample in np.concatenate(run.plan.step(0)):
            batch = run._batch(np.array([sample]), [np.array([sample])])
            means.append(-run.student.logp(batch).mean().item())
    assert loss == pytest.approx(np.mean(means), rel=1e-5)


def test_mtp_modules_learn_only_where_they_are_asked_to(data: Path, tmp_path: Path) -> None:
    still, moving = (opened(tiny.config_of(data, tmp_path / str(w), f"mtp_weight={w}")) for w in (0.0, 0.3))
    name = "model.layers.2.eh_proj.weight"
    assert not dict(still.model.named_parameters())[name].requires_grad
    assert name not in still.optimizer.names and name in moving.optimizer.names
    gradients(moving)
    assert moving.gradients.views[moving.optimizer.names.index(name)].abs().max() > 0


def test_mtp_predicts_the_token_after_next_within_a_sample(data: Path, tmp_path: Path) -> None:
    run = opened(tiny.config_of(data, tmp_path / "run", "mtp_weight=1.0"))
    chosen, total = np.arange(3), 0.0
    with backends.use_backend("cpu"), torch.no_grad():
        batch = run._batch(chosen, [chosen])
        got = run.student.losses(batch, 1.0).parts["mtp_loss"].item()
        for sample in chosen:
            ids, mask = (torch.from_numpy(values) for values in run.samples[int(sample)])
            positions = torch.arange(len(ids) - 1)
            step = run.model.step(positions, torch.tensor([0, len(ids) - 1], dtype=torch.int32), len(ids) - 1)
            hidden = run.model.model.norm(run.model.blocks(run.model.embed(ids[:-1]), step))
            states = run.model.mtp(0, hidden, ids[1:], step)
            logp = run.model.head(states)[:-1].log_softmax(-1)[torch.arange(len(ids) - 2), ids[2:]]
            total -= logp[mask[2:]].sum().item()
    assert got == pytest.approx(total / run.samples.losses[chosen].sum(), rel=1e-4)


# --- a run ---


@pytest.fixture(scope="module")
def finished(data: Path) -> tuple[Path, list[dict[str, Any]]]:
    options = ("steps=40", "data.held_out=0.2", "eval.every=20", "balance.gamma=0.001", "log.every=1", "ema_decay=0.9")
    return data / "finished", tiny.run(tiny.config_of(data, data / "finished", *options))


def test_a_run_learns_its_replies_and_leaves_a_model_that_says_them(finished: tuple[Path, list[dict]]) -> None:
    run_dir, log = finished
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    assert log[-1]["validation/held-out"] < 0.6 * log[0]["validation/held-out"]
    assert [record["step"] for record in log if "validation/held-out" in record] == [0, 19, 39]
    assert {path.name for path in run_dir.iterdir()} >= {"model", "model-ema", "loss.png", "expert_load.png"}
    tokenizer = Tokenizer.load(run_dir / "model")
    prompt = tokenizer.encode_segments(encode_chat([{"role": "user", "content": "say 7 0"}]))
    with backends.use_backend("cpu"):
        model = DeepseekV3.from_pretrained(run_dir / "model")
        reply = SimpleRollout(model).generate([prompt], SamplingParams(temperature=0, max_tokens=40))[0]
    assert tokenizer.decode(reply.token_ids).startswith("cat ")


def test_the_log_says_what_a_step_took(finished: tuple[Path, list[dict]]) -> None:
    _, log = finished
    record = log[-1]
    assert record["batch_samples"] == 8 and 0 < record["batch_learnt"] < record["batch_tokens"]
    assert record["tokens"] == sum(entry["batch_tokens"] for entry in log)
    assert record["epoch"] == pytest.approx(40 * 8 / 25)  # 15 of the 40 conversations are held out
    assert {"loss", "lr", "grad_norm", "max_violation", "expert_load", "tokens_per_second", "mfu"} <= record.keys()
    assert record["lr"] < log[0]["lr"] == 3e-3


def test_a_fresh_student_learns_with_a_given_tokenizer_and_a_chosen_format(data: Path, tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "tokenizer", "v3")
    rows = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<think>a cat</think>mat"}]}
    ]
    file = tiny.write_rows(tmp_path / "thoughts.jsonl", rows * 8)
    shape = tiny.SMALL.replace(num_nextn_predict_layers=0).to_dict()
    fields = {name: shape[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")}
    config = tiny.config_of(
        data, tmp_path / "run", "model=", f"tokenizer={tmp_path}/tokenizer", "fresh.base=dsv3-2m", "steps=30",
        "optim.lr=1e-2", "fresh.num_nextn_predict_layers=0", "fresh.init_std=0.05", "data.format=r1",
        f'data.train=["{file}"]',
        *(f"fresh.{name}={value}" for name, value in fields.items()),
    )  # fmt: skip
    log = tiny.run(config)
    assert log[-1]["loss"] < 0.1 * log[0]["loss"]
    saved = Tokenizer.load(tmp_path / "run" / "model")
    assert "<think>" in (saved.chat_template or ""), "whoever reads the model next asks it as it was trained"
    assert ModelConfig.from_pretrained(tmp_path / "run" / "model").eos_token_ids == [saved.eos_id]
    again = tiny.config_of(data, tmp_path / "again").from_dict(config.to_dict() | {"run_dir": f"{tmp_path}/again"})
    assert [entry["loss"] for entry in tiny.run(again)] == [entry["loss"] for entry in log], "seeded"


def test_a_stopped_run_goes_on_to_the_bit(data: Path, tmp_path: Path) -> None:
    def state(run_dir: Path) -> dict[str, str]:
        manifest = json.loads((run_dir / "checkpoints" / "step-00000006" / "manifest.json").read_text())
        return {name: file["sha256"] for name, file in manifest["files"].items() if name != "config.toml"}

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = tiny.run(tiny.config_of(data, whole, "optim.schedule=[]"))
    tiny.run(tiny.config_of(data, parts, "optim.schedule=[]", "steps=4"))
    assert (parts / "model").exists()
    log = tiny.run(tiny.config_of(data, parts, "optim.schedule=[]"))
    assert state(whole) == state(parts)
    assert [(entry["loss"], entry["tokens"]) for entry in log] == [(e["loss"], e["tokens"]) for e in expected]
    assert verify(parts / "checkpoints" / "step-00000006").state["data"]


# --- settings and errors ---


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_configurations_load_and_survive_writing(file: Path, tmp_path: Path) -> None:
    config = SftConfig.load(file)
    (tmp_path / "copy.toml").write_text(config.to_toml())
    assert SftConfig.load(tmp_path / "copy.toml") == config
    assert config.model or config.fresh.resolve().n_routed_experts


def test_the_published_recipes_have_the_published_numbers() -> None:
    recipes = {file.stem: SftConfig.load(file) for file in SHIPPED}

    def rates(name: str) -> tuple[float, str, float | None]:
        (phase,) = recipes[name].optim.schedule
        return recipes[name].optim.lr, phase.shape, phase.lr

    assert rates("v3-paper") == (5e-6, "cosine", 1e-6) and recipes["v3-paper"].epochs == 2
    assert recipes["v3-paper"].batch.tokens > 0, "packed"
    for name in ("r1-cold-start", "r1-paper"):
        recipe = recipes[name]
        assert rates(name) == (5e-5, "cosine", 5e-6)
        assert (recipe.batch.samples, recipe.data.seq_len, recipe.data.format) == (128, 32768, "r1")
        assert 2 <= recipe.epochs <= 3
    student = recipes["distill-student"]
    assert rates("distill-student") == (8e-5, "cosine", pytest.approx(8e-6))
    assert (student.batch.samples, student.data.seq_len) == (64, 32768)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["model="], "name one thing to start from"),
        (["fresh.base=dsv3-2m"], "name one thing to start from"),
        (["model=", "fresh.base=dsv3-2m"], "tokenizer is not set"),
        (["tokenizer=x"], "tokenizer is for fresh models only"),
        (["model=nowhere"], "nowhere: no readable config.json there"),
        (["data.seq_len=512"], "data.seq_len is 512, the model's context 256"),
        (["data.train=[]"], "data.train is empty"),
        (["data.format=moonlight"], "the tokenizer has no token"),
        (["batch.tokens=256"], "batch.samples and tokens exclude each other"),
        (["batch.samples=0", "batch.tokens=200"], "batch.tokens must be a multiple of data.seq_len (128)"),
        (['optim.schedule=[{ until = "5M tokens" }]'], "optim.schedule[0].until must be in steps or percent"),
        (["lora.rank=2", "balance.gamma=0.1"], "balance.gamma moves the biases"),
        (['data.validation={ train = "x" }'], "this name is taken"),
    ],
)
def test_wrong_settings_are_named_in_one_line(data: Path, tmp_path: Path, options: list[str], complaint: str) -> None:
    with pytest.raises(UserError) as error:
        tiny.run(tiny.config_of(data, tmp_path / "run", *options))
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_a_run_does_not_go_on_with_other_data(data: Path, tmp_path: Path) -> None:
    config = tiny.config_of(data, tmp_path / "run", "steps=2")
    tiny.run(config)
    other = tiny.write_rows(tmp_path / "other.jsonl", [tiny.conversation(n) for n in range(9)])
    with pytest.raises(UserError, match=r"the data of .* has changed"):
        tiny.run(tiny.config_of(data, tmp_path / "run", "steps=4", f'data.train=["{other}"]'))
    with pytest.raises(UserError, match="this run was started with seed = 0"):
        tiny.run(tiny.config_of(data, tmp_path / "run", "steps=4", "seed=1"))


def test_the_command_line_runs_it(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny.write(tiny.config_of(data, tmp_path / "run", "data.seq_len=512"))
    assert "the model's context 256" in fails(capsys, "train", "sft", path)
