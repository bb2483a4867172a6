"""The scheduler and its blocks: nothing leaks, nothing is shared wrongly, every text is what it would be alone."""

import hypothesis.strategies as st
import pytest
from fake_runner import FakeRunner, text
from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dsv3.core.generate import SamplingParams
from dsv3.serving.blocks import BlockPool, chain, root_key
from dsv3.serving.cost import CostModel
from dsv3.serving.engine import Engine, EngineSettings
from dsv3.serving.messages import Add, Output, RequestRefused
from dsv3.serving.scheduler import Limits

PAGE = 4


def engine(
    blocks: int = 12, limits: Limits | None = None, context: int = 64, cost: CostModel | None = None, **of_runner
) -> Engine:
    runner = FakeRunner(blocks, PAGE, **of_runner)
    chosen = EngineSettings(context, 50, blocks * PAGE, limits=limits or Limits(), cost=cost or CostModel())
    return Engine(runner, chosen)


def add(
    engine: Engine, id: int, prompt: list[int], max_tokens: int = 5, seed: int = 0, salt: bytes = b"", **options
) -> None:
    engine.add(Add(id, prompt, SamplingParams(max_tokens=max_tokens, seed=seed), salt, **options))


def run(engine: Engine, steps: int = 10_000) -> dict[int, list[int]]:
    """Steps until all is done; the texts."""
    texts: dict[int, list[int]] = {}
    for _ in range(steps):
        if engine.idle:
            return texts
        for output in engine.step():
            texts.setdefault(output.id, []).extend(output.tokens)
    raise AssertionError("it does not end")


def free(engine: Engine) -> int:
    return sum(pool.available for pool in engine.scheduler.pools)


class Traffic(RuleBasedStateMachine):
    """Requests come, go on, are aborted, in a cache far too small for all of them."""

    @initialize(
        blocks=st.integers(4, 16),
        running=st.integers(1, 5),
        tokens=st.integers(1, 24),
        speculative=st.integers(0, 3),
        ahead=st.booleans(),
        shards=st.integers(1, 2),
        caching=st.booleans(),
    )
    def start(self, blocks, running, tokens, speculative, ahead, shards, caching):
        self.runner = FakeRunner(blocks, PAGE, 0 if ahead else speculative, ahead, shards)
        limits = Limits(running, tokens, 0.01)
        chosen = EngineSettings(
            40, 50, blocks * PAGE, prefix_caching=caching, limits=limits, cost=CostModel(token=1e-3, context=1e-5)
        )
        self.engine = Engine(self.runner, chosen)
        self.asked: dict[int, tuple[list[int], int, int]] = {}
        self.got: dict[int, list[int]] = {}
        self.aborted: set[int] = set()
        self.count = 0

    @rule(
        stem=st.integers(0, 3),
        length=st.integers(0, 12),
        more=st.lists(st.integers(0, 49), max_size=3),
        max_tokens=st.integers(1, 12),
        seed=st.integers(0, 1),
        salt=st.sampled_from([b"", b"x"]),
        copies=st.integers(1, 3),
    )
    def ask(self, stem, length, more, max_tokens, seed, salt, copies):
        prompt = [(stem + i) % 50 for i in range(length)] + more or [stem]
        for _ in range(copies):
            self.count += 1
            try:
                add(self.engine, self.count, prompt, max_tokens, seed, salt)
            except RequestRefused:
                assert len(prompt) >= self.engine.settings.capacity
                continue
            room = min(40, self.engine.settings.capacity) - len(prompt)
            self.asked[self.count] = (prompt, seed, min(max_tokens, room))
            self.got[self.count] = []

    @rule(steps=st.integers(1, 6))
    def go_on(self, steps):
        for _ in range(steps):
            self.hear(self.engine.step())

    def hear(self, outputs: list[Output]) -> None:
        for output in outputs:
            assert output.id not in self.aborted
            self.got[output.id] += output.tokens
            if output.finish is not None:
                assert output.finish == "length"
                prompt, seed, count = self.asked[output.id]
                assert self.got[output.id] == text(prompt, seed, count)

    @precondition(lambda self: self.engine.requests)
    @rule(choice=st.integers(0, 1000))
    def abort(self, choice):
        alive = sorted(self.engine.requests)
        id = alive[choice % len(alive)]
        self.engine.abort(id)
        self.aborted.add(id)

    @invariant()
    def every_block_is_free_or_held(self):
        if not hasattr(self, "engine"):
            return
        for shard, pool in enumerate(self.engine.scheduler.pools):
            held = [0] * pool.num_blocks
            for request in self.engine.scheduler.running:
                if request.shard == shard:
                    assert len(set(request.blocks)) == len(request.blocks)
                    for block in request.blocks:
                        held[block] += 1
            if not self.engine.under_way:
                assert held == pool._holders
            assert pool.available == sum(not count for count in pool._holders)
            assert len({*pool._blank, *pool._parts, *pool._kept}) == pool.available
            assert all(pool._key[block] == key for key, block in pool._block_of.items())

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        for _ in range(5_000):
            if self.engine.idle:
                break
            self.hear(self.engine.step())
        assert self.engine.idle
        assert free(self.engine) == sum(pool.num_blocks for pool in self.engine.scheduler.pools)
        assert sorted(self.engine.scheduler.rows) == list(range(2 * self.engine.scheduler.limits.running))
        assert not self.engine.scheduler.computing
        for id, (prompt, seed, count) in self.asked.items():
            if id not in self.aborted:
                assert self.got[id] == text(prompt, seed, count)


Traffic.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate]
)  # to shrink a failure takes minutes
TestTraffic = Traffic.TestCase


def test_a_text_begun_alike_is_found_in_the_cache():
    one = engine()
    add(one, 1, list(range(10)))
    run(one)
    add(one, 2, [*range(9), 30])
    run(one)
    assert one.scheduler.prefix_hits == 8
    assert one.runner.steps[-5][0] == (8, 2)


def test_the_last_token_of_a_prompt_is_computed_though_all_is_known():
    one = engine()
    add(one, 1, list(range(8)))
    run(one)
    add(one, 2, list(range(8)))
    assert run(one)[2] == text(list(range(8)), 0, 5)
    assert one.scheduler.prefix_hits == 7


def test_tenants_do_not_see_each_others_prefixes():
    one = engine()
    add(one, 1, list(range(10)), salt=b"a")
    run(one)
    add(one, 2, list(range(10)), salt=b"b")
    run(one)
    assert one.scheduler.prefix_hits == 0


def test_the_same_prompt_at_the_same_time_is_computed_once():
    one = engine(blocks=40)
    for id in range(8):
        add(one, id, list(range(11)), seed=id)
    texts = run(one)
    assert texts == {id: text(list(range(11)), id, 5) for id in range(8)}
    prefilled = sum(count for step in one.runner.steps for start, count in step if start + count <= 11)
    assert prefilled == 11 + 7  # and the last token of each of the others


def test_a_long_prompt_leaves_time_for_those_who_decode():
    cost = CostModel(token=1e-4, context=1e-6)
    one = engine(blocks=200, limits=Limits(seconds=0.01), context=600, cost=cost)
    add(one, 1, [1, 2, 3], max_tokens=60)
    for _ in range(3):
        one.step()
    add(one, 2, list(range(50)) * 10, max_tokens=2)
    seconds = []
    while 2 in one.requests:
        before = len(one.runner.steps)
        one.step()
        seconds += [sum(cost.of_chunk(start, count) for start, count in step) for step in one.runner.steps[before:]]
        if max(start for start, _ in one.runner.steps[-1]) > 150:
            break
    assert max(seconds) <= 0.0101
    chunks = [count for step in one.runner.steps for _, count in step if count > 1]
    assert chunks[1] > chunks[-1]  # fewer tokens the longer the context


def test_a_short_prompt_does_not_wait_for_a_long_one_nor_the_long_one_for_short_ones():
    one = engine(blocks=400, limits=Limits(tokens=20), context=1000)
    add(one, 0, [i % 50 for i in range(600)], max_tokens=1)
    one.step()
    ended = []
    for step in range(1, 200):
        if step % 2:
            add(one, step, [step % 50, 7, 8, 9], max_tokens=1)
        ended += [output.id for output in one.step() if output.finish]
    assert ended.index(0) > ended.index(1) and 0 in ended


def test_a_prompt_goes_on_even_where_decoding_takes_all_the_time():
    one = engine(blocks=100, limits=Limits(seconds=0.0), context=300)
    add(one, 1, [1, 2, 3], max_tokens=90)
    one.step()
    add(one, 2, list(range(40)), max_tokens=1)
    texts = {}
    for _ in range(5):
        for output in one.step():
            texts.setdefault(output.id, []).extend(output.tokens)
    assert texts[2] == text(list(range(40)), 0, 1)


def test_what_can_never_run_is_refused_with_numbers():
    one = engine(blocks=4)
    for prompt, words in [([], "at least one"), ([50], "vocabulary of 50"), ([1] * 16, "16"), ([1] * 64, "64")]:
        with pytest.raises(RequestRefused, match=words):
            add(one, 1, prompt)
    assert one.idle


def test_a_deadline_ends_a_request_that_waits():
    now = [0.0]
    one = engine(limits=Limits(running=1))
    one.clock = lambda: now[0]
    add(one, 1, [1], max_tokens=30)
    add(one, 2, [2], timeout=1.0)
    one.step()
    now[0] = 2.0
    [output] = [output for output in one.step() if output.id == 2]
    assert output.finish == "timeout" and 2 not in one.requests


def test_a_failed_step_ends_what_ran_and_frees_it():
    one = engine(limits=Limits(running=1))
    add(one, 1, [1, 2], max_tokens=20)
    add(one, 2, [3, 4])
    one.step()
    one.runner.fail_next = True
    with pytest.raises(RuntimeError):
        one.step()
    [output] = one.fail("the step failed")
    assert (output.id, output.finish, output.error) == (1, "error", "the step failed")
    assert run(one)[2] == text([3, 4], 0, 5)
    assert free(one) == 12


@pytest.mark.parametrize("ahead", [False, True])
def test_what_a_failed_step_was_to_copy_or_compute_is_not_found_by_others(ahead):
    one = engine(ahead=ahead)
    add(one, 1, list(range(8)))
    run(one)
    parting = [*range(7), 30, 31]  # begins with a page, and three tokens of another
    for id in (2, 3):
        add(one, id, parting)
        one.runner.fail_next = True
        with pytest.raises(RuntimeError):
            one.step()
        one.fail("the step failed")
    add(one, 4, parting)
    add(one, 5, [*parting, 32])
    texts = run(one)
    assert texts[4] == text(parting, 0, 5) and texts[5] == text([*parting, 32], 0, 5)


def test_a_key_stands_for_everything_up_to_it():
    one = chain(chain(root_key(b""), [1, 2]), [3, 4])
    assert one != chain(chain(root_key(b""), [1, 5]), [3, 4])
    assert one != chain(chain(root_key(b"salt"), [1, 2]), [3, 4])


def test_a_text_that_leaves_a_known_one_within_a_block_begins_with_a_copy_of_what_they_share():
    pool, parent = BlockPool(4, 16), root_key(b"")
    blocks = pool.take(4)
    texts = [list(range(16)), [*range(10), *range(90, 96)], [*range(12), 7, 7, 7, 7], [5] * 16]
    for block, tokens in zip(blocks, texts, strict=True):
        pool.name(block, chain(parent, tokens), parent, tokens)
    assert pool.begin(parent, [*range(13), 1, 1]) == (blocks[0], 13)
    assert pool.begin(parent, [*range(10), 90, 91, 1]) == (blocks[1], 12)
    assert pool.begin(parent, [*range(5), 1, 1, 1, 1]) == (-1, 0)  # too little
    assert pool.begin(parent, list(range(6))) == (-1, 0)
    assert pool.begin(root_key(b"another tenant"), list(range(16))) == (-1, 0)
    pool.release(blocks[:1])
    pool.take(1)  # and what it held is gone
    assert pool.begin(parent, [*range(13), 1, 1]) == (blocks[2], 12)
    pool.forget()
    assert pool.begin(parent, [5] * 16) == (-1, 0)


def test_what_was_in_a_block_that_never_became_full_is_known_until_room_is_needed():
    pool, parent = BlockPool(2, 16), root_key(b"")
    full, part = pool.take(2)
    pool.name(full, chain(parent, [1] * 16), parent, [1] * 16)
    pool.name_part(part, parent, [*range(12)])
    pool.release([full, part])
    assert pool.begin(parent, [*range(9), 90]) == (part, 9) and pool.begin(parent, [*range(15)]) == (part, 12)
    assert pool.find([chain(parent, [*range(12)])]) == []
    assert pool.take(1) == [part]  # before one that is full
    assert pool.begin(parent, [*range(12)]) == (-1, 0)


def test_blocks_that_were_used_last_stay_longest():
    pool = BlockPool(3, PAGE)
    a, b, c = pool.take(3)
    for block, name in ((a, b"a"), (b, b"b"), (c, b"c")):
        pool.name(block, name, root_key(b""), [0] * PAGE)
    pool.release([b])
    pool.release([a, c])
    assert pool.take(1) == [b]
    assert pool.find([b"b"]) == [] and pool.find([b"a"]) == [a]
    pool.take(1)
    assert pool.find([b"c"]) == [] and pool.find([b"a"]) == [a]  # of one request, the later block goes first
