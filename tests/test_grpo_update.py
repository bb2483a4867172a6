"""The update's gradient is that of the loss, however samples are packed; a replayed route leads to the router."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reinforcing as tiny
import torch
from torch import Tensor

from dsv3 import backends
from dsv3.core.generate import SamplingParams
from dsv3.core.moe import Gate
from dsv3.core.step import Routing
from dsv3.training.grpo.loss import BatchSize
from dsv3.training.grpo.run import GrpoRun
from dsv3.training.grpo.sample import Sample
from dsv3.training.grpo.update import Learner, micro_batches, pack, score

PARAMS = SamplingParams(max_tokens=8, tempered_logprobs=True)


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    with backends.use_backend("cpu"):
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.prepare(tmp_path_factory.mktemp("grpo"))


def made(data: Path, tmp_path: Path, *options: str) -> tuple[GrpoRun, list[Sample]]:
    """A run, and samples of it with random advantages."""
    run = tiny.opened(tiny.config_of(data, tmp_path / "run", *options))
    run.model.eval()
    groups = run.rollouts.groups([(i, run.prompts.rows[i]) for i in range(4)], 3, PARAMS, 0)
    run.model.train()
    samples = [sample for group in groups for sample in group.samples]
    generator = torch.Generator().manual_seed(0)
    for sample, advantage in zip(samples, torch.randn(len(samples), generator=generator).tolist(), strict=True):
        sample.advantage = advantage
    return run, samples


def size_of(samples: list[Sample]) -> BatchSize:
    return BatchSize(len(samples), sum(sample.written_tokens for sample in samples), 8)


def gradient(run: GrpoRun, samples: list[Sample], size: BatchSize | None = None) -> tuple[float, Tensor]:
    run.gradients.zero()
    loss, _ = run.learner.backward(samples, size or size_of(samples))
    return loss, torch.cat([view.reshape(-1) for view in run.gradients.views])


def with_config(run: GrpoRun, **changes: Any) -> GrpoRun:
    run.config = replace(run.config, **changes)
    run.learner = Learner(run.model, run.reference, run.config, run.balancer)
    return run


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo", "gspo"])
def test_the_gradient_does_not_depend_on_packing(data: Path, tmp_path: Path, kind: str) -> None:
    run, samples = made(data, tmp_path, f"loss.kind={kind}", "loss.beta=0.1", "mini_batches=2")
    run.learner.prepare(samples)
    with torch.no_grad():  # away from the old policy and the reference
        for parameter in run.model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    wanted_loss, wanted = gradient(with_config(run, micro_batch_tokens=100_000), samples)
    for tokens in (1, 60):
        loss, found = gradient(with_config(run, micro_batch_tokens=tokens), samples[::-1])
        assert loss == pytest.approx(wanted_loss, rel=1e-4, abs=1e-6)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)


def test_packed_samples_do_not_see_each_other(data: Path, tmp_path: Path) -> None:
    run, samples = made(data, tmp_path)
    with torch.no_grad():
        together, _ = score(run.model, pack(samples, run.learner.device), 0.7)
        alone = [score(run.model, pack([sample], run.learner.device), 0.7)[0] for sample in samples]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_only_what_the_model_wrote_is_learnt(data: Path, tmp_path: Path) -> None:
    """As behind the answers of a tool: those tokens are read, and have no log-probability to move."""
    run, (sample, *_) = made(data, tmp_path)
    sample.written = [place not in (2, 3) for place in range(len(sample.written))]
    given = pack([sample], run.learner.device)
    first = sample.prompt_length - 1
    assert given.rows.tolist() == [first + place for place in range(len(sample.written)) if place not in (2, 3)]
    assert given.targets.tolist() == [t for i, t in enumerate(sample.completion_ids) if i not in (2, 3)]
    with torch.no_grad():
        logp, _ = score(run.model, given, 1.0)
        logits = run.model(torch.tensor([sample.token_ids[:-1]])).logits[0].log_softmax(-1)
    torch.testing.assert_close(logp, logits[given.rows, given.targets], rtol=1e-4, atol=1e-5)


def test_samples_without_advantage_are_counted_but_not_computed(data: Path, tmp_path: Path) -> None:
    run, samples = made(data, tmp_path)
    for sample in samples[::2]:
        sample.advantage = 0.0
    size = size_of(samples)
    _, skipped = gradient(run, samples, size)
    # A bonus on entropy of no weight to speak of has everything computed.
    _, computed = gradient(with_config(run, loss=replace(run.config.loss, entropy_coef=1e-30)), samples, size)
    torch.testing.assert_close(skipped, computed, rtol=1e-3, atol=1e-6)
    assert skipped.abs().sum() > 0


def test_micro_batches_hold_so_many_tokens_in_order_of_length(data: Path, tmp_path: Path) -> None:
    _, samples = made(data, tmp_path)
    batches = list(micro_batches(samples, 60))
    sizes = [[len(sample.token_ids) - 1 for sample in batch] for batch in batches]
    assert all(sum(batch) <= 60 or len(batch) == 1 for batch in sizes) and len(sizes) > 2
    flat = [size for batch in sizes for size in batch]
    assert flat == sorted(flat) and len(flat) == len(samples)


# --- routing replay ---


def others(samples: list[Sample], experts: int) -> None:
    """Have every recorded choice be another one than the gates make: the experts behind those chosen."""
    for sample in samples:
        assert sample.experts is not None
        sample.experts = (sample.experts + 1) % experts


def test_the_selection_is_replayed_and_the_router_learns_from_it(data: Path, tmp_path: Path) -> None:
    run, samples = made(data, tmp_path, "replay=rollout")
    others(samples, run.model.config.n_routed_experts)
    routing = run.learner._routing(samples)
    assert routing is not None
    given = pack(samples, run.learner.device)
    logp, _ = score(run.model, given, 1.0, routing)
    for place, layer in enumerate(run.learner.layers):
        wanted = torch.cat([sample.experts[:, place] for sample in samples if sample.experts is not None])
        assert torch.equal(routing.experts[layer], wanted)
    # Gates are computed from the scores of now: no weight is zero, and the router has a gradient through them.
    gates = [m for m in run.model.modules() if isinstance(m, Gate) and m.layer in run.learner.layers]
    for of_weight in torch.autograd.grad(logp.sum(), [gate.weight for gate in gates]):
        assert of_weight.abs().sum() > 0
    free, _ = score(run.model, given, 1.0)
    assert not torch.allclose(free, logp, atol=1e-4)


def test_a_step_on_replayed_routes_moves_the_router(data: Path, tmp_path: Path) -> None:
    run, samples = made(data, tmp_path, "replay=rollout")
    others(samples, run.model.config.n_routed_experts)
    gates = [m for m in run.model.modules() if isinstance(m, Gate) and m.layer in run.learner.layers]
    gradient(run, samples)
    assert all(gate.weight.grad is not None and gate.weight.grad.abs().sum() > 0 for gate in gates)


def test_replay_of_the_rollout_undoes_moved_gates(data: Path, tmp_path: Path) -> None:
    """With other balancing biases the gates choose otherwise; replayed, the pass is that of the rollout."""
    run, samples = made(data, tmp_path, "replay=rollout")
    for module in run.model.modules():
        if isinstance(module, Gate) and module.e_score_correction_bias is not None:
            module.e_score_correction_bias.add_(torch.linspace(-1, 1, run.model.config.n_routed_experts))
    written = torch.tensor([logprob for sample in samples for logprob in sample.written_logprobs])
    with torch.no_grad():
        replayed, _ = score(run.model, pack(samples, run.learner.device), 1.0, run.learner._routing(samples))
        free, _ = score(run.model, pack(samples, run.learner.device), 1.0, Routing())
    torch.testing.assert_close(replayed, written, rtol=1e-4, atol=1e-4)
    assert (free - written).abs().max() > 1e-2


def test_replay_of_the_old_policy_keeps_its_routes(data: Path, tmp_path: Path) -> None:
    run, samples = made(data, tmp_path, "replay=old", "inner_epochs=2")
    assert all(sample.experts is None for sample in samples)
    run.learner.prepare(samples)
    noted = [sample.experts for sample in samples]
    for sample, experts in zip(samples, noted, strict=True):
        assert experts is not None and experts.shape == (len(sample.token_ids) - 1, len(run.learner.layers), 2)
    for module in run.model.modules():
        if isinstance(module, Gate) and module.e_score_correction_bias is not None:
            module.e_score_correction_bias.add_(torch.linspace(-1, 1, run.model.config.n_routed_experts))
    routing = run.learner._routing(samples)
    with torch.no_grad():
        logp, _ = score(run.model, pack(samples, run.learner.device), 1.0, routing)
    old = torch.cat([sample.old_logp for sample in samples if sample.old_logp is not None])
    torch.testing.assert_close(logp, old, rtol=1e-4, atol=1e-4)
