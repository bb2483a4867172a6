"""Generation: what a completion is depends on its prompt, parameters and seed, and is what the model says it is."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity import configs, random_model
from torch import Tensor

import dsv3.backends.cpu  # noqa: F401  (its kernels are what runs)
from dsv3.core import generate as module
from dsv3.core.cache import PagedCache
from dsv3.core.generate import Completion, Rollout, SamplingParams, SimpleRollout, Token
from dsv3.core.model import DeepseekV3
from dsv3.core.presets import PRESETS
from dsv3.core.step import Routing
from dsv3.errors import UserError
from dsv3.serving.rollout import EngineRollout

SMALL = PRESETS["dsv3-2m"].replace(vocab_size=50, num_hidden_layers=2, max_position_embeddings=400)
MODEL = random_model(SMALL, 0)
SOME = settings(deadline=None, max_examples=8, suppress_health_check=list(HealthCheck), derandomize=True)
PROMPTS = st.lists(st.lists(st.integers(0, 31), min_size=1, max_size=12), min_size=1, max_size=4)
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module", params=[SimpleRollout, EngineRollout], ids=["simple", "engine"])
def make(request):
    """Whatever makes rollouts: both give the same."""
    return request.param


def letters(tokens: list[int]) -> str:
    return "".join(chr(ord("A") + token) for token in tokens)


def plain(model: DeepseekV3, completion: Completion, routing: Routing | None = None) -> Tensor:
    """Logits [new tokens, V] that a forward pass without a cache has for every token of a completion."""
    ids = torch.tensor([completion.prompt_ids + completion.token_ids[:-1]])
    with torch.no_grad():
        return model(ids, routing=routing).logits[0, len(completion.prompt_ids) - 1 :].float()


# --- one prompt or many ---


@SOME
@given(data=st.data(), seed=st.integers(0, 1000), prompts=PROMPTS)
def test_ragged_prompts_together_give_what_each_gives_alone(make, data, seed, prompts):
    model = random_model(data.draw(configs()), seed)
    together = make(model).generate(prompts, GREEDY)
    for prompt, completion in zip(prompts, together, strict=True):
        [alone] = make(model).generate([prompt], GREEDY)
        assert completion.token_ids == alone.token_ids and completion.prompt_ids == prompt
        assert completion.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
        assert len(completion.token_ids) == 8 and completion.finish_reason == "length"


@SOME
@given(prompts=PROMPTS, seed=st.integers(-(2**63), 2**63 - 1), lengths=st.lists(st.integers(1, 9), min_size=4))
def test_a_sampled_text_depends_on_its_seed_and_not_on_its_neighbours(make, prompts, seed, lengths):
    params = [SamplingParams(seed=(seed + i) % 2**63, max_tokens=lengths[i]) for i in range(len(prompts))]
    rollout = make(MODEL)
    together = rollout.generate(prompts, params)
    back_to_front = rollout.generate(prompts[::-1], params[::-1])[::-1]
    for i, completion in enumerate(together):
        assert completion.token_ids == back_to_front[i].token_ids
        assert completion.token_ids == rollout.generate([prompts[i]], params[i])[0].token_ids
        assert completion.seed == params[i].seed and len(completion.token_ids) <= lengths[i]


def test_no_prompts_give_no_completions(make):
    assert make(MODEL).generate([], GREEDY) == []


# --- seeds ---


def test_other_seeds_give_other_texts(make):
    params = [SamplingParams(seed=seed, max_tokens=10, ignore_eos=True) for seed in range(5)]
    texts = make(MODEL).generate([[1, 2, 3]] * 5, params)
    assert len({tuple(completion.token_ids) for completion in texts}) == 5


def test_a_seed_that_is_drawn_is_reported_and_gives_the_text_again(make):
    params = SamplingParams(max_tokens=10)
    rollout = make(MODEL)
    drawn = rollout.generate([[1, 2, 3]] * 3, params)
    assert len({completion.seed for completion in drawn}) == 3
    for completion in drawn:
        [again] = rollout.generate([[1, 2, 3]], replace(params, seed=completion.seed))
        assert again.token_ids == completion.token_ids


def test_drawn_seeds_do_not_come_from_torchs_generator_and_leave_it_alone(make):
    """It starts every process with the same number: all ranks and all restarts would say the same."""
    seeds = []
    for _ in range(2):
        torch.manual_seed(0)
        seeds.append(make(MODEL).generate([[1]], SamplingParams(max_tokens=1))[0].seed)
        after = torch.rand(())
    assert seeds[0] != seeds[1]
    torch.manual_seed(0)
    assert torch.rand(()) == after


# --- what is reported ---


@SOME
@given(data=st.data(), seed=st.integers(0, 1000), prompts=PROMPTS, temperature=st.sampled_from([0.0, 0.7, 1.5]))
def test_logprobs_are_those_of_the_model_itself_whatever_the_filters(make, data, seed, prompts, temperature):
    model = random_model(data.draw(configs()), seed)
    params = SamplingParams(temperature=temperature, top_k=5, top_p=0.9, min_p=0.01, seed=seed, max_tokens=6)
    for completion in make(model).generate(prompts, params):
        want = plain(model, completion).log_softmax(-1).gather(-1, torch.tensor(completion.token_ids)[:, None])
        torch.testing.assert_close(torch.tensor(completion.logprobs), want[:, 0], rtol=1e-3, atol=1e-3)


@SOME
@given(data=st.data(), seed=st.integers(0, 1000), prompts=PROMPTS)
def test_recorded_experts_are_those_of_a_forward_pass_and_replay_its_logits(make, data, seed, prompts):
    config = data.draw(configs())
    model, layers = random_model(config, seed), [i for i in range(config.num_hidden_layers) if config.is_moe_layer(i)]
    for completion in make(model).generate(prompts, GREEDY, record_experts=True):
        log = Routing()
        want = plain(model, completion, log)
        if not layers:
            assert completion.experts is None
            continue
        read = len(completion.prompt_ids) + len(completion.token_ids) - 1
        assert completion.experts.shape == (read, len(layers), config.num_experts_per_tok)
        assert torch.equal(completion.experts, torch.stack([log.experts[layer] for layer in layers], 1))
        replay = Routing(replay=dict(zip(layers, completion.experts.unbind(1), strict=True)))
        assert torch.equal(plain(model, completion, replay), want)


def test_recorded_experts_can_be_trained_on(make):
    [completion] = make(MODEL).generate([[1, 2]], GREEDY, record_experts=True)
    replay = dict(enumerate(completion.experts.unbind(1), SMALL.first_k_dense_replace))
    ids = torch.tensor([completion.prompt_ids + completion.token_ids[:-1]])
    MODEL(ids, routing=Routing(replay=replay)).logits.square().mean().backward()
    assert MODEL.block(1).mlp.gate.weight.grad.abs().sum() > 0
    MODEL.zero_grad()


def test_experts_are_not_recorded_unless_asked_for(make):
    assert make(MODEL).generate([[1]], GREEDY)[0].experts is None


def test_a_completion_carries_the_version_of_the_weights_that_made_it(make):
    model = random_model(SMALL, 0)
    rollout: Rollout = make(model)
    before = rollout.generate([[1, 2]], GREEDY)[0]
    weights = random_model(SMALL, 1).state_dict()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        value.data.copy_(weights[name])  # as a trainer may write them: unseen by PyTorch
    assert rollout.weights_changed() == 1
    after = rollout.generate([[1, 2]], GREEDY)[0]
    assert (before.weight_version, after.weight_version) == (0, 1)
    assert after.token_ids == make(random_model(SMALL, 1)).generate([[1, 2]], GREEDY)[0].token_ids


# --- streams ---


@SOME
@given(prompts=PROMPTS)
def test_the_stream_is_the_completions_token_by_token(make, prompts):
    seen: list[Token] = []
    completions = make(MODEL).generate(prompts, replace(GREEDY, max_tokens=4), on_token=seen.append)
    for i, completion in enumerate(completions):
        mine = [token for token in seen if token.index == i]
        assert [token.token_id for token in mine] == completion.token_ids
        assert [token.logprob for token in mine] == completion.logprobs
        assert [token.finish_reason for token in mine] == [None] * 3 + ["length"]


def test_who_reads_a_stream_may_train_between_its_tokens(make):
    weight = torch.nn.Parameter(torch.ones(2))
    for _ in make(MODEL).stream([[1, 2]], replace(GREEDY, max_tokens=3)):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        (weight * 2).sum().backward()
    stream = make(MODEL).stream([[1, 2]], GREEDY)
    next(stream)
    stream.close()
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_completions_of_a_stream_grow_while_it_is_read(make):
    completions: list[Completion] = []
    stream = make(MODEL).stream([[1], [2]], GREEDY, completions)
    for read in range(1, 6):
        next(stream)
        assert [len(completion.token_ids) for completion in completions] == [(read + 1) // 2] * 2  # whole steps
    stream.close()
    assert completions[0].finish_reason is None


# --- the end ---


def chosen(prompt: list[int], count: int = 8) -> list[int]:
    return SimpleRollout(MODEL).generate([prompt], replace(GREEDY, max_tokens=count))[0].token_ids


def first_new(tokens: list[int]) -> int:
    """A place, not the first, whose token was not there before."""
    return next(i for i in range(1, len(tokens)) if tokens[i] not in tokens[:i])


def test_a_stop_token_ends_the_text_and_belongs_to_it(make):
    tokens = chosen([3, 4])
    place = first_new(tokens)
    [completion] = make(MODEL).generate([[3, 4]], replace(GREEDY, stop_token_ids=(tokens[place],)))
    assert completion.token_ids == tokens[: place + 1] and completion.finish_reason == "stop"
    assert len(completion.logprobs) == place + 1


def test_the_models_own_end_token_ends_the_text_unless_ignored(make):
    tokens = chosen([3, 4])
    place = first_new(tokens)
    model = DeepseekV3(SMALL.replace(eos_token_id=[49, tokens[place]]))
    model.load_state_dict(MODEL.state_dict())
    [ended] = make(model.eval()).generate([[3, 4]], replace(GREEDY, ignore_eos=False))
    assert ended.token_ids == tokens[: place + 1] and ended.finish_reason == "stop"
    [ignored] = make(model).generate([[3, 4]], GREEDY)
    assert ignored.token_ids == tokens and ignored.finish_reason == "length"


@pytest.mark.slow
@SOME
@given(seed=st.integers(0, 1000), stop=st.text("ABCDEFGHIJ", min_size=1, max_size=3), prompts=PROMPTS)
def test_a_stop_string_ends_the_text_at_the_token_that_completes_it(make, seed, stop, prompts):
    def decode(tokens: list[int]) -> str:
        """Tokens of many letters, of one, and of none."""
        return "".join("ABCDEFGHIJ"[token % 10] * (token % 3) for token in tokens)

    params = SamplingParams(seed=seed, max_tokens=40, stop=(stop, "never"), ignore_eos=True)
    rollout = make(MODEL, decode)
    for completion in rollout.generate(prompts, params):
        text = decode(completion.token_ids)
        assert stop not in decode(completion.token_ids[:-1])
        assert completion.finish_reason == ("stop" if stop in text else "length")


def test_looking_for_a_stop_string_takes_no_longer_at_the_end_of_a_long_text(make):
    longest = 0

    def decode(tokens: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return letters(tokens)

    params = replace(GREEDY, max_tokens=100, stop=("never",))
    make(MODEL, decode).generate([[1]], params)
    assert longest < 40


def test_sequences_that_end_early_leave_the_others_alone(make):
    prompts = [[1, 2, 3], [4], [5, 6], [7]]
    params = [replace(GREEDY, max_tokens=count) for count in (9, 1, 5, 2)]
    for completion, prompt, one in zip(make(MODEL).generate(prompts, params), prompts, params, strict=True):
        assert completion.token_ids == chosen(prompt, one.max_tokens)


def test_the_context_is_filled_to_its_last_place_and_not_beyond(make):
    [completion] = make(MODEL).generate([[1] * 397], replace(GREEDY, max_tokens=None))
    assert len(completion.token_ids) == 3 and completion.finish_reason == "length"
    [completion] = make(MODEL).generate([[1] * 399], replace(GREEDY, max_tokens=7))
    assert len(completion.token_ids) == 1
    with pytest.raises(UserError, match="a prompt of 400 tokens leaves no room in the context of 400; shorten it"):
        make(MODEL).generate([[1] * 400], GREEDY)


# --- memory ---


@pytest.mark.parametrize("chunk", [7, 1, 30])
def test_prompts_are_read_in_chunks_of_bounded_size(monkeypatch, chunk):
    prompts = [list(range(20)), [5], list(range(9)), [1, 2]]
    want = SimpleRollout(MODEL).generate(prompts, GREEDY, record_experts=True)
    passes = []
    forward = DeepseekV3.forward

    def counting(self, input_ids, *args, **kwargs):
        passes.append(input_ids.shape[0])
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(DeepseekV3, "forward", counting)
    monkeypatch.setattr(module, "PREFILL_TOKENS", chunk)
    got = SimpleRollout(MODEL).generate(prompts, GREEDY, record_experts=True)
    prefill = passes[: -(GREEDY.max_tokens - 1)]
    assert max(prefill) <= chunk and sum(prefill) == 32 and len(prefill) == -(-32 // chunk)
    for one, other in zip(got, want, strict=True):
        assert one.token_ids == other.token_ids and torch.equal(one.experts, other.experts)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


class Watched(PagedCache):
    """A cache that writes down how often it was moved and how many pages it had."""

    sizes: list[int]

    def rearrange(self, num_pages: int, moves: dict[int, int]) -> None:
        super().rearrange(num_pages, moves)
        Watched.sizes.append(num_pages)


@pytest.fixture
def watched(monkeypatch):
    monkeypatch.setattr(module, "PagedCache", Watched)
    Watched.sizes = []
    return Watched


@pytest.mark.slow
def test_the_cache_begins_with_the_prompt_and_grows_with_the_text(watched):
    """A context of 163,840 tokens must not be allocated for a text of ten."""
    model = random_model(SMALL.replace(max_position_embeddings=100_000), 0)
    stream = SimpleRollout(model).stream([[1, 2, 3]], replace(GREEDY, max_tokens=None))
    tokens = [next(stream).token_id for _ in range(10)]
    assert watched.sizes == [5]  # of 64 tokens
    tokens += [next(stream).token_id for _ in range(390)]
    stream.close()
    assert watched.sizes == [5, 10]
    longer = replace(GREEDY, max_tokens=400)
    assert tokens == SimpleRollout(model).generate([[1, 2, 3]], longer)[0].token_ids


def test_a_bounded_text_gets_its_pages_once(watched):
    SimpleRollout(MODEL).generate([[1] * 60, [2]], replace(GREEDY, max_tokens=150))
    assert watched.sizes == [4 + 3]


@pytest.mark.slow
def test_moving_pages_changes_no_token_and_drops_those_of_the_finished(watched, monkeypatch):
    prompts = [[1] * 100, [2], [3] * 5]
    params = [replace(GREEDY, max_tokens=count) for count in (2, 250, 120)]
    want = SimpleRollout(MODEL).generate(prompts, params)
    assert len(watched.sizes) == 1
    watched.sizes = []
    monkeypatch.setattr(module, "RESERVE", 1)
    got = SimpleRollout(MODEL).generate(prompts, params)
    assert [completion.token_ids for completion in got] == [completion.token_ids for completion in want]
    # 2 + 1 + 1 pages; the third twice as many and the first none; the second twice as many; the second alone, for all.
    assert watched.sizes == [4, 3, 4, 4]


def test_an_empty_prompt_an_unknown_token_and_parameters_for_others_are_refused(make):
    rollout = make(MODEL)
    with pytest.raises(UserError, match="a prompt must hold at least one token"):
        rollout.generate([[1], []], GREEDY)
    for token in (-1, 50):
        with pytest.raises(UserError, match="outside the model's vocabulary of 50"):
            rollout.generate([[1, token]], GREEDY)
    with pytest.raises(UserError, match="2 prompts with parameters for 1; give one for each"):
        rollout.generate([[1], [2]], [GREEDY])
    with pytest.raises(UserError, match="stop strings need a tokenizer"):
        rollout.generate([[1]], SamplingParams(stop=("x",)))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seed": 2**63}, "seed must fit in 64 bits"),
        ({"stop": ("",)}, "a stop string must not be empty"),
        ({"stop": "abc"}, "stop must be a sequence of strings, not one string"),
    ],
    ids=str,
)
def test_wrong_parameters_are_named(wrong, says):
    with pytest.raises(UserError, match=f"sampling: .*{says}"):
        SamplingParams(**wrong)


def test_more_candidates_than_a_32_bit_number_counts_are_all_of_them(make):
    params = replace(GREEDY, temperature=1.0, seed=1)
    everything, huge = (make(MODEL).generate([[1]], replace(params, top_k=k))[0] for k in (0, 10**12))
    assert everything.token_ids == huge.token_ids


FRESH = """
import dsv3
from dsv3.core.generate import SamplingParams, SimpleRollout
model = dsv3.DeepseekV3(dsv3.ModelConfig.from_pretrained("dsv3-2m").replace(num_hidden_layers=1, vocab_size=50))
model.init_weights()
print(SimpleRollout(model.eval()).generate([[1]], SamplingParams(max_tokens=1))[0].seed)
"""


@pytest.mark.slow
def test_two_processes_draw_two_seeds():
    seeds = {subprocess.check_output([sys.executable, "-c", FRESH], timeout=120) for _ in range(2)}
    assert len(seeds) == 2
