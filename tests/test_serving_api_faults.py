"""Clients that leave, dawdle or crowd in, and engines that fail: nothing is left running, and everybody is told."""

import asyncio
import json
import time
from typing import Any

import pytest
from api_calls import HELLO, SECRET, Wire, acall, call, chat, complete, events, run, says, server, until
from fake_engine import FakeEngine, Script, spell
from starlette.applications import Starlette
from tiny_model import TOKENIZER

from dsv3.serving.api.settings import Settings
from dsv3.serving.messages import EngineDied, RequestRefused

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
STREAM = HELLO | {"stream": True}
MAT = "the cat sat on the mat"


def held(at: int, **script: Any) -> tuple[FakeEngine, asyncio.Event]:
    """An engine that stops before output `at` until the event is set."""
    gate = asyncio.Event()
    return says(MAT, gate=gate, gate_at=at, **script), gate


def counts(app: Starlette) -> tuple[int, int, int]:
    gate = app.state.service.gate
    return gate.queued, gate.queued_tokens, gate.running


@pytest.mark.parametrize("body", [HELLO, STREAM, HELLO | {"n": 3}, STREAM | {"n": 3}])
@pytest.mark.parametrize("at", [0, 2])
def test_a_client_that_hangs_up_ends_its_requests(body: dict[str, Any], at: int):
    """Before the first token (queued, prefilling) and behind it; whole answers and streams."""

    async def work() -> None:
        engine, _ = held(at)
        app = server(engine)
        wire = Wire(app, CHAT, body)
        task = wire.start()
        await until(lambda: len(engine.asked) == body.get("n", 1) and all(a.sent >= at for a in engine.asked))
        assert engine.running == body.get("n", 1)
        wire.hang_up()
        await asyncio.wait_for(task, 1)
        assert all(asked.aborted for asked in engine.asked) and engine.running == 0
        assert counts(app) == (0, 0, 0)

    run(work())


def test_a_client_that_hangs_up_while_it_sends_asks_for_nothing():
    async def work() -> None:
        engine = says(MAT)
        wire = Wire(server(engine), CHAT, None, chunks=[b'{"messages"', b": []}"])
        wire._incoming.get_nowait()
        wire._incoming.get_nowait()
        wire.hang_up()
        await asyncio.wait_for(wire.start(), 1)
        assert not engine.asked and not wire.messages

    run(work())


def test_a_body_that_does_not_come_in_is_not_waited_for():
    async def work() -> Wire:
        wire = Wire(server(says(MAT), slow_sender=0.05), CHAT, None, chunks=[b"{", b"}"])
        wire._incoming.get_nowait()
        wire._incoming.get_nowait()
        await asyncio.wait_for(wire.start(), 1)
        return wire

    assert run(work()).messages[0]["status"] == 408


def test_a_client_that_does_not_read_is_left_and_buffers_stay_bounded():
    async def work() -> None:
        engine = says("a " * 400)
        app = server(engine, slow_reader=0.2, buffered=16)
        wire = Wire(app, CHAT, STREAM)
        wire.reading.clear()
        task = wire.start()
        await until(lambda: engine.asked and engine.asked[0].sent > 5)
        await asyncio.sleep(0.1)
        assert engine.asked[0].sent <= 16 + 2, "the engine's outputs are not piled up"
        await asyncio.wait_for(task, 2)
        assert engine.asked[0].aborted and counts(app) == (0, 0, 0)

    run(work())


def test_a_client_that_reads_slowly_gets_everything():
    async def work() -> None:
        engine = says("a b c " * 10)
        wire = Wire(server(engine, buffered=2), CHAT, STREAM)
        task = wire.start()
        while not task.done():
            wire.reading.set()
            await asyncio.sleep(0)
            wire.reading.clear()
            await asyncio.sleep(0.001)
        assert wire.text.endswith("data: [DONE]\n\n") and '"finish_reason":"stop"' in wire.text

    run(work())


def test_a_full_queue_refuses_at_once_and_says_so():
    async def work() -> None:
        engine, gate = held(0)
        app = server(engine, max_queued=2, retry_after=7)
        waiting = [Wire(app, CHAT, HELLO).start() for _ in range(2)]
        await until(lambda: len(engine.asked) == 2)
        assert (await acall(app, "/ready")).json() == {"status": "queue_full"}
        for path, body in ((CHAT, HELLO), (CHAT, STREAM), (TEXT, {"prompt": "a"})):
            refused = await acall(app, path, body)
            assert refused.status_code == 503 and refused.headers["retry-after"] == "7"
            assert refused.json()["error"]["code"] == "overloaded"
        assert len(engine.asked) == 2, "nothing was queued"
        assert (
            'vllm:admission_rejections_total{model_name="tiny",reason="queue_full"} 3.0'
            in (await acall(app, "/metrics")).text
        )
        gate.set()
        await asyncio.gather(*waiting)
        assert (await acall(app, "/ready")).status_code == 200
        assert (await acall(app, CHAT, HELLO)).status_code == 200

    run(work())


def test_requests_leave_the_queue_with_their_first_token():
    async def work() -> None:
        engine, gate = held(1)
        app = server(engine, max_queued=1)
        first = Wire(app, CHAT, HELLO).start()
        await until(lambda: engine.asked and engine.asked[0].sent == 1)
        assert counts(app) == (0, 0, 1)
        second = Wire(app, CHAT, HELLO).start()
        await until(lambda: len(engine.asked) == 2)
        gate.set()
        await asyncio.gather(first, second)
        assert counts(app) == (0, 0, 0)

    run(work())


def test_the_queue_counts_tokens_too_and_choices_one_by_one():
    async def work() -> None:
        engine, gate = held(0)
        app = server(engine, max_queued_tokens=30, max_queued=4)
        waiting = [Wire(app, TEXT, {"prompt": [5] * 20}).start()]
        await until(lambda: engine.asked)
        assert (await acall(app, TEXT, {"prompt": [5] * 11})).status_code == 503
        assert (await acall(app, TEXT, {"prompt": [5], "n": 4})).status_code == 503
        waiting.append(Wire(app, TEXT, {"prompt": [5], "n": 3}).start())
        await until(lambda: len(engine.asked) == 4)
        gate.set()
        await asyncio.gather(*waiting)
        assert (await acall(app, TEXT, {"prompt": [5] * 40})).status_code == 200, "alone, a large one may wait"

    run(work())


def test_a_key_may_be_held_to_a_number_of_requests():
    async def work() -> None:
        engine, gate = held(1)
        app = server(engine, max_per_key=1, api_keys=("key-of-one", "key-of-two"))
        one, two = "Bearer key-of-one", "Bearer key-of-two"
        first = Wire(app, CHAT, HELLO, authorization=one).start()
        await until(lambda: engine.asked)
        refused = await acall(app, CHAT, HELLO, Authorization=one)
        assert refused.status_code == 429 and refused.headers["retry-after"]
        assert refused.json()["error"]["type"] == "rate_limit_error"
        other = Wire(app, CHAT, HELLO, authorization=two).start()
        await until(lambda: len(engine.asked) == 2)
        gate.set()
        await asyncio.gather(first, other)
        assert (await acall(app, CHAT, HELLO, Authorization=one)).status_code == 200

    run(work())


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_that_passes_in_the_queue_is_504(stream: bool):
    app = server(says("", finish="timeout"))
    response = chat(app, stream=stream)
    assert response.status_code == 504 and response.json()["error"]["type"] == "timeout_error"
    assert 'finished_reason="timeout",model_name="tiny"} 1.0' in call(app, "/metrics").text


def test_a_deadline_that_passes_behind_the_first_token_ends_the_text():
    app = server(says(MAT, finish="timeout"))
    choice = chat(app).json()["choices"][0]
    assert choice["finish_reason"] == "insufficient_system_resource" and choice["message"]["content"] == MAT
    assert events(chat(app, stream=True))[-1]["choices"][0]["finish_reason"] == "insufficient_system_resource"


FAILURES = [
    (Script([], finish="error", error="a kernel failed"), 500, "engine_error"),
    (Script([], finish="abort"), 503, "aborted"),
    (Script([5], fail=EngineDied("gone")), 500, "engine_dead"),
    (Script([5], fail=RequestRefused("the guide does not compile")), 400, "request_refused"),
    (Script([5], fail=RuntimeError("a secret path")), 500, "internal_error"),
]


@pytest.mark.parametrize("script, status, code", FAILURES)
@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails_before_the_first_token(script: Script, status: int, code: str, path: str, stream: bool):
    app = server(FakeEngine(TOKENIZER, script))
    body = (HELLO if path == CHAT else {"prompt": "a"}) | {"stream": stream}
    response = call(app, path, body)
    assert response.status_code == status and response.json()["error"]["code"] == code
    assert "secret" not in response.text and counts(app) == (0, 0, 0)
    app.state.service.client.say = Script([5])
    assert call(app, path, body).status_code == 200, "the next one is served"


LATE = [
    ({"finish": "error", "error": "the lexer stopped"}, "engine_error"),
    ({"fail": EngineDied("gone"), "fail_at": 3}, "engine_dead"),
    ({"fail": RuntimeError("a secret path"), "fail_at": 3}, "internal_error"),
]


@pytest.mark.parametrize("script, code", LATE)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_an_engine_that_fails_mid_stream_ends_it_with_an_error(script: dict[str, Any], code: str, path: str):
    app = server(says(MAT, **script))
    body = HELLO if path == CHAT else {"prompt": "a"}
    found = events(call(app, path, body | {"stream": True}))
    assert found[-1]["error"]["code"] == code and "secret" not in found[-1]["error"]["message"]
    assert all("error" not in chunk for chunk in found[:-1]) and len(found) > 3
    assert call(app, path, body).status_code == 500


def test_one_choice_that_fails_ends_the_others():
    async def work() -> None:
        scripts = iter([Script(spell(TOKENIZER, MAT), pause=0.01), Script([], finish="error")])
        engine = FakeEngine(TOKENIZER, lambda *_: next(scripts))
        response = await acall(server(engine), CHAT, HELLO | {"n": 2})
        assert response.status_code == 500 and engine.asked[0].aborted and engine.running == 0

    run(work())


def test_outputs_that_stop_without_an_end_are_a_death():
    class Broken(FakeEngine):
        async def _outputs(self, asked: Any, script: Script) -> Any:
            async for output in super()._outputs(asked, script):
                output.finish = None
                yield output

    assert chat(server(Broken(TOKENIZER, Script([5])))).json()["error"]["code"] == "engine_dead"


def test_a_dead_engine_is_told_by_every_route():
    engine = says(MAT)
    app = server(engine)
    assert call(app, "/health").json() == call(app, "/ready").json() == {"status": "ok"}
    engine.alive = False
    for path in ("/health", "/ready"):
        response = call(app, path)
        assert response.status_code == 503 and response.json() == {"status": "engine_dead"}
    assert chat(app).status_code == complete(app).status_code == 503
    assert call(app, "/v1/models").status_code == 200


def test_while_draining_nothing_new_is_taken():
    app = server(says(MAT))
    app.state.service.gate.draining = True
    assert call(app, "/ready").json() == {"status": "draining"} and call(app, "/health").status_code == 200
    refused = chat(app)
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
    assert refused.headers["retry-after"]


def test_a_stream_without_news_says_that_it_lives():
    async def work() -> None:
        engine, gate = held(2)
        wire = Wire(server(engine, keep_alive=0.02), CHAT, STREAM)
        task = wire.start()
        await until(lambda: wire.text.count(": keep-alive\n\n") > 2)
        gate.set()
        await task
        assert wire.text.endswith("data: [DONE]\n\n")

    run(work())


def test_a_stream_that_waits_in_the_queue_says_that_it_lives_and_then_errors_come_as_events():
    async def work() -> None:
        gate = asyncio.Event()
        engine = FakeEngine(TOKENIZER, Script([], finish="timeout", gate=gate))
        wire = Wire(server(engine, keep_alive=0.02), CHAT, STREAM)
        task = wire.start()
        await until(lambda: ": keep-alive\n\n" in wire.text)
        gate.set()
        await task
        *_, last, done, rest = wire.text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"

    run(work())


def test_a_whole_answer_waits_in_silence():
    app = server(says(MAT, pause=0.01), keep_alive=0.002)
    assert chat(app).json()["choices"][0]["message"]["content"] == MAT


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_long_prompts_do_not_hold_up_the_others(path: str):
    """The longest time in which nothing else ran, as a part of the whole."""

    async def work() -> float:
        app = server(FakeEngine(TOKENIZER, Script([5]), context=10**7, capacity=10**7))
        text = "the cat sat on the mat 12345 " * 20_000
        body = {"prompt": text} if path == TEXT else {"messages": [{"role": "user", "content": text}]}
        started = last = time.monotonic()
        worst = 0.0
        long = asyncio.create_task(acall(app, path, body))
        while not long.done():
            await asyncio.sleep(0.005)
            now = time.monotonic()
            worst, last = max(worst, now - last), now
        assert (await long).status_code == 200
        return worst / (time.monotonic() - started)

    assert run(work(), 60) < 0.5


def test_two_tenants_share_no_cached_prefix():
    engine = says("x")
    app = server(engine, api_keys=("key-of-one", "key-of-two"))

    def cached(key: str) -> int:
        response = call(app, CHAT, HELLO | {"cache_salt": "same"}, Authorization=f"Bearer {key}")
        return response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached("key-of-one") == 0 and cached("key-of-one") > 0
    assert cached("key-of-two") == 0
    salts = [asked.salt for asked in engine.asked]
    assert salts[0] == salts[1] != salts[2] and all(len(salt) == 32 for salt in salts)
    assert not any(b"key" in salt or SECRET in salt for salt in salts)


def test_the_salt_hangs_on_the_servers_secret():
    engine = says("x")
    for secret in (SECRET, b"another secret of 16"):
        call(server(engine, api_keys=("key-of-one",), secret=secret), CHAT, HELLO, Authorization="Bearer key-of-one")
    assert engine.asked[0].salt != engine.asked[1].salt
    assert Settings(("m",)).secret != Settings(("m",)).secret
