"""The engine with a model: every text is what plain generation makes of it, however the engine comes to it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity import random_model
from tiny_model import CONFIG

import dsv3.backends.cpu  # noqa: F401  (its kernels are what runs)
from dsv3.backends.cpu import native
from dsv3.core.generate import Completion, SamplingParams, SimpleRollout
from dsv3.core.presets import PRESETS
from dsv3.errors import UserError
from dsv3.ops.formats import E4M3
from dsv3.serving.batch import Form
from dsv3.serving.engine import Engine, EngineSettings
from dsv3.serving.messages import Add, Output
from dsv3.serving.runner import ModelRunner, RunnerSettings
from dsv3.serving.scheduler import Limits

SMALL = CONFIG.replace(vocab_size=64, max_position_embeddings=400)
MODEL = random_model(SMALL, 0)
SOME = settings(deadline=None, max_examples=10, suppress_health_check=list(HealthCheck), derandomize=True)
REQUEST = st.tuples(
    st.integers(0, 3), st.integers(1, 150), st.integers(1, 40), st.integers(0, 5), st.sampled_from([0.0, 0.8, 1.5])
)


def engine(
    blocks: int = 60, speculative: int = 0, tokens: int = 512, running: int = 16, cache_dtype=None, **options
) -> Engine:
    runner = ModelRunner(MODEL, RunnerSettings(blocks, running, cache_dtype, speculative))
    limits = Limits(running, tokens, 1.0)
    chosen = EngineSettings(400, 64, blocks * runner.page_size, frozenset(), limits=limits, **options)
    return Engine(runner, chosen, lambda tokens: "".join(chr(64 + token) for token in tokens))


def run(engine: Engine, requests: list[tuple[list[int], SamplingParams]]) -> dict[int, Output]:
    """Their outputs, each put together."""
    for id, (prompt, params) in enumerate(requests):
        engine.add(Add(id, prompt, params))
    whole = {id: Output(id) for id in range(len(requests))}
    while not engine.idle:
        for part in engine.step():
            one = whole[part.id]
            for name in ("tokens", "logprobs", "top", "prompt_logprobs", "prompt_top"):
                setattr(one, name, getattr(one, name) + getattr(part, name))
            one.finish, one.stop_reason, one.error = part.finish, part.stop_reason, part.error
            one.cached, one.seed = one.cached or part.cached, part.seed
    return whole


def alone(prompt: list[int], params: SamplingParams, **options) -> Completion:
    return SimpleRollout(MODEL, **options).generate([prompt], params)[0]


def as_request(drawn: tuple[int, int, int, int, float]) -> tuple[list[int], SamplingParams]:
    stem, length, count, seed, temperature = drawn
    prompt = [(stem + 7 * i * i) % 64 for i in range(length)]
    return prompt, SamplingParams(temperature=temperature, seed=seed, max_tokens=count, top_p=0.95, ignore_eos=True)


@pytest.mark.slow
@SOME
@given(
    requests=st.lists(REQUEST, min_size=1, max_size=6),
    blocks=st.sampled_from([4, 7, 60]),  # of 64 tokens: often too few, so that somebody is preempted
    speculative=st.integers(0, 3),
    tokens=st.sampled_from([5, 33, 512]),
)
def test_texts_are_those_of_plain_generation(requests, blocks, speculative, tokens):
    asked = [as_request(drawn) for drawn in requests]
    one = engine(blocks, speculative, tokens)
    for _ in range(2):  # the second time, much is in the cache
        got = run(one, asked)
        for id, (prompt, params) in enumerate(asked):
            want = alone(prompt, params)
            assert got[id].tokens == want.token_ids
            assert got[id].logprobs == pytest.approx(want.logprobs, abs=2e-4)
            assert got[id].finish == "length"
    assert all(pool.available == pool.num_blocks for pool in one.scheduler.pools)


def test_a_cache_in_fp8_gives_what_it_gives_plain_generation():
    prompt, params = as_request((1, 100, 12, 3, 0.0))
    got = run(engine(cache_dtype=E4M3, speculative=1), [(prompt, params)] * 2)
    want = alone(prompt, params, cache_dtype=E4M3)
    assert got[0].tokens == got[1].tokens
    assert got[0].tokens[:4] == want.token_ids[:4]  # chunks round differently, and the cache has few bits


@pytest.mark.slow
@pytest.mark.skipif(not native.built(), reason="nothing is faster than the steps themselves without the C++ kernels")
@pytest.mark.parametrize("speculative", [0, 2])
def test_replayed_steps_give_the_same_texts(speculative):
    asked = [as_request((i, 5 + 30 * i, 12, i, 0.8)) for i in range(5)]
    runner = ModelRunner(MODEL, RunnerSettings(40, 8, None, speculative, captured=True))
    runner.warm()
    one = Engine(runner, EngineSettings(400, 64, 40 * runner.page_size))
    got = run(one, asked)
    assert runner.computer.graphs.replays > 5
    for id, (prompt, params) in enumerate(asked):
        assert got[id].tokens == alone(prompt, params).token_ids


@pytest.mark.slow
def test_steps_launched_before_the_last_one_is_known_give_the_same_texts():
    """As on a GPU: the tokens of a step are found on the device by the next one, which is planned without them."""
    asked = [as_request((i, 5 + 30 * i, 3 + 4 * i, i, 0.8)) for i in range(5)]
    asked.append((asked[0][0], replace(asked[0][1], frequency_penalty=0.4)))  # has to wait for its own tokens
    runner = ModelRunner(MODEL, RunnerSettings(40, 8, None), ahead=True)
    one = Engine(runner, EngineSettings(400, 64, 40 * runner.page_size))
    got = run(one, asked)
    for id, (prompt, params) in enumerate(asked[:-1]):
        assert got[id].tokens == alone(prompt, params).token_ids
    assert got[5].tokens == run(engine(), asked[5:])[0].tokens
    assert all(pool.available == pool.num_blocks for pool in one.scheduler.pools)


def test_one_step_decodes_some_and_prefills_others():
    one = engine()
    first, second = as_request((0, 20, 30, 1, 0.8)), as_request((2, 90, 5, 2, 0.8))
    one.add(Add(0, *first))
    one.step()
    one.add(Add(1, *second))
    plan = one.scheduler.step()
    assert sorted(work.count for work in plan.works) == [1, 90]


def test_latent_space_pays_up_to_171_new_tokens_behind_a_long_context():
    form = Form.of(PRESETS["deepseek-v3-671b"])
    assert form.absorbs(131_072, 160) and not form.absorbs(131_072, 175)
    assert not form.absorbs(0, 2) and form.absorbs(100, 4)


def test_right_drafts_are_accepted_all():
    """With a head of zeros, model and module choose token 0 always: three tokens a step."""
    model = random_model(SMALL, 1)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    runner = ModelRunner(model, RunnerSettings(20, 4, None, 2))
    one = Engine(runner, EngineSettings(400, 64, 20 * runner.page_size))
    [output] = run(one, [([1, 2], SamplingParams(temperature=0.0, max_tokens=31, ignore_eos=True))]).values()
    assert output.tokens == [0] * 31
    stats = one.stats()
    assert (stats.steps, stats.accepted_tokens, stats.draft_tokens) == (11, 20, 20)


def test_biases_and_penalties_change_the_choice_and_not_the_report():
    prompt = [3, 4, 5]
    plain = run(engine(), [(prompt, SamplingParams(temperature=0.0, max_tokens=1))])[0]
    [token] = plain.tokens
    forbidden = SamplingParams(temperature=0.0, max_tokens=1, logit_bias={token: -100.0}, top_logprobs=2)
    other = run(engine(), [(prompt, forbidden)])[0]
    assert other.tokens != [token]
    assert other.top[0][0] == (token, pytest.approx(plain.logprobs[0], abs=1e-5))
    assert other.top[0][1] == (other.tokens[0], pytest.approx(other.logprobs[0], abs=1e-5))


@pytest.mark.parametrize(
    "penalty", [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 1.8}]
)
def test_a_penalty_is_that_of_its_formula(penalty):
    prompt = [3, 4, 5]
    params = SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True, **penalty)
    got = run(engine(speculative=2), [(prompt, params)])[0]
    tokens: list[int] = []
    for _ in range(14):
        with torch.no_grad():
            logits = MODEL(torch.tensor([prompt + tokens])).logits[0, -1].double()
        for token in range(64):
            count = tokens.count(token)
            logits[token] -= params.presence_penalty * bool(count) + params.frequency_penalty * count
            if token in prompt + tokens:
                factor = params.repetition_penalty
                logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
        tokens.append(int(logits.argmax()))
    assert got.tokens == tokens
    assert (
        got.tokens
        != run(engine(), [(prompt, replace(params, **dict.fromkeys(penalty, 1.0 if "rep" in str(penalty) else 0.0)))])[
            0
        ].tokens
    )


def test_log_probabilities_of_a_prompt_are_the_models_own_whatever_the_chunks():
    prompt, params = as_request((1, 120, 1, 0, 0.0))
    wanted = replace(params, prompt_logprobs=True, top_logprobs=3)
    with torch.no_grad():
        rows = torch.log_softmax(MODEL(torch.tensor([prompt])).logits[0].double(), -1)
    one = engine(tokens=50)
    for _ in range(2):  # the cache must not cost the report
        got = run(one, [(prompt, wanted)])[0]
        assert len(got.prompt_logprobs) == len(got.prompt_top) == 119
        for place, (logprob, top) in enumerate(zip(got.prompt_logprobs, got.prompt_top, strict=True)):
            assert logprob == pytest.approx(float(rows[place, prompt[place + 1]]), abs=1e-4)
            assert top[0] == (int(rows[place].argmax()), pytest.approx(float(rows[place].max()), abs=1e-4))


def test_a_stop_string_says_which_it_was():
    prompt, params = as_request((1, 10, 30, 2, 1.5))
    text = "".join(chr(64 + token) for token in alone(prompt, params).token_ids)
    stopping = replace(params, stop=("never this", text[4:6]))
    got = run(engine(speculative=2), [(prompt, stopping)])[0]
    assert (got.finish, got.stop_reason) == ("stop", text[4:6])
    assert got.tokens == alone(prompt, params).token_ids[: len(got.tokens)]
    assert len(got.tokens) <= 6


def test_options_that_only_the_engine_knows_are_refused_by_simple_generation():
    for options in (
        {"presence_penalty": 1.0},
        {"logit_bias": {1: 1.0}},
        {"top_logprobs": 2},
        {"prompt_logprobs": True},
    ):
        with pytest.raises(UserError, match="serving engine"):
            alone([1], SamplingParams(**options))
