"""The engine at 131,072 tokens of context, on a model small enough for a CPU."""

import pytest
from parity import random_model
from tiny_model import CONFIG

import dsv3.backends.cpu  # noqa: F401  (its kernels are what runs)
from dsv3.core.generate import SamplingParams, SimpleRollout
from dsv3.serving.engine import Engine, EngineSettings
from dsv3.serving.messages import Add, Output
from dsv3.serving.runner import ModelRunner, RunnerSettings

LONG = 131_072
SMALL = CONFIG.replace(
    vocab_size=64, max_position_embeddings=LONG, num_hidden_layers=1, first_k_dense_replace=1, num_attention_heads=1
)


@pytest.mark.long
def test_a_context_of_131072_tokens_is_filled_to_its_end():
    model = random_model(SMALL, 0)
    prompt = [(i * i + i // 7) % 64 for i in range(LONG - 9)]
    params = SamplingParams(temperature=0.8, seed=3, ignore_eos=True)  # as many tokens as there is room for
    runner = ModelRunner(model, RunnerSettings(LONG // 64 + 40, 4, None, 1))
    engine = Engine(runner, EngineSettings(LONG, 64, (LONG // 64 + 40) * 64))
    answers: list[list[Output]] = []
    for id in range(2):
        engine.add(Add(id, prompt, params))
        answers.append([])
        while not engine.idle:
            answers[-1] += engine.step()
    texts = [[token for output in outputs for token in output.tokens] for outputs in answers]
    [plain] = SimpleRollout(model).generate([prompt], params)
    assert texts == [plain.token_ids] * 2 and len(plain.token_ids) == 9
    assert answers[0][-1].finish == "length"
    assert answers[1][0].cached == len(prompt) - 1  # the second one computes the prompt's last token only
    assert all(pool.available == pool.num_blocks for pool in engine.scheduler.pools)
