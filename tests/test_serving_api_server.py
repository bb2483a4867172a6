"""The server on a real socket of this machine: how it ends, and what a socket adds to the faults."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from api_calls import HELLO, run, says, server, until
from fake_engine import FakeEngine

from dsv3.errors import UserError
from dsv3.serving.api.server import Server, listen

TESTS = Path(__file__).parent
CHAT = "/v1/chat/completions"
STREAM = HELLO | {"stream": True}


@asynccontextmanager
async def listening(
    engine: FakeEngine, drain: float = 10.0, **settings
) -> AsyncIterator[tuple[Server, httpx.AsyncClient]]:
    """A server and a client of it. Leaving asks the server to end, if nothing did before, and waits for that."""
    listener = listen("127.0.0.1", 0)
    app = server(engine, **settings)
    running = Server(app, drain)
    task = asyncio.create_task(running._serve([listener]))
    url = "http://{}:{}".format(*listener.getsockname())
    async with httpx.AsyncClient(base_url=url, timeout=10) as client:
        try:
            await until(lambda: running.started)
            yield running, client
        finally:
            app.state.service.gate.draining = True
            await asyncio.wait_for(task, 15)


async def streamed(client: httpx.AsyncClient) -> str:
    async with client.stream("POST", CHAT, json=STREAM) as response:
        assert response.status_code == 200
        return "".join([text async for text in response.aiter_text()])


def test_streams_finish_while_nothing_new_is_taken():
    async def work() -> None:
        engine = says("the cat sat on the mat", pause=0.05)
        async with listening(engine) as (running, client):
            stream = asyncio.create_task(streamed(client))
            await until(lambda: engine.asked and engine.asked[0].sent > 1)
            running.handle_exit(signal.SIGTERM, None)
            ready, refused = await client.get("/ready"), await client.post(CHAT, json=HELLO)
            assert ready.status_code == refused.status_code == 503
            assert ready.json() == {"status": "draining"} and refused.headers["retry-after"]
            text = await stream
            assert '"finish_reason":"stop"' in text and text.endswith("data: [DONE]\n\n")
            await until(lambda: running.should_exit)
        assert not running.engine_died and not running.force_exit

    run(work())


def test_streams_that_take_too_long_are_told_that_the_server_ends():
    async def work() -> None:
        engine = says("the cat sat on the mat " * 20, pause=0.05)
        async with listening(engine, drain=0.2) as (running, client):
            stream = asyncio.create_task(streamed(client))
            await until(lambda: engine.asked and engine.asked[0].sent > 1)
            running.handle_exit(signal.SIGTERM, None)
            *_, last, done, _ = (await stream).split("\n\n")
            assert done == "data: [DONE]"
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "draining"
        assert engine.asked[0].aborted

    run(work())


def test_a_dead_engine_ends_the_server():
    async def work() -> None:
        engine = says("x")
        async with listening(engine) as (running, _):
            engine.alive = False
            await until(lambda: running.should_exit)
        assert running.engine_died

    run(work())


@pytest.mark.slow
def test_an_engine_that_dies_while_the_server_drains_is_no_good_end():
    async def work() -> None:
        engine = says("the cat sat on the mat " * 20, pause=0.05)
        async with listening(engine, drain=1.0) as (running, client):
            stream = asyncio.create_task(streamed(client))
            await until(lambda: engine.asked and engine.asked[0].sent > 1)
            running.handle_exit(signal.SIGTERM, None)
            engine.alive = False
            *_, last, _, _ = (await stream).split("\n\n")
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_dead"
        assert running.engine_died

    run(work())


@pytest.mark.parametrize("body", [HELLO, STREAM])
def test_a_connection_that_breaks_ends_its_request(body: dict):
    async def work() -> None:
        engine = says("the cat sat on the mat " * 50, pause=0.02)
        async with listening(engine) as (_, client):
            asking = asyncio.create_task(client.post(CHAT, json=body))
            await until(lambda: engine.asked and engine.asked[0].sent > 1)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await until(lambda: engine.asked[0].aborted, 2)

    run(work())


@pytest.mark.slow
def test_a_reader_that_stops_is_left():
    async def work() -> None:
        engine = says("the cat sat on the mat " * 10)
        engine.context = engine.capacity = 10**6
        engine.__post_init__()
        engine.say.tokens *= 400
        async with listening(engine, slow_reader=0.3, buffered=64) as (_, client):
            address = (client.base_url.host, client.base_url.port)
            with socket.socket() as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                connection.connect(address)
                body = json.dumps(STREAM).encode()
                head = [f"POST {CHAT} HTTP/1.1", "Host: a", "Content-Type: application/json"]
                head += [f"Content-Length: {len(body)}", "", ""]
                connection.sendall("\r\n".join(head).encode() + body)
                await until(lambda: engine.asked and engine.asked[0].aborted, 15)
                assert engine.asked[0].sent < len(engine.say.tokens)

    run(work(), 40)


def test_a_port_in_use_is_the_users_error():
    with listen("127.0.0.1", 0) as first, pytest.raises(UserError, match="cannot listen on 127"):
        listen("127.0.0.1", first.getsockname()[1])
    with pytest.raises(UserError, match="there is no such port"):
        listen("127.0.0.1", 70_000)


def start(pause: float, drain: float) -> tuple[subprocess.Popen[str], str]:
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(TESTS / "serve_fake.py"), str(pause), str(drain)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


@pytest.mark.slow
def test_a_process_ends_with_0_when_its_streams_have_ended():
    process, url = start(pause=0.1, drain=20)
    try:
        with httpx.stream("POST", url + CHAT, json=STREAM, timeout=10) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
            assert httpx.get(url + "/ready").status_code == 503
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        assert process.wait(10) == 0
    finally:
        process.kill()


@pytest.mark.slow
def test_a_second_signal_ends_a_process_at_once():
    process, url = start(pause=1.0, drain=60)
    try:
        with httpx.stream("POST", url + CHAT, json=STREAM, timeout=10) as response:
            lines = response.iter_lines()
            next(lines)
            for _ in range(2):
                process.send_signal(signal.SIGINT)
                time.sleep(0.3)
            assert process.wait(5) == 0
    finally:
        process.kill()


def test_a_token_is_sent_at_once_and_not_when_the_last_packet_was_acknowledged():
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
