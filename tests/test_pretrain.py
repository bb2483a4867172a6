"""Pre-training minimises what it says, follows its schedules, survives what is not finite, leaves what it promises."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pretraining as tiny
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from parity import configs, in_transformers, random_model, relative
from safetensors.torch import load_file
from torch import Tensor, nn

from dsv3 import backends
from dsv3.core.config import ModelConfig
from dsv3.core.generate import SamplingParams, SimpleRollout
from dsv3.core.model import DeepseekV3
from dsv3.core.tokenizer import Tokenizer
from dsv3.errors import UserError
from dsv3.parallel.data import DataParallel
from dsv3.training import pretrain as loop
from dsv3.training.data.loader import IGNORED, Batch
from dsv3.training.flops import flops_per_token
from dsv3.training.loss import Losses, pretraining_loss
from dsv3.training.metrics import read_metrics
from dsv3.training.optim import AdamW
from dsv3.training.pretrain import Pretraining
from dsv3.training.progress import Progress
from dsv3.training.schedule import Schedule

VOCABULARY = 97
MTP_ONLY = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.prepare_data(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(autouse=True)
def on_the_cpu():
    with backends.use_backend("cpu"):
        yield


def batch_of(tokens: Tensor, starts: list[int] | None = None) -> Batch:
    """tokens [B, S+1]; starts: places 0 ... B*S-1 at which documents begin that are kept apart, besides the rows."""
    rows, length = tokens.shape[0], tokens.shape[1] - 1
    borders = sorted({*range(0, rows * length, length), *(starts or [])})
    cu_seqlens = torch.tensor([*borders, rows * length])
    positions = torch.arange(rows * length) - cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())
    targets = tokens[:, 1:].clone()
    for start in starts or []:
        if start % length:
            targets.view(-1)[start - 1] = IGNORED
    longest = int(cu_seqlens.diff().max())
    return Batch(tokens, targets, positions.view(rows, length), cu_seqlens.to(torch.int32), longest)


def some_tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length + 1), generator=torch.Generator().manual_seed(seed))


def small_model(seed: int = 0, **changes: Any) -> DeepseekV3:
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 40,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "max_position_embeddings": 128,
    }
    model = random_model(ModelConfig.from_pretrained("dsv3-2m").replace(**(shape | changes)), seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.5)  # nearer to a model in training: losses of a few nats
    return model.train()


def gradients(model: DeepseekV3) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


# --- the loss ---


def in_their_names(name: str, theirs: dict[str, nn.Parameter]) -> Tensor | None:
    """The gradient that transformers has for our parameter."""
    fused = name.replace(".experts.gate_up_proj.weight", ".experts.gate_up_proj")
    fused = fused.replace(".experts.down_proj.weight", ".experts.down_proj")
    if fused in theirs:
        return theirs[fused].grad
    halves = [theirs[name.replace("gate_up_proj", half)].grad for half in ("gate_proj", "up_proj")]
    return None if halves[0] is None else torch.cat(halves)


def same_gradients(found: dict[str, Tensor], expected: Callable[[str], Tensor | None]) -> None:
    everything = torch.stack([gradient.norm() for gradient in found.values()]).norm()
    for name, gradient in found.items():
        wanted = expected(name)
        assert wanted is not None, name
        # Some are zero but for rounding: those of a gate that renormalises the one expert it chose.
        assert (gradient - wanted).norm() < 1e-4 * wanted.norm() + 1e-6 * everything, name


@settings(deadline=None, max_examples=5, phases=(Phase.generate,), suppress_health_check=list(HealthCheck))
@given(config=configs(), seed=st.integers(0, 2**31))
def test_gradients_of_the_main_loss_are_those_of_transformers(
    tmp_path_factory: pytest.TempPathFactory, config: ModelConfig, seed: int
) -> None:
    model = random_model(config, seed).train()
    theirs = in_transformers(model, tmp_path_factory.mktemp("hf"))
    tokens = torch.randint(config.vocab_size, (2, 25), generator=torch.Generator().manual_seed(seed))
    ours = pretraining_loss(model, batch_of(tokens), 1.0, 0.0, 0.0)
    ours.total.backward()
    logits = theirs(tokens[:, :-1]).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    assert ours.total.item() == pytest.approx(loss.item(), rel=1e-5)
    named = dict(theirs.named_parameters())
    same_gradients(gradients(model), lambda name: in_their_names(name, named))


def test_gradients_with_mtp_are_those_of_a_chain_of_transformers_layers(tmp_path: Path) -> None:
    model = small_model()
    config = model.config
    weight, tokens = 0.3, some_tokens(2, 24)
    # Their model has no MTP, so the module's block becomes one more layer of theirs, and the rest is written out here.
    longer = DeepseekV3(config.replace(num_hidden_layers=3, num_nextn_predict_layers=0))
    longer.load_state_dict({name: t for name, t in model.state_dict().items() if name in longer.state_dict()})
    theirs = in_transformers(longer, tmp_path / "hf")
    module = model.block(2)
    own = {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters() if n in MTP_ONLY}

    def norm(x: Tensor, w: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.rms_norm_eps) * w

    places = torch.arange(24)[None]
    mask = torch.full((24, 24), -torch.inf).triu(1)[None, None]
    rotary = theirs.model.rotary_emb(theirs.model.embed_tokens.weight, places)

    def through(layer: int, x: Tensor) -> Tensor:
        out = theirs.model.layers[layer](x, attention_mask=mask, position_ids=places, position_embeddings=rotary)
        return out[0] if isinstance(out, tuple) else out

    def nats(x: Tensor, wanted: Tensor) -> Tensor:
        return nn.functional.cross_entropy(theirs.lm_head(x).flatten(0, 1), wanted.flatten(), reduction="sum")

    embedded = theirs.model.embed_tokens(tokens)  # [2, 25, D]
    hidden = theirs.model.norm(through(1, through(0, embedded[:, :-1])))
    both = torch.cat([norm(embedded[:, 1:], own["enorm.weight"]), norm(hidden, own["hnorm.weight"])], -1)
    later = norm(through(2, both @ own["eh_proj.weight"].T), own["shared_head.norm.weight"])
    loss = (nats(hidden, tokens[:, 1:]) + weight * nats(later[:, :-1], tokens[:, 2:])) / (2 * 24)
    loss.backward()

    ours = pretraining_loss(model, batch_of(tokens), 1.0, weight, 0.0)
    ours.total.backward()
    assert ours.total.item() == pytest.approx(loss.item(), rel=1e-5)
    named = dict(theirs.named_parameters())
    found = gradients(model)
    assert {f"model.layers.2.{name}" for name in own} <= found.keys()

    def expected(name: str) -> Tensor | None:
        inner = name.removeprefix("model.layers.2.")
        return own[inner].grad if inner in own else in_their_names(name, named)

    same_gradients(found, expected)


@settings(deadline=None, max_examples=8)
@given(st.data())
def test_a_batch_may_be_cut_up_in_any_way(draw: st.DataObject) -> None:
    model = small_model()
    tokens = some_tokens(6, 16)
    cuts = sorted(draw.draw(st.sets(st.integers(1, 5))))
    parts = list(zip([0, *cuts], [*cuts, 6], strict=True))

    def accumulated(parts: list[tuple[int, int]]) -> tuple[list[float], dict[str, Tensor], Tensor]:
        sums, counts = torch.zeros(4, dtype=torch.float64), 0
        for first, last in parts:
            losses = pretraining_loss(model, batch_of(tokens[first:last]), (last - first) / 6, 0.3, 0.01)
            losses.total.backward()
            sums += torch.stack([losses.total.detach(), losses.main, losses.mtp, losses.balance])
            counts = counts + torch.stack(list(losses.routing.counts.values()))
        return sums.tolist(), gradients(model), torch.as_tensor(counts)

    whole, pieces = accumulated([(0, 6)]), accumulated(parts)
    assert pieces[0] == pytest.approx(whole[0], rel=1e-6)
    assert torch.equal(pieces[2], whole[2])
    for name, gradient in whole[1].items():
        assert relative(pieces[1][name], gradient) < 1e-5, name


def test_recomputation_changes_nothing_and_counts_experts_once() -> None:
    model, batch = small_model(), batch_of(some_tokens(2, 16))
    results = []
    for model.recompute in (False, True):
        losses = pretraining_loss(model, batch, 1.0, 0.3, 0.01)
        losses.total.backward()
        results.append((losses, gradients(model)))
    (kept, expected), (again, found) = results
    assert again.total.item() == kept.total.item()
    for layer, counts in kept.routing.counts.items():
        assert torch.equal(again.routing.counts[layer], counts)
        assert counts.sum() == 2 * 16 * model.config.num_experts_per_tok
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_documents_kept_apart_are_each_as_if_alone() -> None:
    model = small_model(num_nextn_predict_layers=2)
    tokens = some_tokens(1, 30)
    borders = [0, 9, 11, 12, 30]  # documents of 9, 2, 1 and 18 tokens; the last one goes on behind the row
    together = pretraining_loss(model, batch_of(tokens, borders[1:-1]), 1.0, 0.3, 0.0)
    together.total.backward()
    expected = gradients(model)
    main = mtp = 0.0
    for first, last in pairwise(borders):
        alone = batch_of(tokens[:, first : last + 1].clone())
        if last < 30:
            alone.tokens[:, -1] = 0  # what follows belongs to another document: neither read nor predicted
            alone.targets[:, -1] = IGNORED
        losses = pretraining_loss(model, alone, (last - first) / 30, 0.3, 0.0)
        losses.total.backward()
        main, mtp = main + losses.main.item(), mtp + losses.mtp.item()
    assert [together.main.item(), together.mtp.item()] == pytest.approx([main, mtp], rel=1e-5)
    same_gradients(gradients(model), expected.get)


def test_flops_are_those_worked_out_for_the_671b_model() -> None:
    config = ModelConfig.from_pretrained("deepseek-v3-671b")
    assert round(flops_per_token(config, 4096, mtp=False) / 1e9, 1) == 250.4
    assert round(flops_per_token(config, 4096) / 1e9, 1) == 260.6


# --- a run ---


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of 12 steps with everything switched on."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    tiny.run(
        data, folder, "length=12 steps", "log.tensorboard=true", "eval.every=4", "sample.every=6",
        "sample.max_tokens=8", 'sample.prompts=["def f", "a cat"]', "balance.gamma=0.125", "balance.gamma_until=50%",
        "mtp.switch_at=50%", "batch.ramp={start=2, over='4 steps'}", "optim.bf16_moments=true",
    )  # fmt: skip
    return folder


def test_the_log_follows_the_schedules(finished: Path) -> None:
    config = loop.PretrainConfig.load(finished / "config.toml")
    schedule, records = Schedule(config), read_metrics(finished / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(12))
    assert [record["lr"] for record in records] == [schedule.lr(step) for step in range(12)]
    assert [record["batch_sequences"] for record in records] == [2, 2, 3, 3, *[4] * 8]
    assert [record["tokens"] for record in records] == [
        32 * schedule.timeline.sequences_before(s + 1) for s in range(12)
    ]
    assert records[-1]["loss"] < records[0]["loss"] - 0.3
    for record in records:
        assert record["grad_norm"] > 0 and record["mtp_loss"] > 0 and record["balance_loss"] > 0
        assert record["skipped_steps"] == 0
        for layer in record["expert_load"]:
            assert math.fsum(layer) / len(layer) == pytest.approx(1)
        assert record["max_violation"] == pytest.approx(max(map(max, record["expert_load"])) - 1, abs=1e-6)
    assert [record["step"] + 1 for record in records if "validation/code" in record] == [1, 4, 8, 12]


def test_the_optimizer_and_the_loss_get_what_the_schedule_says(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, weights = [], []
    step, loss = AdamW.step, loop.pretraining_loss

    def noted_step(self: Any, lr: float, gradients: Any) -> None:
        steps.append(lr)
        step(self, lr, gradients)

    def noted_loss(model: Any, batch: Any, share: float, mtp_lambda: float, alpha: float) -> Losses:
        weights.append(mtp_lambda)
        return loss(model, batch, share, mtp_lambda, alpha)

    monkeypatch.setattr(AdamW, "step", noted_step)
    monkeypatch.setattr(loop, "pretraining_loss", noted_loss)
    records = tiny.run(data, tmp_path / "run", "mtp.switch_at=4 steps")
    assert steps == [record["lr"] for record in records] and len(set(steps)) == 6
    assert weights == [0.3] * 4 + [0.1] * 2


def test_the_biases_move_until_gamma_ends(finished: Path) -> None:
    """Steps of 0.125 are exact in binary; the checkpoints before steps 10 and 12 are kept."""
    saved = [load_file(finished / f"checkpoints/step-000000{step}/model.safetensors") for step in (10, 12)]
    names = [name for name in saved[0] if name.endswith("e_score_correction_bias")]
    assert len(names) == 2  # one MoE layer and the MTP module
    for name in names:
        assert torch.equal(saved[0][name], saved[1][name])
        assert saved[0][name].any() and not (saved[0][name] / 0.125).frac().any()
        assert saved[0][name].abs().max() <= 6 * 0.125


def test_a_run_leaves_pictures_samples_events_and_its_settings(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name in ("loss.png", "expert_load.png"):
        assert (finished / name).read_bytes().startswith(PNG)
    lines = (finished / "samples.tsv").read_text().splitlines()
    assert [line.split("\t")[:2] for line in lines] == [
        [f"step {step}", repr(prompt)] for step in (6, 12) for prompt in ("def f", "a cat")
    ]
    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    records = read_metrics(finished / "metrics.jsonl")
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([record["loss"] for record in records])
    assert {"lr", "grad_norm", "validation/code"} <= set(events.Tags()["scalars"])
    assert sorted(path.name for path in (finished / "checkpoints").glob("step-*")) == ["step-00000010", "step-00000012"]
    assert not list(finished.rglob("*.tmp*"))


def test_samples_come_from_the_weights_of_their_step(data: Path, tmp_path: Path) -> None:
    prompts = ("sample.every=1", 'sample.prompts=["def f"]', "sample.temperature=1.0", "optim.lr=0.03")
    tiny.run(data, tmp_path / "run", *prompts, "sample.max_tokens=24")
    last = (tmp_path / "run" / "samples.tsv").read_text().splitlines()[-1].split("\t")[2]
    tokenizer = Tokenizer.load(tmp_path / "run" / "model")
    prompt = [tokenizer.bos_id, *tokenizer.encode("def f")]
    rollout = SimpleRollout(DeepseekV3.from_pretrained(tmp_path / "run" / "model"))
    (completion,) = rollout.generate([prompt], SamplingParams(temperature=1.0, max_tokens=24, seed=0))
    assert last == repr(tokenizer.decode(completion.token_ids, skip_special=True))


def test_the_model_of_a_run_loads_here_and_in_transformers(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = torch.tensor([Tokenizer.load(finished / "model").encode("def f1(x):\n    return")])
    assert AutoTokenizer.from_pretrained(finished / "model").encode("def f1(x):\n    return")[-len(tokens[0]) :] == (
        tokens[0].tolist()
    )
    logits = {}
    for name in ("model", "model-ema"):
        ours = DeepseekV3.from_pretrained(finished / name)(tokens).logits
        theirs = AutoModelForCausalLM.from_pretrained(finished / name, dtype=torch.float32)(tokens).logits
        assert relative(ours.detach(), theirs.detach()) < 1e-5
        logits[name] = ours.detach()
    assert 1e-3 < relative(logits["model-ema"], logits["model"]) < 1
    trained = load_file(tiny.newest_checkpoint(finished) / "model.safetensors")
    assert torch.equal(DeepseekV3.from_pretrained(finished / "model").lm_head.weight, trained["lm_head.weight"])
    averages = load_file(tiny.newest_checkpoint(finished) / "ema.safetensors")
    assert torch.equal(DeepseekV3.from_pretrained(finished / "model-ema").lm_head.weight, averages["lm_head.weight"])


def test_moments_are_bfloat16_where_asked(finished: Path) -> None:
    state = load_file(tiny.newest_checkpoint(finished) / "optimizer.safetensors")
    assert state["exp_avg.lm_head.weight"].dtype == torch.bfloat16
    assert state["exp_avg_sq.lm_head.weight"].dtype == torch.bfloat16
    assert not any(name.startswith("master.") for name in state)  # float32 weights are their own masters


def test_bfloat16_trains_with_float32_masters(data: Path, tmp_path: Path) -> None:
    records = tiny.run(data, tmp_path / "run", "length=12 steps", "precision=bf16")
    assert records[-1]["loss"] < records[0]["loss"] - 0.3
    checkpoint = tiny.newest_checkpoint(tmp_path / "run")
    state = load_file(checkpoint / "optimizer.safetensors")
    weights = load_file(checkpoint / "model.safetensors")
    masters = {name.removeprefix("master."): t for name, t in state.items() if name.startswith("master.")}
    assert len(masters) > 20
    for name, master in masters.items():
        assert master.dtype == torch.float32 and weights[name].dtype == torch.bfloat16
        assert torch.equal(weights[name], master.bfloat16())
    assert any(not torch.equal(master, weights[name].float()) for name, master in masters.items())
    assert DeepseekV3.from_pretrained(tmp_path / "run" / "model").lm_head.weight.dtype == torch.bfloat16


def test_micro_batches_do_not_matter_to_a_run(data: Path, tmp_path: Path) -> None:
    one, three = (tiny.run(data, tmp_path / n, "length=1", f"batch.micro_batch={n}")[0] for n in ("4", "3"))
    for key in ("loss", "mtp_loss", "balance_loss", "grad_norm"):
        assert three[key] == pytest.approx(one[key], rel=1e-6), key
    assert three["expert_load"] == one["expert_load"]


def test_an_mtp_module_without_weight_stays_as_it_was(data: Path, tmp_path: Path) -> None:
    settings = ("length=3 steps", "mtp.weight=0", "mtp.final_weight=0", "optim.weight_decay=0", "balance.centred=true")
    records = tiny.run(data, tmp_path / "run", *settings)
    assert records[-1]["mtp_loss"] == 0 and records[-1]["loss"] < records[0]["loss"]
    assert set(records[-1]["expert_load"][-1]) == {0.0}
    trained = load_file(tiny.newest_checkpoint(tmp_path / "run") / "model.safetensors")
    assert not trained["model.layers.2.mlp.gate.e_score_correction_bias"].any()
    assert trained["model.layers.1.mlp.gate.e_score_correction_bias"].any()


def test_a_run_without_mtp_experts_average_or_validation_runs(data: Path, tmp_path: Path) -> None:
    settings = (
        "model.num_nextn_predict_layers=0",
        "model.first_k_dense_replace=2",
        "ema_decay=0",
        "checkpoint.every=0",
    )
    records = tiny.run(data, tmp_path / "run", *settings, "length=2 steps", "log.every=5")
    assert [record["step"] for record in records] == [0, 1]  # the last step is logged whatever its number
    assert records[-1]["expert_load"] == []
    assert not (tmp_path / "run" / "model-ema").exists()


# --- what is not finite ---


def break_steps(monkeypatch: pytest.MonkeyPatch, *bad: int, how: str = "loss") -> None:
    """Make the loss, or a weight during the pass, not finite at the calls with these numbers."""
    calls, real = iter(range(10**6)), loop.pretraining_loss

    def broken(model: DeepseekV3, *args: Any) -> Losses:
        if next(calls) not in bad:
            return real(model, *args)
        if how == "loss":
            losses = real(model, *args)
            losses.total, losses.main = losses.total * torch.nan, losses.main * torch.nan
            return losses
        weight = model.block(1).self_attn.o_proj.weight
        kept = weight.detach().clone()
        with torch.no_grad():
            weight[0, 0] = torch.inf
            losses = real(model, *args)
            weight.copy_(kept)
        losses.total = losses.total.detach().requires_grad_()
        return losses

    monkeypatch.setattr(loop, "pretraining_loss", broken)


@pytest.mark.parametrize("how", ["loss", "weight"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    break_steps(monkeypatch, 2, 4, how=how)
    states = []
    advance = Pretraining._advance

    def noted(self: Pretraining, log: Any) -> None:
        advance(self, log)
        states.append({f"{g} {n}": t.clone() for g, named in self.tensors().items() for n, t in named.items()})

    monkeypatch.setattr(Pretraining, "_advance", noted)
    records = tiny.run(data, tmp_path / "run")
    assert [record["skipped_steps"] for record in records] == [0, 0, 1, 1, 2, 2]
    assert records[2]["loss"] is None and records[3]["loss"] is not None
    for step in (2, 4):  # weights, biases, moments and the average: nothing has moved
        assert all(torch.equal(states[step][name], before) for name, before in states[step - 1].items())
    for step in (1, 3, 5):
        for what in ("lm_head.weight", "model.layers.1.mlp.gate.e_score_correction_bias"):
            assert not torch.equal(states[step][f"model {what}"], states[step - 1][f"model {what}"])
        assert not torch.equal(states[step]["ema lm_head.weight"], states[step - 1]["ema lm_head.weight"])
    assert "step 2: loss or gradient is not finite, the step is skipped (1 so far)" in capsys.readouterr().err


def test_too_many_skipped_steps_in_a_row_end_the_run_with_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dsv3 import cli

    config = tiny.config_of(data, tmp_path / "run", "max_skipped_steps=3", "length=20 steps")
    break_steps(monkeypatch, 1, 2, 5, 6, 7)  # two in a row are forgiven
    assert cli.main(["train", "pretrain", str(tiny.write(config)), "--backend", "cpu"]) == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if "error" in line]
    assert errors == [lines[-1]]
    assert errors[0].startswith(
        "dsv3: error: 3 steps in a row had a loss or gradient that is not finite: lower optim.lr"
    )
    assert "from step 5 on" in errors[0]
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 7


def test_no_patience_at_all_still_lets_finite_steps_pass(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(tiny.run(data, tmp_path / "fine", "max_skipped_steps=0", "length=2")) == 2
    break_steps(monkeypatch, 1)
    with pytest.raises(UserError, match="1 steps in a row"):
        tiny.run(data, tmp_path / "bad", "max_skipped_steps=0")


# --- processes ---


def test_more_processes_than_sequences_are_refused(data: Path, tmp_path: Path) -> None:
    config = tiny.config_of(data, tmp_path / "run", "batch.ramp={start=2, over='3 steps'}")
    with pytest.raises(UserError, match="first step has 2 sequences for 3 processes: raise"):
        Pretraining(config, DataParallel(0, 3), Progress(False))
