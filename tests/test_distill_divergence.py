"""The divergences of distillation equal their definition over the whole vocabulary, in value and gradient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsv3.training.distill.divergence import divergence, top_k, top_k_divergence

T, V, D, E = 7, 19, 5, 4
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


def parts(seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((T, D), (V, D), (T, E), (V, E))
    hidden, head, teacher, teacher_head = (scale * torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    return hidden.requires_grad_(), head.requires_grad_(), teacher, teacher_head


def by_definition(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """From probabilities [T, V], as the paper writes it."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    if beta in (0.0, 1.0):
        return kl(p, q) if beta == 0 else kl(q, p)
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kept", [V, 3 * V, 1000 * V])
def test_the_divergence_and_its_gradient_are_those_of_the_definition(beta: float, kept: int) -> None:
    hidden, head, teacher, teacher_head = parts()
    weights = torch.arange(1.0, T + 1, dtype=torch.float64)
    got = divergence(hidden, head, teacher, teacher_head, beta, kept)
    want = by_definition((teacher @ teacher_head.T).softmax(-1), (hidden @ head.T).softmax(-1), beta)
    torch.testing.assert_close(got, want)
    for a, b in zip(
        torch.autograd.grad((got * weights).sum(), (hidden, head)),
        torch.autograd.grad((want * weights).sum(), (hidden, head)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("beta", BETAS)
def test_it_is_zero_with_no_gradient_where_the_student_is_the_teacher(beta: float) -> None:
    hidden, head, _, _ = parts()
    loss = divergence(hidden, head, hidden.detach(), head.detach(), beta).sum()
    assert abs(loss.item()) < 1e-12
    assert torch.autograd.grad(loss, hidden)[0].abs().max() < 1e-12


@given(st.integers(0, 1000), st.sampled_from(BETAS))
def test_it_is_never_negative(seed: int, beta: float) -> None:
    assert divergence(*parts(seed, 2.0), beta).min() > -1e-9


def test_it_stays_finite_where_the_models_are_sure_of_different_tokens() -> None:
    head = torch.eye(4, requires_grad=True)
    student, teacher = torch.tensor([[200.0, 0, 0, 0]], requires_grad=True), torch.tensor([[0, 200.0, 0, 0]])
    for beta in BETAS:
        loss = divergence(student, head, teacher, head.detach(), beta).sum()
        (grad,) = torch.autograd.grad(loss, student)
        assert loss.isfinite() and grad.isfinite().all()


def test_the_teacher_gets_no_gradient() -> None:
    hidden, head, teacher, teacher_head = parts()
    teacher.requires_grad_(), teacher_head.requires_grad_()
    divergence(hidden, head, teacher, teacher_head, 0.5).sum().backward()
    assert hidden.grad is not None and teacher.grad is None and teacher_head.grad is None


def test_the_top_k_are_the_likeliest_tokens_with_their_log_probabilities() -> None:
    _, _, teacher, head = parts()
    ids, logp = top_k(teacher, head, 4, kept_logits=2 * V)
    want = (teacher @ head.T).log_softmax(-1).sort(-1, descending=True)
    assert ids.dtype == torch.int32
    assert torch.equal(ids.long(), want.indices[:, :4])
    torch.testing.assert_close(logp, want.values[:, :4])
    assert top_k(teacher, head, 10 * V)[0].shape == (T, V)


@pytest.mark.parametrize("kept", [V, 3 * V, 1000 * V])
def test_all_tokens_known_it_is_the_whole_divergence(kept: int) -> None:
    hidden, head, teacher, teacher_head = parts()
    got = top_k_divergence(hidden, head, *top_k(teacher, teacher_head, V), kept)
    want = divergence(hidden, head, teacher, teacher_head, 0.0)
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(x.sum(), (hidden, head)) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("k", [1, 3, V - 1])
def test_with_k_known_the_others_are_one_outcome(k: int) -> None:
    hidden, head, teacher, teacher_head = parts()
    got = top_k_divergence(hidden, head, *top_k(teacher, teacher_head, k), 2 * V)
    p, q = (teacher @ teacher_head.T).softmax(-1), (hidden @ head.T).softmax(-1)
    order = p.argsort(-1, descending=True)

    def merged(x: Tensor) -> Tensor:
        x = x.gather(1, order)
        return torch.cat([x[:, :k], x[:, k:].sum(-1, keepdim=True)], 1)

    want = by_definition(merged(p), merged(q), 0.0)
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(x.sum(), (hidden, head)) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b)
    assert (got <= divergence(hidden, head, teacher, teacher_head, 0.0) + 1e-12).all()


def test_a_teacher_that_leaves_nothing_to_the_others_is_taken() -> None:
    hidden, head, _, _ = parts()
    ids = torch.zeros(T, 1, dtype=torch.int32)
    loss = top_k_divergence(hidden, head, ids, torch.zeros(T, 1, dtype=torch.float64))
    torch.testing.assert_close(loss, -(hidden @ head.T).log_softmax(-1)[:, 0])
    assert torch.autograd.grad(loss.sum(), hidden)[0].isfinite().all()
