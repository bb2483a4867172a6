"""The policy loss is the published one, however the batch is cut; nothing to learn gives no gradient."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3.training.grpo.config import LossSection
from dsv3.training.grpo.loss import BatchSize, Tokens, kl_estimate, policy_loss

KINDS = ["grpo", "dapo", "dr_grpo", "gspo"]
MAX_TOKENS = 16
SOME = settings(deadline=None, max_examples=30)


def make(lengths: list[int], seed: int, noise: float = 0.3, advantages: list[float] | None = None) -> Tokens:
    """Random numbers for sequences of these lengths; `noise` is how far the policies are from each other."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)

    def near(center: Tensor) -> Tensor:
        return center + noise * torch.randn(count, generator=generator, dtype=torch.float64)

    old = -3 * torch.rand(count, generator=generator, dtype=torch.float64)
    found = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    return Tokens(
        sequence=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        advantages=found if advantages is None else torch.tensor(advantages, dtype=torch.float64),
        logp=near(old).requires_grad_(), entropy=torch.rand(count, generator=generator, dtype=torch.float64),
        old_logp=old, reference_logp=near(old), sampling_logp=near(old),
    )  # fmt: skip


def size_of(tokens: Tokens) -> BatchSize:
    return BatchSize(len(tokens.advantages), len(tokens.logp), MAX_TOKENS)


def loss(tokens: Tokens, **options: Any) -> Tensor:
    return policy_loss(tokens, size_of(tokens), LossSection.from_dict(options))[0]


def gradient(tokens: Tokens, **options: Any) -> Tensor:
    return torch.autograd.grad(loss(tokens, **options), tokens.logp)[0]


def part(tokens: Tokens, sequences: list[int]) -> Tokens:
    """The tokens of some sequences, as another micro-batch or process would have them."""
    chosen = torch.cat([(tokens.sequence == s).nonzero()[:, 0] for s in sequences])
    number = {s: i for i, s in enumerate(sequences)}
    return Tokens(
        torch.tensor([number[s] for s in tokens.sequence[chosen].tolist()]), tokens.advantages[sequences],
        *(column[chosen] if column is not None else None for column in (
            tokens.logp, tokens.entropy, tokens.old_logp, tokens.reference_logp, tokens.sampling_logp)),
    )  # fmt: skip


# --- cuts ---

EVERYTHING: dict[str, Any] = {"beta": 0.1, "unbiased_kl": True, "entropy_coef": 0.01, "delta": 2.0}


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", KINDS)
@SOME
@given(
    lengths=st.lists(st.integers(1, MAX_TOKENS), min_size=2, max_size=6),
    owners=st.lists(st.integers(0, 3), min_size=6, max_size=6),
    seed=st.integers(0, 1000),
)
def test_shares_of_a_batch_add_up_however_it_is_cut(kind, level, lengths, owners, seed):
    options = {"kind": kind, "is_correction": {"level": level}, **EVERYTHING}
    tokens = make(lengths, seed)
    whole, tally = policy_loss(tokens, size_of(tokens), LossSection.from_dict(options))
    (wanted,) = torch.autograd.grad(whole, tokens.logp, retain_graph=True)
    pieces = [[s for s in range(len(lengths)) if owners[s] == owner] for owner in range(4)]
    shares = [policy_loss(part(tokens, p), size_of(tokens), LossSection.from_dict(options)) for p in pieces if p]
    total = sum(share for share, _ in shares)
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(torch.autograd.grad(total, tokens.logp)[0], wanted)
    first, *rest = (piece for _, piece in shares)
    assert first.merge(rest).values() == pytest.approx(tally.values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_tokens_does_not_matter(kind):
    tokens = make([5, 2, 7], 0)
    order = torch.randperm(14, generator=torch.Generator().manual_seed(0))
    mixed = replace(
        tokens, sequence=tokens.sequence[order], logp=tokens.logp[order], entropy=tokens.entropy[order],
        old_logp=tokens.old_logp[order], reference_logp=tokens.reference_logp[order],
        sampling_logp=tokens.sampling_logp[order],
    )  # fmt: skip
    torch.testing.assert_close(loss(mixed, kind=kind, beta=0.1), loss(tokens, kind=kind, beta=0.1))


# --- what it averages ---


@pytest.mark.parametrize(
    ("kind", "weights"),
    [("grpo", [1 / 2, *[1 / 6] * 3]), ("dapo", [1 / 4] * 4), ("dr_grpo", [1 / (2 * MAX_TOKENS)] * 4)],
)
def test_each_kind_weighs_tokens_as_published(kind, weights):
    tokens = make([1, 3], 0, noise=0.0, advantages=[2.0, -1.0])
    torch.testing.assert_close(
        gradient(tokens, kind=kind), -torch.tensor(weights).double() * torch.tensor([2.0, -1.0, -1.0, -1.0])
    )


@pytest.mark.parametrize("kind", KINDS)
@SOME
@given(lengths=st.lists(st.integers(1, MAX_TOKENS), min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_the_first_update_follows_the_plain_policy_gradient(kind, lengths, seed):
    tokens = replace(make(lengths, seed), old_logp=None)
    weight = {
        "grpo": 1 / (tokens.lengths[tokens.sequence] * len(lengths)),
        "gspo": 1 / (tokens.lengths[tokens.sequence] * len(lengths)),
        "dapo": 1 / sum(lengths),
        "dr_grpo": 1 / (len(lengths) * MAX_TOKENS),
    }[kind]
    wanted = -tokens.advantages[tokens.sequence] * weight
    torch.testing.assert_close(gradient(tokens, kind=kind), wanted)


@pytest.mark.parametrize("kind", KINDS)
@SOME
@given(lengths=st.lists(st.integers(1, MAX_TOKENS), min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_no_advantage_gives_no_gradient(kind, lengths, seed):
    tokens = make(lengths, seed, advantages=[0.0] * len(lengths))
    assert not gradient(tokens, kind=kind, is_correction={"level": "token"}).any()


def test_sequences_without_tokens_count_as_sequences():
    """As those that were cut off and do not train."""
    tokens = make([4, 4], 0)
    size = BatchSize(4, 8, MAX_TOKENS)
    value, _ = policy_loss(tokens, size, LossSection(kind="grpo"))
    torch.testing.assert_close(value, loss(tokens, kind="grpo") / 2)


# --- what it clips ---


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo"])
@SOME
@given(seed=st.integers(0, 1000), low=st.floats(0.05, 0.9), high=st.floats(0.05, 2))
def test_a_token_that_has_gone_far_enough_has_no_gradient(kind, seed, low, high):
    tokens = make([6, 6], seed, noise=0.8)
    ratio = (tokens.logp - tokens.old_logp).exp()
    advantage = tokens.advantages[tokens.sequence]
    clipped = ((ratio > 1 + high) & (advantage > 0)) | ((ratio < 1 - low) & (advantage < 0))
    moved = gradient(tokens, kind=kind, epsilon_low=low, epsilon_high=high) != 0
    assert torch.equal(moved, ~clipped)


def test_a_bound_from_above_holds_for_negative_advantages_too():
    tokens = make([3], 0, advantages=[-1.0])
    far = replace(tokens, old_logp=tokens.logp.detach() - math.log(5))
    assert gradient(far, epsilon_high=0.2).all()
    assert not gradient(far, epsilon_high=0.2, delta=4.0).any()


def test_the_published_bound_of_ten_clips_nothing_within_it():
    tokens = make([40], 0, noise=0.7)
    free = -(tokens.logp - tokens.old_logp).exp() * tokens.advantages[tokens.sequence] / 40
    torch.testing.assert_close(gradient(tokens, epsilon_low=10, epsilon_high=10), free)


def test_gspo_clips_whole_sequences_by_their_mean_ratio():
    tokens = make([4, 4], 0, advantages=[1.0, 1.0])
    shift = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.4, 0.4, 0.4, 0.4], dtype=torch.float64)
    tokens = replace(tokens, old_logp=tokens.logp.detach() - shift)
    moved = gradient(tokens, kind="gspo", epsilon_high=0.3)
    assert moved[:4].all() and not moved[4:].any()  # mean ratios exp(0) and exp(0.4)


# --- KL ---


def distributions(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    return logits[0].requires_grad_(), logits[1].log_softmax(-1)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_are_kl_on_average(kind):
    for seed in range(5):
        logits, reference = distributions(seed)
        logp = logits.log_softmax(-1)
        kl = (logp.exp() * (logp - reference)).sum()
        torch.testing.assert_close((logp.exp() * kl_estimate(logp, reference, kind)).sum(), kl)


def test_k2_and_unbiased_k3_have_the_gradient_of_kl_on_average():
    for seed in range(5):
        logits, reference = distributions(seed)
        logp = logits.log_softmax(-1)
        p = logp.exp().detach()
        (wanted,) = torch.autograd.grad((logp.exp() * (logp - reference)).sum(), logits, retain_graph=True)
        k2 = (p * kl_estimate(logp, reference, "k2")).sum()
        k3 = (p * kl_estimate(logp, reference, "k3") * (logp - logp.detach()).exp()).sum()
        plain = (p * kl_estimate(logp, reference, "k3")).sum()
        for estimate in (k2, k3):
            torch.testing.assert_close(torch.autograd.grad(estimate, logits, retain_graph=True)[0], wanted)
        assert not torch.allclose(torch.autograd.grad(plain, logits)[0], wanted)


@SOME
@given(a=st.floats(-20, 0), b=st.floats(-20, 0))
def test_k3_is_never_negative(a, b):
    assert kl_estimate(torch.tensor(a).double(), torch.tensor(b).double(), "k3") >= 0


def test_kl_pulls_to_the_reference():
    tokens = make([8], 0, advantages=[0.0])
    for kind in ("k2", "k3"):
        down = gradient(tokens, beta=0.5, kl=kind)
        assert torch.equal(down > 0, tokens.logp > tokens.reference_logp)


# --- mismatch of the rollout ---


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights_are_cut_or_leave_out(level):
    tokens = make([3, 3], 0, advantages=[1.0, 1.0])
    gap = torch.tensor([0.1, 0.1, 0.1, 2.0, 0.0, 0.0], dtype=torch.float64)
    tokens = replace(tokens, old_logp=tokens.logp.detach(), sampling_logp=tokens.logp.detach() - gap)
    plain = gradient(tokens)
    cut = gradient(tokens, is_correction={"level": level, "mode": "truncate", "cap": 2.0}) / plain
    left = gradient(tokens, is_correction={"level": level, "mode": "mask", "cap": 2.0}) / plain
    if level == "token":
        torch.testing.assert_close(cut, torch.tensor([*[math.exp(0.1)] * 3, 2.0, 1.0, 1.0]).double())
        torch.testing.assert_close(left, torch.tensor([*[math.exp(0.1)] * 3, 0.0, 1.0, 1.0]).double())
    else:
        torch.testing.assert_close(cut, torch.tensor([*[math.exp(0.3)] * 3, 2.0, 2.0, 2.0]).double())
        torch.testing.assert_close(left, torch.tensor([*[math.exp(0.3)] * 3, 0.0, 0.0, 0.0]).double())


def test_entropy_is_raised_by_its_bonus_and_only_then_differentiated():
    tokens = make([4], 0)
    entropy = tokens.entropy.requires_grad_()
    tokens = replace(tokens, entropy=entropy)
    assert torch.autograd.grad(loss(tokens), entropy, allow_unused=True) == (None,)
    (pushed,) = torch.autograd.grad(loss(tokens, entropy_coef=0.2), entropy)
    torch.testing.assert_close(pushed, torch.full((4,), -0.05, dtype=torch.float64))
