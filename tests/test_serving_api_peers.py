"""Clients that others wrote, against the server on a socket of this machine."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from api_calls import says, server
from fake_engine import FakeEngine, Script, spell
from hypothesis import HealthCheck, given, settings
from tiny_model import TOKENIZER

from dsv3.serving.api.server import Server, listen

pytestmark = pytest.mark.peer

KEY = "a-key-for-clients"
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "a sum",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}
CALLS = '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
HELLO: Any = [{"role": "user", "content": "the cat"}]


@contextmanager
def serving(engine: FakeEngine, format: str = "v3.1", **settings: Any) -> Iterator[str]:
    """The URL of a server on a thread."""
    listener = listen("127.0.0.1", 0)
    app = server(engine, format, api_keys=(KEY,), **settings)
    running = Server(app, drain=1)
    thread = threading.Thread(target=running.run, args=([listener],), daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not running.started and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        yield "http://{}:{}".format(*listener.getsockname())
    finally:
        app.state.service.gate.draining = True
        thread.join(10)
        assert not thread.is_alive()


def openai_client(url: str, key: str = KEY) -> Any:
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=10)


def test_openai_answers_whole_and_streamed():
    with serving(says("the cat sat on the mat", cut=3)) as url:
        client = openai_client(url)
        whole = client.chat.completions.create(model="tiny", messages=HELLO, seed=7, logprobs=True, top_logprobs=2)
        assert whole.choices[0].message.content == "the cat sat on the mat"
        assert whole.choices[0].model_extra["seed"] == 7 and whole.choices[0].logprobs.content[0].token == "the"
        assert whole.usage.model_extra["prompt_cache_miss_tokens"] == whole.usage.prompt_tokens
        options = {"include_usage": True}
        chunks = list(client.chat.completions.create(model="tiny", messages=HELLO, stream=True, stream_options=options))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == "the cat sat on the mat" and chunks[-1].usage.completion_tokens == 7
        assert chunks[-2].choices[0].finish_reason == "stop"


def test_openai_keeps_reasoning():
    with serving(says("hm\n</think>\n\nfour"), format="r1", also_reasoning=True) as url:
        client = openai_client(url)
        message = (
            client.chat.completions.create(model="tiny", messages=HELLO, reasoning_effort="high").choices[0].message
        )
        assert message.content == "four" and message.model_extra["reasoning_content"] == "hm\n"
        with client.chat.completions.stream(model="tiny", messages=HELLO) as stream:
            extra = [event.chunk.choices[0].delta.model_extra for event in stream if event.type == "chunk"]
        assert "".join(delta.get("reasoning_content", "") for delta in extra) == "hm\n"


def test_openai_calls_tools():
    with serving(says(CALLS)) as url:
        client = openai_client(url)
        asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "tools": [ADD], "tool_choice": "required"}
        made = client.chat.completions.create(**asked).choices[0].message.tool_calls[0]
        assert made.function.name == "add" and json.loads(made.function.arguments) == {"a": 1}
        with client.chat.completions.stream(**asked) as stream:
            final = stream.get_final_completion().choices[0]
        assert final.finish_reason == "tool_calls" and final.message.tool_calls[0].function.arguments == '{"a": 1}'
        back = [*HELLO, final.message.model_dump(exclude_none=True)]
        back.append({"role": "tool", "tool_call_id": final.message.tool_calls[0].id, "content": "2"})
        assert client.chat.completions.create(model="tiny", messages=back, tools=[ADD]).choices


def test_openai_parses_a_schema():
    pydantic = pytest.importorskip("pydantic")
    kind = pydantic.create_model("Sum", a=(int, ...))
    engine = says('{"a": 4}')
    with serving(engine) as url:
        parsed = openai_client(url).chat.completions.parse(model="tiny", messages=HELLO, response_format=kind)
    assert parsed.choices[0].message.parsed.a == 4
    assert engine.asked[0].params.guide.kind == "json_schema"


def test_openai_sees_errors_as_its_own():
    openai = pytest.importorskip("openai")
    with serving(says("x", finish="error", error="the lexer stopped")) as url:
        client = openai_client(url)
        with pytest.raises(openai.AuthenticationError):
            openai_client(url, "another-key").models.list()
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="gpt", messages=HELLO)
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(model="tiny", messages=HELLO, temperature=3)
        assert error.value.param == "temperature"
        with pytest.raises(openai.APIError, match="the lexer stopped"):
            list(client.chat.completions.create(model="tiny", messages=HELLO, stream=True, n=2))


def test_openai_completes_texts_and_lists_models():
    with serving(says(" sat")) as url:
        client = openai_client(url)
        assert client.completions.create(model="alias", prompt="the cat", suffix="mat").choices[0].text == " sat"
        chunks = client.completions.create(model="alias", prompt=["a", "b"], stream=True, echo=True)
        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices[0].index == 1) == "b sat"
        assert [model.id for model in client.models.list()] == ["tiny", "alias"]
        assert client.models.retrieve("alias").model_extra["max_model_len"] == 1024


def test_openai_that_goes_away_ends_its_request():
    engine = says("the cat sat on the mat " * 50, pause=0.01)
    with serving(engine) as url:
        stream = openai_client(url).chat.completions.create(model="tiny", messages=HELLO, stream=True)
        next(iter(stream))
        stream.close()
        deadline = time.monotonic() + 3
        while not engine.asked[0].aborted and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engine.asked[0].aborted


def test_langchain_answers_streams_and_binds_tools():
    langchain = pytest.importorskip("langchain_openai")
    scripts = iter([Script(spell(TOKENIZER, text)) for text in ("the cat", "sat on", CALLS)])
    with serving(FakeEngine(TOKENIZER, lambda *_: next(scripts))) as url:
        model = langchain.ChatOpenAI(model="tiny", base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        assert model.invoke("hello").content == "the cat"
        assert "".join(str(chunk.content) for chunk in model.stream("hello")) == "sat on"
        made = model.bind_tools([ADD]).invoke("hello").tool_calls
        assert [(each["name"], each["args"]) for each in made] == [("add", {"a": 1})]


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_the_description_is_kept(mode: str):
    """Every route answers requests that fit its description, and some that do not, as it says there."""
    schemathesis = pytest.importorskip("schemathesis")
    headers = {"Authorization": f"Bearer {KEY}"}
    app = server(says("the cat", cut=2), "v3.1", api_keys=(KEY,))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers=headers)
    # A schema cannot say all that is refused: messages without content, two forms of the text, prompts without room.
    left_out = [schemathesis.checks.positive_data_acceptance]
    statuses: Counter[int] = Counter()
    for found in schema.get_all_operations():
        operation = found.ok()
        if mode == "negative" and operation.path in ("/health", "/ready"):
            continue  # nothing in them can be wrong

        @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
        @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        def keeps(case: Any) -> None:
            if mode == "positive" and case.path == "/v1/chat/completions":
                case.body |= {"model": "tiny", "messages": HELLO}
            response = case.call(headers=headers)
            statuses[response.status_code] += 1
            case.validate_response(response, headers=headers, excluded_checks=left_out)

        keeps()
    assert statuses[200] > 20 and not [status for status in statuses if status >= 500]
