"""Our loss, advantages and metrics are those of TRL's GRPOTrainer on the same numbers."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3.training.grpo.advantages import advantages
from dsv3.training.grpo.config import LossSection
from dsv3.training.grpo.loss import BatchSize, Tokens, policy_loss

pytestmark = [pytest.mark.peer, pytest.mark.slow]
pytest.importorskip("trl")
import trl_peer as peer  # noqa: E402

MAX_TOKENS, GROUP, WIDTH = 64, 3, 11


def numbers(seed: int, noise: float) -> peer.Numbers:
    """Six sequences in two groups; noise: how far the policies are from each other."""
    generator = torch.Generator().manual_seed(seed)

    def near(center: Tensor) -> Tensor:
        return center + noise * torch.randn(center.shape, generator=generator)

    lengths = torch.tensor([11, 3, 5, 1, 7, 4])
    old = -3 * torch.rand(6, WIDTH, generator=generator)
    rewards = torch.rand(6, 2, generator=generator)
    rewards[4, 1] = float("nan")  # one function does not apply
    return peer.Numbers(
        near(old).requires_grad_(), old, near(old), near(old), torch.rand(6, WIDTH, generator=generator),
        (torch.arange(WIDTH) < lengths[:, None]).long(), rewards, torch.tensor([0, 1, 0, 0, 0, 1]).bool(),
    )  # fmt: skip


def ours(given: peer.Numbers, settings: LossSection, scale: str) -> tuple[Tensor, list[float], dict[str, float]]:
    totals = given.rewards.nansum(1).view(-1, GROUP).tolist()
    found = list(itertools.chain(*advantages(totals, scale)))
    learning = given.mask.bool() & ~(given.truncated[:, None] & settings.mask_truncated)
    tokens = Tokens(
        learning.nonzero()[:, 0], torch.tensor(found), given.logp[learning], given.entropy[learning],
        given.old[learning], given.reference[learning] if settings.beta else None, given.sampling[learning],
    )  # fmt: skip
    value, tally = policy_loss(tokens, BatchSize(6, int(learning.sum()), MAX_TOKENS), settings)
    return value, found, tally.values()


def theirs(given: peer.Numbers, settings: LossSection, scale: str) -> tuple[Tensor, Tensor, dict[str, float]]:
    sequence, correction = settings.kind == "gspo", settings.is_correction
    made = peer.trainer(
        given, GROUP, loss_type="grpo" if sequence else settings.kind, scale_rewards=scale, beta=settings.beta,
        importance_sampling_level="sequence" if sequence else "token", epsilon_low=settings.epsilon_low,
        epsilon_high=settings.epsilon_high, delta=settings.delta, use_bias_correction_kl=settings.unbiased_kl,
        mask_truncated_completions=settings.mask_truncated, max_completion_length=MAX_TOKENS,
        vllm_importance_sampling_correction=correction.level != "none",
        vllm_importance_sampling_mode=f"{correction.level}_{correction.mode}",
        vllm_importance_sampling_clip_max=correction.cap, _entropy_bonus_enabled=bool(settings.entropy_coef),
        entropy_coef=settings.entropy_coef,
    )  # fmt: skip
    return peer.loss(made)


def check(seed: int, noise: float, settings: LossSection, scale: str = "group") -> None:
    given = numbers(seed, noise)
    want, wanted_advantages, metrics = theirs(given, settings, scale)
    (wanted_gradient,) = torch.autograd.grad(want, given.logp)
    value, found, told = ours(given, settings, scale)
    (gradient,) = torch.autograd.grad(value, given.logp)
    torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(found), wanted_advantages, rtol=1e-5, atol=1e-6)
    # Of sequences that do not train, TRL counts zeros into the means over sequences; ours leave them out.
    apart = settings.kind == "gspo" and settings.mask_truncated
    for name, number in told.items():
        if name in metrics and not (apart and name.startswith("clip_ratio/")):
            assert number == pytest.approx(metrics[name], rel=1e-5, abs=1e-6), name
    wanted_names = {name for name in metrics if name.startswith(("clip_ratio/", "sampling/", "kl", "entropy"))}
    assert wanted_names - {"entropy_coef"} <= told.keys()


@pytest.mark.parametrize("mask_truncated", [False, True])
@pytest.mark.parametrize("noise", [0.02, 0.5])
@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo", "gspo"])
def test_each_kind_of_loss_is_theirs(kind: Any, noise: float, mask_truncated: bool):
    for seed in range(4):
        check(seed, noise, LossSection(kind=kind, epsilon_high=0.28, beta=0.05, mask_truncated=mask_truncated))


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo", "gspo"])
@pytest.mark.parametrize(
    "settings",
    [
        {"epsilon_low": 10, "epsilon_high": 10},
        {"delta": 1.5},
        {"beta": 0.3, "unbiased_kl": True},
        {"entropy_coef": 0.01},
        *({"is_correction": {"level": level, "mode": mode, "cap": 1.2}}
          for level in ("token", "sequence") for mode in ("truncate", "mask")),
    ],
    ids=str,
)  # fmt: skip
def test_every_option_is_theirs(kind: Any, settings: dict[str, Any]):
    for seed in range(3):
        check(seed, 0.5, LossSection.from_dict({"kind": kind, **settings}))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_every_scale_of_the_advantages_is_theirs(scale: str):
    for seed in range(3):
        check(seed, 0.1, LossSection(), scale)


def test_the_peer_is_their_own_code() -> None:
    made = peer.trainer(numbers(0, 0.1), GROUP)
    for method in (made._generate_and_score_completions, made._compute_loss):
        assert method.__func__.__module__ == "trl.trainer.grpo_trainer"
