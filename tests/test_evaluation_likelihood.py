"""Likelihoods against one pass over each text alone, and windows that score every token once."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import random_model
from tiny_model import CONFIG

from dsv3.core.model import DeepseekV3
from dsv3.errors import UserError
from dsv3.evaluation.likelihood import Likelihood, Request, Score, windows

MODEL = random_model(CONFIG, 0)
TOKENS = st.integers(3, CONFIG.vocab_size - 1)


def alone(model: DeepseekV3, request: Request) -> Score:
    """The score by the model's plain forward pass."""
    tokens = torch.tensor([*request.context, *request.continuation])
    with torch.inference_mode():
        logprobs = model(tokens[None]).logits[0].float().log_softmax(-1)
    rows = logprobs[len(request.context) - 1 : len(tokens) - 1]
    wanted = tokens[len(request.context) :]
    picked = rows.gather(1, wanted[:, None]).sum().item()
    return Score(picked, bool((rows.argmax(-1) == wanted).all()))


def agrees(requests: list[Request], scorer: Likelihood) -> None:
    for request, score in zip(requests, scorer.score(requests), strict=True):
        expected = alone(MODEL, request)
        assert score.logprob == pytest.approx(expected.logprob, rel=1e-4, abs=1e-4)
        assert score.greedy == expected.greedy


@settings(deadline=None, max_examples=20)
@given(
    st.lists(TOKENS, min_size=1, max_size=130),
    st.lists(
        st.tuples(st.lists(TOKENS, max_size=70), st.lists(TOKENS, min_size=1, max_size=4)), min_size=1, max_size=5
    ),
    st.integers(40, 300),
    st.integers(64, 600),
)
def test_scores_are_those_of_each_text_alone(common, tails, pass_tokens, cached_tokens):
    requests = [Request((*common, *tail), tuple(end)) for tail, end in tails]
    requests += [Request((*common, *tails[0][0]), (5,)), Request((*common, *tails[0][0]), (6,))]
    agrees(requests, Likelihood(MODEL, pass_tokens, cached_tokens))


def test_the_likeliest_continuation_is_called_greedy():
    context = (3, 4, 5)
    with torch.inference_mode():
        best = int(MODEL(torch.tensor([context])).logits[0, -1].argmax())
    scores = Likelihood(MODEL).score([Request(context, (best,)), Request(context, ((best + 1) % 300,))])
    assert [score.greedy for score in scores] == [True, False]


def test_a_common_beginning_is_computed_once():
    shots = tuple(range(10, 210))  # three whole pages
    requests = [Request((*shots, question), (letter,)) for question in range(20, 30) for letter in (5, 6, 7, 8)]
    scorer = Likelihood(MODEL)
    agrees(requests, scorer)
    assert scorer.computed < 192 + 10 * (8 + 1) + 1


def test_scores_are_heard_as_they_come():
    heard = {}
    requests = [Request((3, 4, i), (i,)) for i in range(5, 9)]
    scores = Likelihood(MODEL).score(requests, heard.__setitem__)
    assert [heard[i] for i in range(4)] == scores


def test_a_text_longer_than_the_context_is_refused():
    request = Request(tuple([3] * CONFIG.max_position_embeddings), (4, 5))
    with pytest.raises(UserError, match=r"257 tokens exceeds the model's context of 256"):
        Likelihood(MODEL).score([request])


@pytest.mark.parametrize("request_", [Request((), (3,)), Request((3,), ())])
def test_nothing_has_no_likelihood(request_):
    with pytest.raises(UserError, match="one token at least"):
        Likelihood(MODEL).score([request_])


@given(st.integers(0, 100), st.integers(2, 20), st.data())
def test_windows_score_every_token_once_with_enough_context(count, length, data):
    overlap = data.draw(st.integers(1, length - 1))
    text = list(range(1, count + 1))
    parts = list(windows(text, 0, length, overlap))
    assert [token for part in parts for token in part.continuation] == text
    for place, part in enumerate(parts):
        assert len(part.context) + len(part.continuation) - 1 <= length
        assert part.context[-1] + 1 == part.continuation[0]
        assert place == 0 or len(part.context) >= overlap


@pytest.mark.parametrize("overlap", [0, 8])
def test_windows_need_room_for_context_and_text(overlap):
    with pytest.raises(UserError, match="give 1 to 7"):
        list(windows([1, 2], 0, 8, overlap))


def test_a_uniform_model_has_the_entropy_of_its_vocabulary():
    model = random_model(CONFIG, 0)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    (score,) = Likelihood(model).score([Request((3, 4), (5, 6, 7))])
    assert score.logprob == pytest.approx(-3 * math.log(CONFIG.vocab_size), rel=1e-5)
