"""A run of GRPO earns its reward, goes on after an interruption as if there had been none, and refuses bad input."""

import json
import re
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pretraining
import pytest
import reinforcing as tiny
import torch
from safetensors.torch import load_file
from tiny_model import fails

from dsv3.errors import UserError
from dsv3.parallel.data import DataParallel
from dsv3.training.grpo.config import GrpoConfig
from dsv3.training.grpo.run import GrpoRun, cut
from dsv3.training.metrics import read_metrics

pytestmark = pytest.mark.slow  # whole runs, with their checkpoints and logs

HERE = Path(__file__).parent
SHIPPED = sorted((HERE.parent / "training" / "configs" / "grpo").glob("*.toml"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.prepare(tmp_path_factory.mktemp("grpo"))


# --- learning ---

EVERYTHING = (
    "mini_batches=2", "inner_epochs=2", "replay=old", "loss.beta=0.05", "reference_reset=2", "ema_decay=0.9",
    "scale_rewards=batch", "loss.entropy_coef=1e-3", "balance.gamma=0.01", "balance.alpha=1e-3",
    'loss.is_correction={level="token"}', "loss.epsilon_high=0.28",
)  # fmt: skip


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo", "gspo"])
def test_the_reward_rises(data: Path, tmp_path: Path, kind: str) -> None:
    size = ("length=7", "prompts_per_step=8", "group_size=8", "optim.lr=1e-2")
    log = tiny.run(tiny.config_of(data, tmp_path / "run", *size, f"loss.kind={kind}"))
    assert log[0]["reward"] < 0.55 and log[-1]["reward"] > 0.85
    assert log[-1]["entropy"] < log[0]["entropy"]


def test_all_options_together_learn_and_are_logged_under_the_names_of_trl(data: Path, tmp_path: Path) -> None:
    log = tiny.run(tiny.config_of(data, tmp_path / "run", *EVERYTHING, "optim.lr=5e-3", "length=5"))
    assert log[-1]["reward"] > log[0]["reward"] + 0.1
    assert [record["updates"] for record in log] == [4] * 5
    for name in (
        "reward", "reward_std", "frac_reward_zero_std", "rewards/reinforcing:low_tokens/mean",
        "rewards/reinforcing:low_tokens/std", "completions/mean_length", "completions/min_length",
        "completions/max_length", "completions/clipped_ratio", "completions/mean_terminated_length", "entropy", "kl",
        "clip_ratio/low_mean", "clip_ratio/low_min", "clip_ratio/high_mean", "clip_ratio/high_max",
        "clip_ratio/region_mean", "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max",
        "sampling/importance_sampling_ratio/mean", "sampling/importance_sampling_ratio/min",
        "sampling/importance_sampling_ratio/max", "loss", "grad_norm", "lr",
    ):  # fmt: skip
        assert isinstance(log[0].get(name), float | int), name
    assert any(record["clip_ratio/region_mean"] > 0 for record in log)
    assert (tmp_path / "run" / "grpo.png").stat().st_size > 10_000
    assert (tmp_path / "run" / "model-ema" / "config.json").is_file()


def test_the_rollout_is_the_policy_that_is_trained(data: Path, tmp_path: Path) -> None:
    """At another temperature than 1, too: log-probabilities of the rollout and of the update are the same numbers."""
    log = tiny.run(tiny.config_of(data, tmp_path / "run", "length=2", "rollout.temperature=0.7"))
    assert max(record["sampling/sampling_logp_difference/max"] for record in log) < 1e-4


def test_samples_carry_the_version_of_the_weights(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions: list[set[int]] = []
    learn = GrpoRun._learn

    def noting(self: GrpoRun, step: int, batch: Any, max_tokens: int) -> dict[str, Any]:
        versions.append({sample.weight_version for group in batch.groups for sample in group.samples})
        return learn(self, step, batch, max_tokens)

    monkeypatch.setattr(GrpoRun, "_learn", noting)
    config = tiny.config_of(data, tmp_path / "run", "length=3")
    tiny.run(config)
    assert versions == [{0}, {1}, {2}]
    versions.clear()
    tiny.run(replace(config, length=replace(config.length, value=5)))
    assert versions == [{3}, {4}]  # a run that goes on counts on


def test_the_reference_becomes_the_policy_every_so_many_steps(data: Path, tmp_path: Path) -> None:
    options = ("length=5", "loss.beta=0.01", "reference_reset=2", "optim.lr=3e-3")
    log = tiny.run(tiny.config_of(data, tmp_path / "run", *options))
    kl = [record["kl"] for record in log]
    assert max(kl[0], kl[2], kl[4]) < 1e-6 and min(kl[1], kl[3]) > 1e-4


def test_without_a_kl_term_there_is_no_reference(data: Path, tmp_path: Path) -> None:
    assert tiny.opened(tiny.config_of(data, tmp_path / "a")).reference is None
    with_it = tiny.opened(tiny.config_of(data, tmp_path / "b", "loss.beta=0.1"))
    assert with_it.reference is not None and not any(p.requires_grad for p in with_it.reference.parameters())


def test_held_out_prompts_are_measured_before_during_and_behind(data: Path, tmp_path: Path) -> None:
    config = tiny.config_of(
        data,
        tmp_path / "run",
        "length=5",
        "eval.every=2",
        "eval.prompts=7",
        f'data.validation=["{data}/prompts.jsonl"]',
    )
    log = tiny.run(config)
    measured = [record["step"] for record in log if "validation/reward" in record]
    assert measured == [0, 1, 3, 4]
    assert {"validation/length", "validation/clipped_ratio", "validation/rewards/reinforcing:low_tokens"} <= set(log[0])


# --- which samples count ---


def test_dead_groups_are_replaced_by_others(data: Path, tmp_path: Path) -> None:
    config = tiny.config_of(
        data, tmp_path / "run", "length=2", 'rewards=[{name="reinforcing:even_rows_only"}]', "log_completions=4",
        "dynamic_sampling={rounds=8, over_sampling=1.5}",
    )  # fmt: skip
    log = tiny.run(config)
    assert [record["groups"] for record in log] == [4, 4]
    assert 0.2 < log[0]["frac_reward_zero_std"] < 0.8  # of all that were drawn
    lines = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    asked = [int(re.search(r"(\d+) \+ 1", line["prompt"])[1]) for line in lines]  # type: ignore[index]
    assert len(lines) == 2 * 4 * 4 and all(number % 2 == 0 for number in asked)
    state = json.loads((pretraining.newest_checkpoint(tmp_path / "run") / "state.json").read_text())
    assert state["prompts"] > 8  # the run's order of prompts went on beyond them


def test_a_step_without_any_signal_moves_nothing(data: Path, tmp_path: Path) -> None:
    rewards = 'rewards=[{name="length", options={max_tokens=100}}]'
    for name, options in (("off", ()), ("on", ("dynamic_sampling={rounds=2}",))):
        log = tiny.run(tiny.config_of(data, tmp_path / name, rewards, "length=2", *options))
        assert [record["loss"] for record in log] == [0.0, 0.0]
        assert [record["frac_reward_zero_std"] for record in log] == [1.0, 1.0]
        assert log[0]["groups"] == (0 if options else 4)
        before, after = (load_file(path / "model.safetensors") for path in (data / "model", tmp_path / name / "model"))
        assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def test_overlong_completions_are_punished_and_cut_ones_can_be_left_out(data: Path, tmp_path: Path) -> None:
    soft = 'rewards=[{name="length", options={max_tokens=8, soft_tokens=4}}]'
    log = tiny.run(tiny.config_of(data, tmp_path / "soft", soft, "length=1"))
    assert log[0]["rewards/length/mean"] < -0.8  # nearly all run into the limit
    log = tiny.run(tiny.config_of(data, tmp_path / "masked", "loss.mask_truncated=true", "length=1"))
    assert log[0]["completions/clipped_ratio"] == 1.0 and log[0]["grad_norm"] == 0.0


def test_many_cut_completions_are_told(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.run(tiny.config_of(data, tmp_path / "a", "length=1"))
    assert "of the completions were cut off at 8 tokens" in capsys.readouterr().err
    tiny.run(tiny.config_of(data, tmp_path / "b", "length=1", "rollout.max_tokens=250"))
    assert "the context of 256 tokens leaves" in capsys.readouterr().err


def test_the_limit_of_tokens_can_grow(data: Path, tmp_path: Path) -> None:
    longer = 'rollout.longer=[{at="2 steps", max_tokens=12}]'
    log = tiny.run(tiny.config_of(data, tmp_path / "run", longer))
    assert [record["completions/max_length"] for record in log] == [8, 8, 12, 12]


# --- interruptions and processes ---


def outcome(run_dir: Path) -> dict[str, Any]:
    result = pretraining.outcome(run_dir)
    result["log"] = [{k: v for k, v in record.items() if k not in tiny.TIMED} for record in result["log"]]
    return result | {"completions": (run_dir / "completions.jsonl").read_text()}


class Killed(BaseException):
    pass


@pytest.mark.slow
def test_an_interrupted_run_ends_as_the_uninterrupted_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*EVERYTHING, "length=6", "dynamic_sampling={rounds=3}", 'rewards=[{name="reinforcing:even_rows_only"}]')
    tiny.run(tiny.config_of(data, tmp_path / "whole", *options))
    optimize = GrpoRun.optimize
    for step in (3, 5):  # behind a checkpoint, each time: its step is done again

        def until(self: GrpoRun, now: int, stop: int = step) -> dict[str, Any]:
            if now == stop:
                raise Killed
            return optimize(self, now)

        with monkeypatch.context() as patch:
            patch.setattr(GrpoRun, "optimize", until)
            with pytest.raises(Killed):
                tiny.run(tiny.config_of(data, tmp_path / "killed", *options))
    tiny.run(tiny.config_of(data, tmp_path / "killed", *options))
    assert pretraining.differences(outcome(tmp_path / "killed"), outcome(tmp_path / "whole")) == []


@pytest.mark.slow
def test_two_processes_learn_what_one_does(data: Path, tmp_path: Path) -> None:
    options = ("mini_batches=2", "inner_epochs=2", "replay=rollout", "loss.beta=0.05", "prompts_per_step=5",
               'loss.is_correction={level="token"}', "balance.gamma=0.01", "length=2")  # fmt: skip
    # Two steps: rounding grows until a token falls on the other side of a clip, and one of a few hundred is 1 %.
    for name, processes in (("one", 0), ("two", 2)):
        config = tiny.config_of(data, tmp_path / name, *options)
        process = pretraining.start(
            pretraining.command("train", "grpo", tiny.write(config), processes=processes), cwd=HERE
        )
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        assert list(chain(*b.pop("expert_load"))) == pytest.approx(list(chain(*a.pop("expert_load"))), rel=1e-3)
        for key in a.keys() - set(tiny.TIMED):
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-5), key
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    for key, tensor in first.items():  # Adam divides by a gradient's size: where that is rounding, so is the step
        torch.testing.assert_close(second[key], tensor, rtol=1e-3, atol=1e-4)
    start = load_file(data / "model" / "model.safetensors")
    assert any(not torch.equal(tensor, start[key]) for key, tensor in first.items())


def test_modules_that_predict_further_tokens_stay_as_they_are(data: Path, tmp_path: Path) -> None:
    tiny.run(tiny.config_of(data, tmp_path / "run", "length=2", "optim.lr=1e-2"))
    before, after = (load_file(path / "model.safetensors") for path in (data / "model", tmp_path / "run" / "model"))
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert "model.layers.0.self_attn.o_proj.weight" in moved and "lm_head.weight" in moved
    # The format repeats the embedding and the head, which are shared, in the module.
    own = [key for key in moved if key.startswith(f"model.layers.{tiny.SMALL.num_hidden_layers}.")]
    assert all("embed_tokens" in key or "shared_head.head" in key for key in own)


def test_all_samples_of_a_step_are_cut_into_mini_batches() -> None:
    for items, parts in ((7, 3), (8, 2), (3, 3)):
        pieces = cut(list(range(items)), parts)
        assert len(pieces) == parts and list(chain(*pieces)) == list(range(items))
        assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


# --- wrong input ---


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_settings_are_complete(path: Path) -> None:
    config = GrpoConfig.load(path)
    assert config.model and config.data.prompts and config.rewards


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("grup_size=4", "unknown key grup_size; did you mean group_size"),
        ("loss.knd=grpo", "loss.knd"),
        ("loss.kind=ppo", "loss.kind"),
        ("group_size=1", "group_size"),
        ("loss.delta=1.1", "delta must be above 1 \\+ epsilon_high"),
        ("reference_reset=5", "reference_reset needs a reference"),
        ("mini_batches=17", "mini_batches must be at most prompts_per_step x group_size"),
        ('length="5B tokens"', "length must be in steps"),
        ('rewards=[{name="acuracy"}]', "is no reward"),
        ('environment={tools=["math:gcd"], factory="math:gcd"}', "exclude each other"),
    ],
)
def test_wrong_settings_are_named(data: Path, tmp_path: Path, override: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        tiny.config_of(data, tmp_path / "run", override)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model=nowhere", "nowhere"),
        ('model=""', "model is not set"),
        ("rewards=[]", "rewards is empty"),
        ("data.prompts=[]", "data.prompts is empty"),
        ('data.prompts=["nowhere.jsonl"]', "nowhere.jsonl does not exist"),
        ('rewards=[{name="reinforcing:nothing"}]', "cannot import the reward"),
        ('rewards=[{name="accuracy_exact", options={column="gold"}}]', "no row has the column 'gold'"),
        ('environment.tools=["math"]', 'must read "module:function"'),
        ('environment.factory="reinforcing:nothing"', "cannot import"),
        ("data.format=v9", "unknown chat format"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_in_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, says: str
) -> None:
    path = tiny.write(tiny.config_of(data, tmp_path / "run", override))
    assert says in fails(capsys, "train", "grpo", path)


@pytest.mark.parametrize(
    ("row", "reward", "says"),
    [
        (
            '{"prompt": "x", "answer": "\\\\frac{1}{"}',
            "accuracy_math",
            "line 2): answer: '\\\\frac{1}{' cannot be read",
        ),
        ('{"prompt": "x", "answer": ""}', "accuracy_exact", "line 2): answer: '' must be text or a number"),
        ('{"prompt": "x"}', "accuracy_exact", "line 2): nothing says what is right here"),
        ('{"question": "x", "answer": "1"}', "accuracy_exact", "line 2 has no 'prompt'"),
        ('{"prompt": [{"role": "boss", "content": "x"}]}', "accuracy_exact", "line 2: message 0 has the unknown role"),
        (
            '{"prompt": [{"role": "assistant", "content": "x"}]}',
            "accuracy_exact",
            "line 2: the prompt ends with a reply",
        ),
        ('{"prompt": "x",', "accuracy_exact", "line 2: not JSON"),
        (
            '{"prompt": "' + "cat 深 " * 300 + '", "answer": "1"}',
            "accuracy_exact",
            "the model's context is 256: shorten",
        ),
    ],
)
def test_a_row_that_nobody_could_answer_is_refused_at_load(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], row: str, reward: str, says: str
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1 + 1", "answer": "2"}\n' + row + "\n")
    overrides = (f'data.prompts=["{tmp_path}/rows.jsonl"]', f'rewards=[{{name="{reward}"}}]')
    path = tiny.write(tiny.config_of(data, tmp_path / "run", *overrides))
    assert says in fails(capsys, "train", "grpo", path)
    assert not (tmp_path / "run").exists()


def test_a_reward_that_keeps_failing_ends_the_run(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny.write(tiny.config_of(data, tmp_path / "run", 'rewards=[{name="reinforcing:raises"}]', "length=9"))
    assert cli_error(path, capsys).endswith(
        "the reward reinforcing:raises failed in 3 batches in a row: ValueError: no scores today\n"
    )
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 2  # the batches before had no signal


def cli_error(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    from dsv3 import cli

    assert cli.main(["train", "grpo", str(path), "--backend", "cpu"]) == 2
    return capsys.readouterr().err


def test_more_processes_than_groups_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="prompts_per_step is 4 for 5 processes"):
        tiny.opened(tiny.config_of(data, tmp_path / "run"), DataParallel(0, 5))


def test_a_run_does_not_go_on_with_other_prompts(data: Path, tmp_path: Path) -> None:
    path = tiny.write_rows(tmp_path / "rows.jsonl", tiny.rows(5))
    prompts = f'data.prompts=["{path}"]'
    tiny.run(tiny.config_of(data, tmp_path / "run", "length=1", prompts))
    tiny.write_rows(path, tiny.rows(6))
    with pytest.raises(UserError, match=r"the data of .* has changed"):
        tiny.run(tiny.config_of(data, tmp_path / "run", "length=2", prompts))
