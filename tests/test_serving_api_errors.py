"""Requests that are wrong: each gets an error of OpenAI's form that names the field, and reaches no engine."""

import json
from typing import Any

import pytest
from api_calls import HELLO, Wire, call, chat, complete, run, says, server
from hypothesis import given, settings
from hypothesis import strategies as st

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def check(response: Any, status: int, param: str | None = None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["code"]
    assert error["param"] == param
    return error


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"nonsense", b'{"a": 1}x', b'{"messages": NaN}', b"\xff\xfe", b'{"x":' + b"[" * 100_000],
)
def test_malformed_json_is_400(body: bytes):
    engine = says("x")
    error = check(call(server(engine), CHAT, body), 400)
    assert error["code"] == "invalid_json" and not engine.asked


def test_another_shape_than_an_object_is_400():
    check(call(server(says("x")), CHAT, b"[]"), 400)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonx"])
def test_other_content_types_are_415(kind: str):
    check(call(server(says("x")), CHAT, HELLO, Content_Type=kind), 415)


def test_parameters_of_the_content_type_do_not_matter():
    assert call(server(says("x")), CHAT, HELLO, Content_Type="Application/JSON; charset=utf-8").status_code == 200


def test_a_body_that_is_announced_too_large_is_413():
    error = check(call(server(says("x"), max_body=1000), CHAT, HELLO | {"user": "x" * 1000}), 413)
    assert error["code"] == "request_too_large"


def test_a_body_that_grows_too_large_is_413_while_it_comes_in():
    async def work() -> Wire:
        wire = Wire(server(says("x"), max_body=1000), CHAT, None, chunks=[b"x" * 600] * 100)
        await wire.start()
        return wire

    wire = run(work())
    assert wire.messages[0]["status"] == 413
    assert wire.taken == 2, "the rest was not read"


@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize", "/detokenize"])
def test_an_unknown_model_is_404(path: str):
    fields = {"model": "gpt-x", "messages": HELLO["messages"], "tokens": []}
    fields |= {} if path == "/tokenize" else {"prompt": "a"}
    assert check(call(server(says("x")), path, fields), 404, "model")["code"] == "model_not_found"


def test_paths_and_methods_that_are_not_there():
    app = server(says("x"))
    check(call(app, "/v1/nothing"), 404)
    check(call(app, "/v1/chat/completions/"), 404)
    refused = call(app, CHAT)
    assert check(refused, 405)["code"] == "method_not_allowed" and refused.headers["allow"] == "POST"
    check(call(app, "/v1/models", HELLO), 405)
    check(call(app, "/v1/models/other"), 404, "model")


BAD_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{"content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "function", "content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": "a", "tool_calls": [{"function": {"name": "f"}}]}]},
        "messages[0].tool_calls",
    ),
    ({"messages": [{"role": "user", "content": "a", "prefix": True}]}, "messages"),
    ({"messages": [{"role": "user", "content": "a"}], "continue_final_message": True}, "messages"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc"}}]}]},
        "messages[0].content[0]",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"min_p": -1}, "min_p"),
    ({"top_k": -2}, "top_k"),
    ({"n": 0}, "n"),
    ({"n": 65}, "n"),
    ({"n": True}, "n"),
    ({"n": 1.5}, "n"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 10**400}, "seed"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": [""]}, "stop[0]"),
    ({"stop": ["a" * 2000]}, "stop[0]"),
    ({"logit_bias": {"400": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias[...]"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ({"stop_token_ids": [400]}, "stop_token_ids"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"stream": "yes"}, "stream"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"tools": [{"type": "web"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a"}}] * 2}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    (
        {
            "tools": [{"type": "function", "function": {"name": "a"}}],
            "tool_choice": {"type": "function", "function": {"name": "b"}},
        },
        "tool_choice",
    ),
    ({"thinking": {"type": "maybe"}}, "thinking.type"),
    ({"reasoning_effort": "extreme"}, "reasoning_effort"),
    ({"verify": 33}, "verify"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"best_of": 3}, "best_of"),
    ({"logits_processors": ["os.system"]}, "logits_processors"),
    ({"chat_template": "{{ x }}"}, "chat_template"),
    ({"include_stop_str_in_output": True}, "include_stop_str_in_output"),
]


@pytest.mark.parametrize("fields, param", BAD_CHATS)
def test_a_wrong_field_is_400_and_named(fields: dict[str, Any], param: str):
    engine = says("x")
    response = chat(server(engine), **fields)
    check(response, 400, param)
    assert not engine.asked and "etc" not in response.text and "robot" not in response.text


@pytest.mark.parametrize(
    "field, value",
    [("functions", []), ("best_of", 1), ("modalities", ["text"]), ("audio", None), ("length_penalty", 1.0)],
)
def test_fields_that_ask_for_nothing_special_pass(field: str, value: Any):
    assert chat(server(says("x")), **{field: value}).status_code == 200


def test_fields_that_nobody_knows_pass():
    fields = {"user": "u", "metadata": {"a": [1]}, "store": True, "service_tier": "auto", "frobnicate": 3}
    assert chat(server(says("x")), **fields).status_code == 200


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e400", b"-1"])
def test_numbers_that_are_none_are_400(number: bytes):
    body = json.dumps(HELLO).encode()[:-1] + b', "temperature": ' + number + b"}"
    assert call(server(says("x")), CHAT, body).status_code == 400


@pytest.mark.parametrize(
    "text", [rb"\ud800", rb"\udc00", rb"a\ud83d b", rb"\u0000", rb"\\\u0000", b"\xff", b"\xed\xa0\x80"]
)
@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize"])
def test_what_is_not_text_is_400(text: bytes, path: str):
    body = b'{"messages": [{"role": "user", "content": "%s"}]}' % text
    body = body if path == CHAT else b'{"prompt": "%s"}' % text
    assert call(server(says("x")), path, body).status_code == 400


def test_an_escaped_backslash_before_u0000_is_text():
    assert call(server(says("x")), TEXT, rb'{"prompt": "\\u0000"}').status_code == 200


@pytest.mark.parametrize("limit", ["context", "capacity"])
def test_a_prompt_without_room_is_400_with_the_numbers(limit: str):
    engine = says("x")
    setattr(engine, limit, 50)
    engine.__post_init__()
    app = server(engine)
    error = check(complete(app, [5] * 45, max_tokens=6), 400, "max_tokens")
    assert error["code"] == "context_length_exceeded" and "45" in error["message"] and "50" in error["message"]
    check(complete(app, [5] * 50), 400)
    assert not engine.asked
    assert complete(app, [5] * 45, max_tokens=5).status_code == 200
    assert complete(app, [5] * 49).status_code == 200


def test_token_ids_beyond_the_vocabulary_are_400():
    check(complete(server(says("x")), [400]), 400, "prompt")


@given(st.text(min_size=300, max_size=2000).filter(lambda text: len(set(text)) > 20))
@settings(max_examples=20, deadline=None)
def test_errors_repeat_nothing_of_what_was_sent(text: str):
    app = server(says("x"))
    wrong: list[dict[str, Any]] = [
        {"messages": [{"role": text, "content": "a"}]},
        {"model": text[:250]},
        {"tool_choice": text},
        {"response_format": {"type": text}},
        {"logit_bias": {text: 1}},
        {"temperature": text},
        {text: 1, "n": 0},
    ]
    for fields in wrong:
        response = chat(app, **fields)
        assert response.status_code in (400, 404) and len(response.content) < 600
        assert text[:20] not in response.json()["error"]["message"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [
    "model",
    "messages",
    "n",
    "stop",
    "seed",
    "stream",
    "logit_bias",
    "tools",
    "tool_choice",
    "response_format",
    "thinking",
    "chat_template_kwargs",
    "structured_outputs",
    "guided_json",
    "guided_choice",
    "temperature",
    "max_tokens",
    "stream_options",
    "verify",
    "prompt",
    "logprobs",
    "suffix",
]


@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4), st.sampled_from([CHAT, TEXT]))
@settings(max_examples=150, deadline=None)
def test_no_json_is_a_mistake_of_the_server(fields: dict[str, Any], path: str):
    base = HELLO if path == CHAT else {"prompt": "a"}
    assert call(_APP, path, json.dumps(base | fields).encode()).status_code in (200, 400, 404)


_APP = server(says("x"))
