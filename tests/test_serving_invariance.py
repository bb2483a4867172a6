"""On a batch-invariant backend the same seed is the same text, and the same log-probabilities to the last bit, whatever
else the engine does: other requests, chunks, preemptions, cache hits, copies, drafts."""

from functools import cache

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from parity import random_model
from tiny_model import CONFIG

from dsv3.backends import discover
from dsv3.core.generate import SamplingParams
from dsv3.ops.op import use_backend
from dsv3.serving.engine import Engine, EngineSettings
from dsv3.serving.messages import Add, Output
from dsv3.serving.runner import ModelRunner, RunnerSettings
from dsv3.serving.scheduler import Limits

SMALL = CONFIG.replace(vocab_size=64, max_position_embeddings=400)
BACKEND = "cpu-invariant"


@cache
def model():
    discover()[BACKEND].load()
    return random_model(SMALL, 0)


def engine(blocks: int, running: int, tokens: int, speculative: int, caching: bool) -> Engine:
    runner = ModelRunner(model(), RunnerSettings(blocks, running, None, speculative, per_token=True))
    limits = Limits(running, tokens, 1.0)
    return Engine(runner, EngineSettings(400, 64, blocks * 64, prefix_caching=caching, limits=limits))


def params(count: int, seed: int, temperature: float, penalty: float) -> SamplingParams:
    return SamplingParams(
        temperature=temperature, seed=seed, max_tokens=count, top_p=0.95, frequency_penalty=penalty, ignore_eos=True
    )


def prompt(stem: int, length: int) -> tuple[int, ...]:
    return tuple((stem + 7 * i * i) % 64 for i in range(length))


@cache
def alone(text: tuple[int, ...], *options) -> tuple[list[int], list[float]]:
    """A request with the engine to itself, its prompt in one chunk, without drafts."""
    one = engine(20, 1, 512, 0, False)
    one.add(Add(1, list(text), params(*options)))
    outputs: list[Output] = []
    while not one.idle:
        outputs += one.step()
    return [t for o in outputs for t in o.tokens], [p for o in outputs for p in o.logprobs]


class Traffic(RuleBasedStateMachine):
    @initialize(
        blocks=st.integers(4, 9),
        running=st.integers(1, 5),
        tokens=st.integers(3, 80),
        speculative=st.integers(0, 3),
        caching=st.booleans(),
    )
    def start(self, blocks, running, tokens, speculative, caching):
        self.backend = use_backend(BACKEND)
        model()
        self.backend.__enter__()
        self.engine = engine(blocks, running, tokens, speculative, caching)
        self.asked: dict[int, tuple] = {}
        self.got: dict[int, tuple[list[int], list[float]]] = {}
        self.count = 0

    @rule(
        stem=st.integers(0, 2),
        length=st.sampled_from([1, 2, 63, 64, 65, 100, 130]),
        count=st.sampled_from([1, 5, 20]),
        seed=st.integers(0, 1),
        temperature=st.sampled_from([0.0, 0.9]),
        penalty=st.sampled_from([0.0, 0.0, 0.5]),
        copies=st.integers(1, 3),
    )
    def ask(self, stem, length, count, seed, temperature, penalty, copies):
        for _ in range(copies):
            self.count += 1
            self.asked[self.count] = (prompt(stem, length), count, seed, temperature, penalty)
            self.got[self.count] = ([], [])
            self.engine.add(Add(self.count, list(prompt(stem, length)), params(count, seed, temperature, penalty)))

    @rule(steps=st.integers(1, 8))
    def go_on(self, steps):
        for _ in range(steps):
            self.hear()

    @precondition(lambda self: self.engine.requests)
    @rule(choice=st.integers(0, 1000))
    def abort(self, choice):
        alive = sorted(self.engine.requests)
        id = alive[choice % len(alive)]
        self.engine.abort(id)
        del self.asked[id]

    def hear(self):
        for output in self.engine.step():
            tokens, logprobs = self.got[output.id]
            tokens += output.tokens
            logprobs += output.logprobs

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        try:
            while not self.engine.idle:
                self.hear()
            for id, options in self.asked.items():
                assert self.got[id] == alone(*options)
        finally:
            self.backend.__exit__(None, None, None)


Traffic.TestCase.settings = settings(
    max_examples=12, stateful_step_count=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
TestTraffic = pytest.mark.slow(Traffic.TestCase)
