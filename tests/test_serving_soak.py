"""Everything at once, in a cache far too small: whoever is served gets what a request alone gets, and nothing leaks.

Requests of all kinds come and go by a seed: shared beginnings and several choices of one prompt, guides, penalties,
stop strings, log-probabilities, deadlines, tenants, aborts; with drafts or without. On a batch-invariant backend, so
that equal means equal to the last bit.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
from parity import random_model
from tiny_model import CONFIG, TOKENIZER

from dsv3.backends import discover
from dsv3.core.model import DeepseekV3
from dsv3.core.sampling_params import Guide, SamplingParams
from dsv3.ops.op import use_backend
from dsv3.serving.engine import Engine, EngineSettings
from dsv3.serving.guides import Guides
from dsv3.serving.messages import Add, Output
from dsv3.serving.runner import ModelRunner, RunnerSettings
from dsv3.serving.scheduler import Limits

BACKEND = "cpu-invariant"
CONTEXT, PAGE = 256, 64
ENDS = frozenset({TOKENIZER.eos_id})
GUIDES = (
    Guide("json_schema", '{"type":"object","properties":{"a":{"type":"integer"}},"required":["a"]}'),
    Guide("regex", "(ab|c){3,40}"),
    Guide("regex", "[a-z ]{5,60}"),
)


@pytest.fixture(scope="module")
def model() -> Iterator[DeepseekV3]:
    discover()[BACKEND].load()
    with use_backend(BACKEND):
        yield random_model(CONFIG, 0)


@pytest.fixture(scope="module")
def guides() -> Iterator[Guides]:
    made = Guides(TOKENIZER, CONFIG.vocab_size, ENDS)
    yield made
    made.close()


def engine(model: DeepseekV3, guides: Guides, blocks: int, running: int, tokens: int, drafts: int) -> Engine:
    runner = ModelRunner(model, RunnerSettings(blocks, running, None, drafts, per_token=True))
    limits = Limits(running, tokens, 1.0)
    settings = EngineSettings(CONTEXT, CONFIG.vocab_size, blocks * PAGE, ENDS, limits=limits)
    return Engine(runner, settings, TOKENIZER.decode, guides)


@dataclass
class Asked:
    prompt: list[int]
    params: SamplingParams
    salt: bytes
    deadline: bool
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    last: Output | None = None

    def hear(self, output: Output) -> None:
        assert self.last is None, "nothing comes behind the end"
        self.tokens += output.tokens
        self.logprobs += output.logprobs
        self.prompt_logprobs += output.prompt_logprobs
        self.last = output if output.finish is not None else None

    def result(self) -> tuple[object, ...]:
        assert self.last is not None
        return self.tokens, self.logprobs, self.prompt_logprobs, self.last.finish, self.last.stop_reason


def draw(rng: random.Random) -> Asked:
    """One request. Prompts are beginnings of three texts, at lengths around those of pages."""
    stem, length = rng.randrange(3), rng.choice([1, 2, 20, 63, 64, 65, 100, 129])
    prompt = [(stem + 7 * i * i) % 300 for i in range(length)] + [rng.randrange(300)] * rng.randrange(2)
    options: dict[str, object] = {"temperature": rng.choice([0.0, 0.8, 1.2]), "top_p": rng.choice([1.0, 0.9])}
    match rng.randrange(8):
        case 0:
            options["guide"] = rng.choice(GUIDES)
        case 1:
            options |= {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.3}
        case 2:
            options["stop"] = ("a", "the")
        case 3:
            options |= {"prompt_logprobs": True, "top_logprobs": 2}
        case 4:
            options |= {"logit_bias": {5: 3.0, 6: -100.0}, "top_k": 40}
    options |= {
        "max_tokens": rng.choice([1, 3, 20, 60, 120]),
        "seed": rng.randrange(4),
        "ignore_eos": rng.random() < 0.5,
    }
    params = SamplingParams(**options)  # type: ignore[arg-type]
    return Asked(prompt, params, rng.choice([b"", b"", b"another"]), rng.random() < 0.1)


def soak(one: Engine, rng: random.Random, count: int) -> list[Asked]:
    """Send `count` requests, some in several choices, and abort some; those that came to an end of their own."""
    now = 0.0
    one.clock = lambda: now
    asked: dict[int, Asked] = {}
    aborted: set[int] = set()
    sent = 0
    while sent < count or not one.idle:
        if sent < count and rng.random() < 0.4 and len(one.requests) < 14:
            drawn = draw(rng)
            for choice in range(rng.choice([1, 1, 1, 3])):
                mine = replace(drawn.params, seed=(drawn.params.seed or 0) + choice)
                asked[sent] = Asked(drawn.prompt, mine, drawn.salt, drawn.deadline)
                timeout = rng.uniform(1, 60) if drawn.deadline else None
                one.add(Add(sent, drawn.prompt, mine, drawn.salt, timeout))
                sent += 1
        if one.requests and rng.random() < 0.03:
            id = rng.choice(sorted(one.requests))
            one.abort(id)
            aborted.add(id)
        for output in one.step():
            assert output.id not in aborted
            asked[output.id].hear(output)
        now += 1.0
    for id in aborted:
        assert asked[id].last is None
    ended = [each for id, each in asked.items() if id not in aborted]
    assert all(each.last is not None for each in ended)
    return ended


def alone(one: Engine, each: Asked) -> Asked:
    """The same request, with nothing known from before, without drafts, with the engine to itself."""
    one.forget_prefixes()
    again = Asked(each.prompt, each.params, b"", False)
    one.add(Add(0, each.prompt, each.params))
    while not one.idle:
        for output in one.step():
            again.hear(output)
    return again


def check(model: DeepseekV3, guides: Guides, seed: int, count: int) -> None:
    rng = random.Random(seed)
    blocks, running, tokens = rng.choice([5, 6]), rng.choice([6, 12]), rng.choice([24, 70, 300])
    one = engine(model, guides, blocks, running, tokens, drafts=seed % 3)
    ended = soak(one, rng, count)
    scheduler = one.scheduler
    assert all(pool.available == pool.num_blocks for pool in scheduler.pools)
    assert sorted(scheduler.rows) == list(range(2 * running)) and not scheduler.computing and not scheduler.leaving
    solo = engine(model, guides, 8, 1, 512, drafts=0)
    known: dict[object, Asked] = {}
    for each in ended:
        assert each.last is not None
        if each.last.finish == "timeout":
            assert each.deadline
        key = (tuple(each.prompt), repr(each.params))
        if key not in known:
            known[key] = alone(solo, each)
        want = known[key]
        if each.last.finish in ("timeout", "error"):
            assert each.tokens == want.tokens[: len(each.tokens)]
        if each.last.finish != "timeout":
            assert each.result() == want.result(), (seed, each)
    counted = one.stats()
    assert counted.preemptions and counted.prefix_hits, "the cache was large enough, or nothing was shared"
    assert bool(counted.draft_tokens) == bool(seed % 3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_everything_at_once_is_as_if_alone(model: DeepseekV3, guides: Guides, seed: int):
    check(model, guides, seed, 22)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10, 16))
def test_everything_at_once_for_minutes_is_as_if_alone(model: DeepseekV3, guides: Guides, seed: int):
    check(model, guides, seed, 200)
