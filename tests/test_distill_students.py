"""Students that learn a teacher's probabilities: the loss is the definition's, and runs resume exactly."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_model
import torch
from distilling import thinking, write_rows
from safetensors.torch import load_file
from torch import Tensor

from dsv3 import backends
from dsv3.core.model import DeepseekV3
from dsv3.core.tokenizer import Tokenizer
from dsv3.errors import UserError
from dsv3.parallel.data import DataParallel
from dsv3.training.chat_data import encode_example, load_rows
from dsv3.training.distill.divergence import divergence
from dsv3.training.distill.logits import LogitsRun, logits
from dsv3.training.distill.onpolicy import OnPolicyRun, onpolicy
from dsv3.training.distill.student_config import LogitsConfig, OnPolicyConfig, TeacherModelSection
from dsv3.training.distill.top_k import StoredTopK
from dsv3.training.grpo.sample import Sample
from dsv3.training.metrics import read_metrics
from dsv3.training.progress import Progress
from dsv3.training.sft.packing import collate

SMALL = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_nextn_predict_layers": 0}


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    with backends.use_backend("cpu"):
        yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.save(tmp_path_factory.mktemp("teacher") / "model", "r1")


def fresh(teacher: Path, **fields: Any) -> dict[str, Any]:
    return {"base": str(teacher), "init_std": 0.05, **SMALL, **fields}


def on_policy(folder: Path, teacher: Path, **values: Any) -> OnPolicyConfig:
    prompts = write_rows(folder / "prompts.jsonl", [{"prompt": f"a cat {n}"} for n in range(7)])
    chats = [
        {"messages": [{"role": "user", "content": f"cat {n}"}, {"role": "assistant", "content": thinking("mat", "a")}]}
        for n in range(5)
    ]
    traces = write_rows(folder / "traces.jsonl", chats)
    return OnPolicyConfig.from_dict(
        {
            "run_dir": str(folder / "run"),
            "length": "3 steps",
            "fresh": fresh(teacher),
            "teacher": {"model": str(teacher)},
            "prompts": [str(prompts)],
            "traces": [str(traces)],
            "samples": 4,
            "max_tokens": 6,
            "micro_batch_tokens": 40,
            "optim": {"lr": 3e-3},
        }
        | values
    )


def logits_config(folder: Path, teacher: Path, **values: Any) -> LogitsConfig:
    rows = [
        {"messages": [{"role": "user", "content": f"cat {n}"}, {"role": "assistant", "content": thinking("mat " * n)}]}
        for n in range(1, 7)
    ]
    return LogitsConfig.from_dict(
        {
            "run_dir": str(folder / "run"),
            "steps": 3,
            "k": 5,
            "fresh": fresh(teacher),
            "teacher": {"model": str(teacher)},
            "data": {"train": [str(write_rows(folder / "traces.jsonl", rows))], "seq_len": 128},
            "batch": {"samples": 4, "micro_tokens": 64},
            "optim": {"lr": 3e-3},
        }
        | values
    )


def log_probabilities(model: DeepseekV3, ids: list[int]) -> Tensor:
    """[T - 1, V] f64 of each next token, the plainest way."""
    with torch.no_grad():
        return model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(a: Path, b: Path) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# On the student's own samples.


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_loss_of_a_step_is_the_divergence_over_the_whole_vocabulary(
    tmp_path: Path, teacher: Path, beta: float, share: float
) -> None:
    run = OnPolicyRun(on_policy(tmp_path, teacher, beta=beta, on_policy=share), DataParallel(), Progress(False))
    samples = run.samples(0)
    assert len(samples) == 4
    total, count = 0.0, 0
    for sample in samples:
        p, q = (log_probabilities(model, sample.token_ids) for model in (run.teacher, run.model))
        m = torch.log(beta * p.exp() + (1 - beta) * q.exp())
        each = {
            0.0: (p.exp() * (p - q)).sum(-1),
            0.5: beta * (p.exp() * (p - m)).sum(-1) + (1 - beta) * (q.exp() * (q - m)).sum(-1),
            1.0: (q.exp() * (q - p)).sum(-1),
        }[beta]
        written = [sample.prompt_length - 1 + place for place, own in enumerate(sample.written) if own]
        total += each[written].sum().item()
        count += len(written)
    assert run.optimize(0)["loss"] == pytest.approx(total / count, rel=1e-4)


def test_the_gradient_of_a_step_is_that_of_the_mean_over_all_tokens(tmp_path: Path, teacher: Path) -> None:
    run = OnPolicyRun(on_policy(tmp_path, teacher), DataParallel(), Progress(False))
    samples = run.samples(0)
    count = sum(sample.written_tokens for sample in samples)
    twin = DeepseekV3(run.model.config)
    twin.load_state_dict(run.model.state_dict())
    for sample in samples:
        ids = torch.tensor([sample.token_ids[:-1]])
        rows = torch.tensor([sample.prompt_length - 1 + i for i in range(len(sample.written))])
        hidden = twin(ids, logits="none").hidden[rows]
        wanted = run.teacher(ids, logits="none").hidden[rows].detach()
        (divergence(hidden, twin.head_weight, wanted, run.teacher.head_weight, 1.0).sum() / count).backward()
    updates: list[dict[str, Tensor]] = []
    run.update = lambda *args: updates.append({n: p.grad.clone() for n, p in run.model.named_parameters()}) or {}  # type: ignore
    run.optimize(0)
    for name, parameter in twin.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(updates[0][name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_the_student_comes_closer_to_the_teacher(tmp_path: Path, teacher: Path) -> None:
    onpolicy(on_policy(tmp_path, teacher, length="25 steps", samples=8, optim={"lr": 1e-2}), "cpu")
    losses = [record["loss"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert len(losses) == 25
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    model = DeepseekV3.from_pretrained(tmp_path / "run" / "model")
    assert model.config.num_hidden_layers == 1
    assert Tokenizer.load(tmp_path / "run" / "model").vocab_size == tiny_model.VOCABULARY


def test_a_run_that_was_interrupted_ends_bit_for_bit_as_one_that_was_not(tmp_path: Path, teacher: Path) -> None:
    for name, lengths in (("whole", ["4 steps"]), ("cut", ["2 steps", "4 steps"])):
        (tmp_path / name).mkdir()
        for length in lengths:
            onpolicy(on_policy(tmp_path / name, teacher, length=length, on_policy=0.5), "cpu")
            if length != lengths[-1]:
                shutil.rmtree(tmp_path / name / "run" / "model")
    assert same(tmp_path / "whole" / "run" / "model", tmp_path / "cut" / "run" / "model")


def test_the_share_of_traces_is_what_was_asked_for_and_each_trace_has_its_turn(tmp_path: Path, teacher: Path) -> None:
    run = OnPolicyRun(on_policy(tmp_path, teacher, on_policy=0.25, length="5 steps"), DataParallel(), Progress(False))
    drawn: list[Sample] = [sample for step in range(5) for sample in run.samples(step)]
    from_traces = [sample for sample in drawn if any(sample.token_ids == trace.token_ids for trace in run.traces)]
    assert len(drawn) == 20 and len(from_traces) == 15
    rows = list(load_rows(tmp_path / "traces.jsonl"))
    (example,) = encode_example(rows[0], tiny_model.TOKENIZER, "r1")
    trace = run.traces[0]
    assert trace.token_ids == example.token_ids
    assert [False] * trace.prompt_length + trace.written == example.loss_mask


def test_two_processes_share_the_samples_of_one(tmp_path: Path, teacher: Path) -> None:
    run = OnPolicyRun(on_policy(tmp_path, teacher, on_policy=0.5), DataParallel(), Progress(False))
    whole = sorted(sample.token_ids for sample in run.samples(1))
    parts = []
    for rank in range(2):
        run.parallel = DataParallel(rank, 2)
        parts += run.samples(1)
    assert sorted(sample.token_ids for sample in parts) == whole


@pytest.mark.parametrize("kind", ["onpolicy", "logits"])
def test_another_tokenizer_is_told(tmp_path: Path, teacher: Path, kind: str) -> None:
    other = Tokenizer.train(["other words altogether"] * 9, tiny_model.VOCABULARY)
    student = tiny_model.save(tmp_path / "student", "r1", other)
    make = on_policy if kind == "onpolicy" else logits_config
    config = make(tmp_path, teacher, model=str(student), fresh={})
    with pytest.raises(UserError, match="have different tokenizers"):
        (onpolicy if kind == "onpolicy" else logits)(config, "cpu")  # type: ignore[arg-type]


def test_what_pads_a_vocabulary_is_no_outcome(tmp_path: Path, teacher: Path) -> None:
    run = OnPolicyRun(
        on_policy(tmp_path, teacher, fresh=fresh(teacher, vocab_size=512)), DataParallel(), Progress(False)
    )
    size = tiny_model.VOCABULARY
    samples = run.samples(0) + run.samples(1) + run.samples(2)
    assert all(max(sample.token_ids) < size for sample in samples)
    assert {"outside", "length"} == {sample.finish_reason for sample in samples}
    sample = next(sample for sample in samples if sample.written_tokens)
    with torch.no_grad():
        raw = run.model(torch.tensor([sample.token_ids[:-1]])).logits[0].double()
    q = raw[:, :size].log_softmax(-1)
    p = log_probabilities(run.teacher, sample.token_ids)
    want = (q.exp() * (q - p)).sum(-1)[sample.prompt_length - 1 :].mean().item()
    run.samples = lambda step: [sample]  # type: ignore[method-assign]
    assert run.optimize(0)["loss"] == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fresh": {}}, "name the student"),
        ({"teacher_model": ""}, "teacher.model is not set"),
        ({"prompts": []}, "prompts is empty"),
        ({"traces": [], "on_policy": 0.5}, "traces is empty"),
        ({"format": "r1-zero", "on_policy": 0.5}, "holds no traces"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, teacher: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        nobody = values.pop("teacher_model", str(teacher))
        config = on_policy(tmp_path, teacher, **values)
        OnPolicyRun(replace(config, teacher=TeacherModelSection(nobody)), DataParallel(), Progress(False))


# On traces.


@pytest.mark.parametrize("store", [True, False])
def test_the_loss_on_traces_is_cross_entropy_and_the_divergence_of_the_top_k(
    tmp_path: Path, teacher: Path, store: bool
) -> None:
    config = logits_config(tmp_path, teacher, store=store, ce_weight=0.5, kl_weight=2.0)
    run = LogitsRun(config, DataParallel(), Progress(False))
    ce = kl = 0.0
    count = 0
    for unit in run.plan.step(0):
        ids, mask = run.samples[int(unit[0])]
        p, q = (log_probabilities(model, ids.tolist()) for model in (_teacher(run, teacher), run.model))
        for place in mask[1:].nonzero()[0].tolist():
            top = p[place].topk(5)
            known = (top.values.exp() * (top.values - q[place][top.indices])).sum()
            rest = 1 - top.values.exp().sum()
            others = q[place].exp().sum() - q[place][top.indices].exp().sum()
            kl += (known + rest * (rest.log() - others.log())).item()
            ce -= q[place][int(ids[place + 1])].item()
            count += 1
    values = run.optimize(0)
    assert values["ce"] == pytest.approx(ce / count, rel=1e-4)
    assert values["kl"] == pytest.approx(kl / count, rel=1e-3)
    assert values["loss"] == pytest.approx(0.5 * ce / count + 2.0 * kl / count, rel=1e-3)


def _teacher(run: LogitsRun, directory: Path) -> DeepseekV3:
    return DeepseekV3.from_pretrained(directory)


def test_stored_and_live_probabilities_teach_the_same(tmp_path: Path, teacher: Path) -> None:
    for name in ("stored", "live"):
        (tmp_path / name).mkdir()
        logits(logits_config(tmp_path / name, teacher, store=name == "stored"), "cpu")
    stored, live = (read_metrics(tmp_path / name / "run" / "metrics.jsonl") for name in ("stored", "live"))
    assert [r["loss"] for r in stored] == pytest.approx([r["loss"] for r in live], rel=1e-5)
    assert (tmp_path / "stored" / "run" / "top_k" / "00000.ids.npy").exists()
    assert not (tmp_path / "live" / "run" / "top_k").exists()


def test_storing_goes_on_with_the_blocks_that_are_missing(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsv3.training.distill import top_k

    monkeypatch.setattr(top_k, "BLOCK", 2)
    run = LogitsRun(logits_config(tmp_path, teacher), DataParallel(), Progress(False))
    folder = tmp_path / "run" / "top_k"
    assert len(list(folder.glob("*.ids.npy"))) == 3
    chosen = run.plan.step(0)[0]
    packed = collate(run.samples, chosen, [1.0])  # type: ignore[arg-type]
    before = run.top_k.at(chosen, packed)
    kept = (folder / "00000.ids.npy").stat().st_mtime_ns
    (folder / "00001.ids.npy").unlink()
    again = LogitsRun(logits_config(tmp_path, teacher), DataParallel(), Progress(False))
    assert (folder / "00000.ids.npy").stat().st_mtime_ns == kept
    assert isinstance(again.top_k, StoredTopK)
    after = again.top_k.at(chosen, packed)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    with pytest.raises(UserError, match="for another k: remove it"):
        LogitsRun(logits_config(tmp_path, teacher, k=4), DataParallel(), Progress(False))


def test_training_on_traces_resumes_bit_for_bit(tmp_path: Path, teacher: Path) -> None:
    for name, lengths in (("whole", [4]), ("cut", [2, 4])):
        (tmp_path / name).mkdir()
        for steps in lengths:
            logits(logits_config(tmp_path / name, teacher, steps=steps), "cpu")
            if steps != lengths[-1]:
                shutil.rmtree(tmp_path / name / "run" / "model")
    assert same(tmp_path / "whole" / "run" / "model", tmp_path / "cut" / "run" / "model")


def test_with_all_tokens_known_and_no_cross_entropy_a_copy_of_the_teacher_learns_nothing(
    tmp_path: Path, teacher: Path
) -> None:
    config = logits_config(tmp_path, teacher, model=str(teacher), fresh={}, k=400, ce_weight=0.0)
    run = LogitsRun(config, DataParallel(), Progress(False))
    values = run.optimize(0)
    assert abs(values["loss"]) < 1e-6 and values["grad_norm"] < 1e-4
