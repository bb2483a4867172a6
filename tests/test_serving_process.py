"""The engine's loop and its client, joined by a socket in this process: what goes wrong between the two."""

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from api_calls import HELLO, acall, run, until
from api_calls import Wire as Exchange
from engine_line import BLOCKS, PAGE, Line, Scripted, ask, fake_engine, free, outputs
from fake_runner import FakeRunner, text
from parity import random_model
from serving_server import CHAT, TEXT, looping, save_model
from tiny_model import CONFIG, TOKENIZER

import dsv3.backends.cpu  # noqa: F401  (its kernels are what runs)
from dsv3.core.sampling_params import SamplingParams
from dsv3.engine_process import EngineOptions, start
from dsv3.errors import UserError
from dsv3.parallel.channel import PeerLost
from dsv3.serving import process
from dsv3.serving.api.app import create_app
from dsv3.serving.api.settings import Settings
from dsv3.serving.client import SocketClient
from dsv3.serving.engine import Engine, EngineSettings
from dsv3.serving.messages import (
    Abort,
    Add,
    Close,
    EngineDied,
    EngineInfo,
    FromEngine,
    Output,
    Refused,
    RequestRefused,
    Stats,
    ToEngine,
)
from dsv3.serving.runner import ModelRunner, RunnerSettings
from dsv3.serving.wire import Wire


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("at", [1, 4])
def test_an_abort_that_comes_during_a_step_is_the_last_of_its_request(at: int, ahead: bool):
    """Cases 12 to 15. The other one goes on to its end."""

    def leave(step: int) -> None:
        if step == at:
            line.wire.send(Abort(1))

    runner = Scripted(leave, ahead=ahead)
    line = Line(fake_engine(runner))
    ask(line, 1, 60)
    ask(line, 2, 30, (5, 6))
    line.wire.send(Close(drain=True))
    code, said = line.run()
    assert code == 0 and free(line.engine)
    assert all(len(step) == 1 for step in runner.steps[at + 1 :]), "it is in no later step"
    assert all(output.finish is None for output in outputs(said, 1))
    assert [t for output in outputs(said, 2) for t in output.tokens] == text([5, 6], 2, 30)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_step_that_fails_costs_those_that_ran(ahead: bool):
    """Case 20. What waits is served, and the engine goes on."""

    def fail(step: int) -> None:
        if step == 5 and not failed:
            failed.append(step)
            line.wire.send(Abort(3))
            raise RuntimeError("a kernel failed")

    failed: list[int] = []
    line = Line(fake_engine(Scripted(fail, ahead=ahead), running=3))
    for id in (1, 2, 3, 4):
        ask(line, id, 20, (id, id))
    line.wire.send(Close(drain=True))
    code, said = line.run()
    assert code == 0 and failed and free(line.engine)
    for id in (1, 2):
        last = outputs(said, id)[-1]
        assert last.finish == "error" and last.error == "the engine failed in this step; try again"
    assert [t for output in outputs(said, 4) for t in output.tokens] == text([4, 4], 4, 20)


def test_who_leaves_while_a_step_that_fails_is_under_way_leaves_nothing():
    """Case 20, with steps that are launched before the last one is resolved."""
    engine = fake_engine(FakeRunner(BLOCKS, PAGE, ahead=True))
    engine.add(Add(1, [1, 2, 3], SamplingParams(max_tokens=20)))
    engine.step()
    engine.abort(1)
    engine.add(Add(2, [4, 5], SamplingParams(max_tokens=20)))
    engine.runner.fail_next = True
    with pytest.raises(RuntimeError):
        engine.step()
    assert [output.id for output in engine.fail("it failed")] == [2]
    assert engine.idle and free(engine)


def test_an_engine_whose_steps_keep_failing_ends():
    def fail(step: int) -> None:
        raise RuntimeError("a kernel failed")

    line = Line(fake_engine(Scripted(fail), running=1))
    for id in range(1, 6):
        ask(line, id, 3)
    code, said = line.run()
    assert code == 3 and len([m for m in said if isinstance(m, Output)]) == process.FAILURES


@pytest.mark.parametrize("idle", [False, True])
def test_an_engine_whose_group_is_lost_ends(idle: bool):
    """Case 21. A rank that is gone shows in a step, or in the signs of life between steps."""

    def lose(*_: object) -> None:
        raise PeerLost("rank 1 is gone")

    runner = Scripted(lose)
    line = Line(fake_engine(runner))
    if idle:
        runner.beat = lose
    else:
        ask(line, 1, 3)
    assert line.run()[0] == 3


def test_an_engine_that_nobody_listens_to_any_more_ends():
    line = Line(fake_engine(Scripted(lambda step: line.wire.link.close() if step == 2 else None)))
    ask(line, 1, 60)
    assert line.loop.run() == 1


def test_what_can_never_run_is_refused_and_the_rest_goes_on():
    """Case 8."""
    line = Line(fake_engine(FakeRunner(BLOCKS, PAGE)))
    ask(line, 1, 5, (1,) * 400)
    ask(line, 2, 5)
    line.wire.send(Close(drain=True))
    code, said = line.run()
    assert code == 0 and [m.id for m in said if isinstance(m, Refused)] == [1]
    assert outputs(said, 2)[-1].finish == "length"


def test_an_idle_engine_shows_a_sign_of_life():
    line = Line(fake_engine(FakeRunner(BLOCKS, PAGE)))
    threading.Timer(2.5 * process.HEARTBEAT, lambda: line.wire.send(Close(drain=False))).start()
    code, said = line.run()
    assert code == 0 and sum(isinstance(message, Stats) for message in said) >= 3


def test_the_time_in_the_queue_is_told_with_the_first_token():
    now = [10.0]
    engine = fake_engine(FakeRunner(BLOCKS, PAGE), running=1)
    engine.clock = lambda: now[0]
    for id in (1, 2):
        engine.add(Add(id, [id], SamplingParams(max_tokens=2)))
    told = []
    while not engine.idle:
        told += [(output.id, output.queued) for output in engine.step()]
        now[0] += 1
    assert told == [(1, 0.0), (1, 0.0), (2, 2.0), (2, 0.0)]


# The client ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[SocketClient, Wire[ToEngine]]]:
    """A client, and the engine's end of its socket."""
    ours, theirs = socket.socketpair()
    client, wire = SocketClient(ours), Wire(theirs, ToEngine)
    wire.send(EngineInfo("tiny", 100, 50, PAGE, 160, "cpu"))
    await client.start()
    try:
        yield client, wire
    finally:
        theirs.close()
        await client.close()


def test_half_a_request_is_never_sent():
    """A client leaves while its long prompt is written, because the engine is busy: the next one is understood."""

    async def work() -> None:
        async with connected() as (client, wire):
            prompt = list(range(1_000_000))
            stream, next_one = client.stream(prompt, SamplingParams()), client.stream([1], SamplingParams())
            asking = asyncio.create_task(anext(stream))
            wire.link.setblocking(False)
            loop, got = asyncio.get_running_loop(), []
            got += wire.feed(await loop.sock_recv(wire.link, 1000))  # it has begun
            asking.cancel()
            await asyncio.wait([asking])
            other = asyncio.create_task(anext(next_one))
            while len(got) < 3:
                got += wire.feed(await loop.sock_recv(wire.link, 1 << 20))
            first, gone, second = got
            assert (first.prompt, gone, second.prompt) == (prompt, Abort(first.id), [1])
            other.cancel()
            await asyncio.wait([other])

    run(work())


@pytest.mark.parametrize("together", [False, True])
def test_an_engine_that_dies_behind_an_output_leaves_nobody_waiting(together: bool):
    """Case 21. together: both are heard before anybody takes the output."""

    async def work() -> None:
        async with connected() as (client, wire):
            stream = client.stream([1], SamplingParams())
            first = asyncio.create_task(anext(stream))
            await until(lambda: client._boxes)
            wire.send(Output(1, [5], [-1.0]))
            if not together:
                assert (await first).tokens == [5]
            wire.link.close()
            await until(lambda: not client.alive)
            assert (await first).tokens == [5]
            for outputs in (stream, client.stream([1], SamplingParams())):
                with pytest.raises(EngineDied):
                    await anext(outputs)

    run(work())


def test_outputs_that_nobody_takes_become_one():
    async def work() -> None:
        async with connected() as (client, wire):
            stream = client.stream([1], SamplingParams())
            first = asyncio.create_task(anext(stream))
            await until(lambda: client._boxes)
            parts = [Output(1, [token], [-1.0], cached=3 * (token == 0)) for token in range(5)]
            parts[-1].finish = "length"
            wire.link.sendall(b"".join(map(wire.packed, parts)))
            output = await first
            assert (output.tokens, output.finish, output.cached) == ([0, 1, 2, 3, 4], "length", 3)
            await stream.aclose()

    run(work())


def test_a_refusal_and_what_it_says():
    async def work() -> None:
        with looping(fake_engine(FakeRunner(BLOCKS, PAGE)), BLOCKS * PAGE) as link:
            client = SocketClient(link)
            await client.start()
            with pytest.raises(RequestRefused, match="shorten it"):
                await anext(client.stream([1] * 400, SamplingParams()))
            await client.close()

    run(work())


# With a model --------------------------------------------------------------------------------------------------------


def model_engine() -> Engine:
    runner = ModelRunner(random_model(CONFIG.replace(max_position_embeddings=4000), 0), RunnerSettings(100, 8))
    return Engine(runner, EngineSettings(4000, CONFIG.vocab_size, 100 * runner.page_size), TOKENIZER.decode)


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_case_16_a_client_that_does_not_read_is_left(path: str):
    """What it was sent is bounded, and its blocks come free long before its text would have ended."""

    async def work() -> None:
        engine = model_engine()
        with looping(engine, 6400) as link:
            client = SocketClient(link)
            await client.start()
            settings = Settings(("tiny",), "v3", buffered=4, slow_reader=0.3)
            app = create_app(client, TOKENIZER, settings)
            body = (HELLO if path == CHAT else {"prompt": "a"}) | {"stream": True, "ignore_eos": True}
            slow, quick = Exchange(app, path, body), Exchange(app, path, body | {"max_tokens": 50})
            slow.reading.clear()
            tasks = slow.start(), quick.start()
            await asyncio.wait_for(asyncio.gather(*tasks), 15)
            assert quick.text.endswith("data: [DONE]\n\n")
            assert not slow.messages and app.state.service.gate.running == 0
            await until(lambda: not engine.requests and free(engine))
            assert engine.counted.generation_tokens < 3000
            assert (await acall(app, "/health")).status_code == 200
            await client.close()

    run(work(), 60)


@pytest.mark.slow
def test_case_21_an_engine_that_hangs_counts_as_dead_and_is_killed(tmp_path):
    async def work() -> None:
        options = EngineOptions(str(save_model(tmp_path / "tiny")), "tiny", "cpu", cache_gib=0.01, threads=1)
        link, child = start(options)
        client = SocketClient(link, child, silence=2.0)
        await client.start()
        app = create_app(client, TOKENIZER, Settings(("tiny",)))
        assert (await acall(app, "/health")).status_code == 200
        stream = client.stream([1], SamplingParams(ignore_eos=True))
        assert (await anext(stream)).tokens
        os.kill(child.pid, signal.SIGSTOP)
        await until(lambda: not client.alive, 20)
        assert (await acall(app, "/health")).status_code == (await acall(app, TEXT, {"prompt": "a"})).status_code == 503
        assert await asyncio.wait_for(client.close(), 10) == -signal.SIGKILL
        with contextlib.suppress(EngineDied):
            async for _ in stream:
                pass

    run(work(), 120)


def test_an_engine_that_still_loads_is_not_waited_for(tmp_path):
    """As on Ctrl-C while a large model is read."""

    async def work() -> None:
        client = SocketClient(*start(EngineOptions(str(tmp_path), "tiny", "cpu")))
        starting = asyncio.create_task(client.start())
        await asyncio.sleep(0)
        starting.cancel()
        assert await client.close() == -signal.SIGKILL

    run(work())


def test_an_engine_that_cannot_be_made_says_why():
    ours, theirs = socket.socketpair()

    def make():
        raise UserError("there is no such model")

    before = signal.getsignal(signal.SIGINT)
    try:
        assert process.serve(theirs, make) == 2
    finally:
        signal.signal(signal.SIGINT, before)
    assert Wire(ours, FromEngine).read() == [Refused(0, "there is no such model")]
