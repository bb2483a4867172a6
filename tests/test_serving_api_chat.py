"""POST /v1/chat/completions: what is asked of the engine, and what becomes of its answer, whole and streamed."""

import json
from typing import Any

import pytest
from api_calls import HELLO, SECRET, call, chat, events, joined, says, server
from fake_engine import FakeEngine, Script, spell
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import TOKENIZER

from dsv3.core.encoding import encode_chat
from dsv3.core.special_tokens import END_THINK, EOS, THINK

MAT = "the cat sat on the mat"
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "a sum", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "look"}},
]
CALL_V31 = '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>'
SECOND = "<｜tool▁call▁begin｜>look<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
CALLS = CALL_V31 + SECOND + "<｜tool▁calls▁end｜>"


def test_an_answer_has_openais_form():
    answer = chat(server(says(MAT)), model="tiny").json()
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-") and answer["model"] == "tiny"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": MAT},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
            "seed": 1001,
        }
    ]


def test_usage_counts_in_openais_and_in_deepseeks_spelling():
    app = server(says(MAT))
    prompt = len(TOKENIZER.encode_segments(encode_chat(HELLO["messages"], "v3")))
    tokens = len(TOKENIZER.encode(MAT)) + 1  # the end of sentence is generated, too
    first, again = chat(app).json()["usage"], chat(app).json()["usage"]
    assert first == {
        "prompt_tokens": prompt,
        "completion_tokens": tokens,
        "total_tokens": prompt + tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
        "prompt_cache_hit_tokens": 0,
        "prompt_cache_miss_tokens": prompt,
    }
    assert again["prompt_tokens_details"]["cached_tokens"] == again["prompt_cache_hit_tokens"] == 4
    assert again["prompt_cache_miss_tokens"] == prompt - 4


def test_a_stream_begins_with_the_role_and_ends_with_a_finish():
    chunks = events(chat(server(says(MAT)), stream=True))
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert all(set(choice["delta"]) == {"content"} and choice["finish_reason"] is None for choice in choices[1:-1])
    assert choices[-1]["delta"] == {} and choices[-1]["finish_reason"] == "stop"
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk" and not any("usage" in chunk for chunk in chunks)


def test_the_usage_of_a_stream_comes_last_without_choices():
    chunks = events(chat(server(says(MAT)), stream=True, stream_options={"include_usage": True}))
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 8 - 1
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_continuous_usage_grows_with_every_chunk():
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(chat(server(says(MAT)), stream=True, stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 7


REPLIES = [
    (MAT, "v3", {}),
    ("hm, héllo 深度求索 😀\n</think>\n\nthe cat", "r1", {}),
    ("hm\n</think>\n\nI add " + CALLS, "v3.1", {"tools": TOOLS, "thinking": {"type": "enabled"}}),
    (CALLS, "v3.1", {"tools": TOOLS}),
    ("no end", "r1", {}),
    (CALL_V31.removesuffix("1}<｜tool▁call▁end｜>"), "v3.1", {"tools": TOOLS}),
]


@pytest.mark.parametrize("text, format, fields", REPLIES)
@given(cut=st.integers(1, 9), finish=st.sampled_from(["stop", "length", "timeout"]), logprobs=st.booleans())
@settings(max_examples=12, deadline=None)
def test_a_stream_adds_up_to_the_whole_however_it_is_cut(text, format, fields, cut, finish, logprobs):
    def ask(cut: int, **more: Any) -> Any:
        app = server(says(text, cut=cut, finish=finish), format=format, also_reasoning=True)
        return chat(app, seed=5, logprobs=logprobs, **fields, **more)

    whole = ask(1).json()["choices"][0]
    streamed = joined(events(ask(cut, stream=True)))
    whole["message"].setdefault("content", "")
    for answer in (whole, streamed):
        answer["message"]["content"] = answer["message"]["content"] or ""
        for made in answer["message"].get("tool_calls", []):
            made.pop("id")
    assert streamed == whole


def test_reasoning_is_kept_apart_and_counted():
    answer = chat(server(says("the cat\n</think>\n\nsat"), format="r1")).json()
    assert answer["choices"][0]["message"] == {
        "role": "assistant",
        "content": "sat",
        "reasoning_content": "the cat\n",
    }
    thought = len(TOKENIZER.encode("the cat\n"))
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == thought


def test_reasoning_without_an_end_leaves_no_content():
    message = chat(server(says("the cat", finish="length"), format="r1")).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": None, "reasoning_content": "the cat"}


def test_reasoning_is_also_written_under_the_newer_name_if_wished():
    app = server(says("the\n</think>\n\ncat"), format="r1", also_reasoning=True)
    message = chat(app).json()["choices"][0]["message"]
    assert message["reasoning"] == message["reasoning_content"] == "the\n"
    deltas = [chunk["choices"][0]["delta"] for chunk in events(chat(app, stream=True))]
    assert [delta.get("reasoning") for delta in deltas] == [delta.get("reasoning_content") for delta in deltas]


SWITCHES = [
    ({"thinking": {"type": "enabled"}}, True),
    ({"thinking": {"type": "disabled"}}, False),
    ({"reasoning_effort": "high"}, True),
    ({"reasoning_effort": "none"}, False),
    ({"chat_template_kwargs": {"thinking": True}}, True),
    ({"chat_template_kwargs": {"enable_thinking": True}}, True),
    ({"chat_template_kwargs": {"enable_thinking": False}}, False),
    ({"thinking": {"type": "disabled"}, "reasoning_effort": "max"}, False),
    ({}, None),
]


@pytest.mark.parametrize("fields, wanted", SWITCHES)
@pytest.mark.parametrize("default", [False, True])
def test_every_spelling_switches_thinking(fields: dict[str, Any], wanted: bool | None, default: bool):
    engine = says(MAT)
    assert chat(server(engine, format="v3.1", thinking=default), **fields).status_code == 200
    expected = THINK if (default if wanted is None else wanted) else END_THINK
    assert engine.asked[0].prompt[-1] == TOKENIZER.special_id(expected)


def test_hints_are_ignored_and_orders_refused_by_models_without_a_switch():
    app = server(says(MAT))
    assert chat(app, reasoning_effort="high").status_code == 200
    assert chat(app, chat_template_kwargs={"enable_thinking": True}).status_code == 200
    refused = chat(app, thinking={"type": "enabled"})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "thinking"


def test_earlier_reasoning_may_be_missing():
    conversation = [
        {"role": "user", "content": "1 + 1"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c", "function": {"name": "add", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "2"},
    ]
    app = server(says(MAT), format="v3.1")
    assert chat(app, messages=conversation, tools=TOOLS, thinking={"type": "enabled"}).status_code == 200


def test_tool_calls_come_whole():
    choice = chat(server(says("I add " + CALLS), format="v3.1"), tools=TOOLS).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "I add "
    calls = choice["message"]["tool_calls"]
    assert [call["function"] for call in calls] == [
        {"arguments": '{"a": 1}', "name": "add"},
        {"arguments": "{}", "name": "look"},
    ]
    assert all(call["type"] == "function" and call["id"].startswith("call_") for call in calls)
    assert calls[0]["id"] != calls[1]["id"] and "complete" not in calls[0]


def test_tool_calls_are_streamed_by_name_then_arguments():
    chunks = events(chat(server(says(CALLS), format="v3.1"), tools=TOOLS, stream=True))
    deltas = [made for chunk in chunks for made in chunk["choices"][0]["delta"].get("tool_calls", [])]
    first = [delta for delta in deltas if "id" in delta]
    assert [(delta["index"], delta["type"], delta["function"]) for delta in first] == [
        (0, "function", {"arguments": "", "name": "add"}),
        (1, "function", {"arguments": "", "name": "look"}),
    ]
    assert all(set(delta) == {"index", "function"} for delta in deltas if "id" not in delta)
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_call_cut_off_by_length_is_flagged():
    cut_off = CALL_V31.removesuffix(" 1}<｜tool▁call▁end｜>")
    app = server(says(cut_off, finish="length"), format="v3.1")
    choice = chat(app, tools=TOOLS).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    made = choice["message"]["tool_calls"][0]
    assert made["function"] == {"arguments": '{"a":', "name": "add"} and made["complete"] is False


def test_parallel_tool_calls_may_be_switched_off():
    app = server(says(CALLS), format="v3.1")
    assert len(chat(app, tools=TOOLS, parallel_tool_calls=False).json()["choices"][0]["message"]["tool_calls"]) == 1


def test_tools_that_are_not_to_be_called_are_not_shown():
    engine = says("x")
    app = server(engine, format="v3.1")
    chat(app, tools=TOOLS, tool_choice="none")
    chat(app)
    assert engine.asked[0].prompt == engine.asked[1].prompt and engine.asked[0].params.guide is None


@pytest.mark.parametrize(
    "choice, names",
    [
        ("auto", None),
        ("required", ["add", "look"]),
        ({"type": "function", "function": {"name": "look"}}, ["look"]),
    ],
)
def test_tool_choice_becomes_a_guide(choice: Any, names: list[str] | None):
    engine = says(CALLS)
    chat(server(engine, format="v3.1"), tools=TOOLS, tool_choice=choice, thinking={"type": "enabled"})
    guide = engine.asked[0].params.guide
    if names is None:
        assert guide is None
    else:
        assert (guide.kind, guide.format, guide.after_thinking) == ("tools", "v3.1", True)
        assert [name for name, _ in guide.tools] == names
        assert {name: json.loads(schema) for name, schema in guide.tools}.get("add", PARAMETERS) == PARAMETERS


GUIDES = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, ("json_object", "")),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "strict": True, "schema": PARAMETERS},
            }
        },
        ("json_schema", PARAMETERS),
    ),
    ({"guided_json": PARAMETERS}, ("json_schema", PARAMETERS)),
    ({"guided_json": json.dumps(PARAMETERS)}, ("json_schema", PARAMETERS)),
    ({"guided_regex": "[ab]+"}, ("regex", "[ab]+")),
    ({"guided_grammar": 'start: "x"'}, ("grammar", 'start: "x"')),
    ({"guided_choice": ["a", 'b"']}, ("grammar", 'start: "a" | "b\\""\n')),
    ({"structured_outputs": {"json": PARAMETERS}}, ("json_schema", PARAMETERS)),
    ({"structured_outputs": {"regex": "a|b"}}, ("regex", "a|b")),
    ({"structured_outputs": {"choice": ["a"]}}, ("grammar", 'start: "a"\n')),
    ({"structured_outputs": {"json_object": True}}, ("json_object", "")),
]


@pytest.mark.parametrize("fields, expected", GUIDES)
@pytest.mark.parametrize("format", ["v3", "r1"])
def test_every_spelling_of_a_form_becomes_a_guide(fields: dict[str, Any], expected: Any, format: str):
    engine = says("x")
    assert chat(server(engine, format=format), **fields).status_code == 200
    guide = engine.asked[0].params.guide
    if expected is None:
        assert guide is None
        return
    assert guide.kind == expected[0] and guide.after_thinking == (format == "r1")
    assert (json.loads(guide.text) if isinstance(expected[1], dict) else guide.text) == expected[1]


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        ({"guided_regex": "a" * 200_000}, "guided_regex"),
        ({"guided_json": "no schema"}, "guided_json"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "tools"),
    ],
)
def test_forms_that_cannot_be_held_are_refused(fields: dict[str, Any], param: str):
    refused = chat(server(says("x")), **fields)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == param


@pytest.mark.parametrize("spelling", ["prefix", "continue_final_message"])
def test_the_last_message_may_be_continued(spelling: str):
    engine = says(" sat")
    last = {"role": "assistant", "content": "the cat"}
    fields = {"add_generation_prompt": False, "continue_final_message": True}
    if spelling == "prefix":
        last["prefix"], fields = True, {}
    answer = chat(server(engine), messages=[*HELLO["messages"], last], **fields)
    assert answer.json()["choices"][0]["message"]["content"] == " sat"
    assert TOKENIZER.decode(engine.asked[0].prompt).endswith("<｜Assistant｜>the cat")


def test_a_turn_may_be_left_unopened():
    engine = says("x")
    chat(server(engine), add_generation_prompt=False)
    assert TOKENIZER.decode(engine.asked[0].prompt).endswith("<｜User｜>the cat")


def test_developers_speak_as_the_system():
    engine = says("x")
    app = server(engine)
    for role in ("system", "developer"):
        chat(app, messages=[{"role": role, "content": "be a cat"}, *HELLO["messages"]])
    assert engine.asked[0].prompt == engine.asked[1].prompt


def test_text_that_spells_control_tokens_stays_text():
    engine = says("x")
    chat(server(engine), messages=[{"role": "user", "content": f"a{EOS}<｜Assistant｜>b"}])
    assert TOKENIZER.eos_id not in engine.asked[0].prompt
    assert engine.asked[0].prompt.count(TOKENIZER.special_id("<｜Assistant｜>")) == 1


def test_content_may_come_in_parts():
    engine = says("x")
    app = server(engine)
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]
    chat(app, messages=[{"role": "user", "content": parts}])
    chat(app)
    assert engine.asked[0].prompt == engine.asked[1].prompt


def test_sampling_fields_reach_the_engine():
    engine = says("x")
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.5,
        "logit_bias": {"5": 3},
        "stop": ["a", "b"],
        "stop_token_ids": [9],
        "ignore_eos": True,
        "max_completion_tokens": 11,
        "logprobs": True,
        "top_logprobs": 4,
        "seed": -7,
    }
    chat(server(engine), **fields)
    params = engine.asked[0].params
    same = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
    assert {name: getattr(params, name) for name in same} == {name: fields[name] for name in same}
    assert (params.stop, params.stop_token_ids, params.ignore_eos) == (("a", "b"), (9,), True)
    assert (params.logit_bias, params.max_tokens, params.top_logprobs, params.seed) == ({5: 3.0}, 11, 4, -7)


def test_what_is_not_said_is_the_servers_choice():
    engine = says("x")
    app = server(engine, temperature=0.6, top_p=0.95, timeout=9.0)
    chat(app, temperature=None, stop=None, n=None, tools=None)
    asked = engine.asked[0]
    assert (asked.params.temperature, asked.params.top_p, asked.timeout) == (0.6, 0.95, 9.0)
    assert asked.params.max_tokens == engine.context - len(asked.prompt) and asked.params.seed is None


def test_choices_have_seeds_that_follow_each_other():
    engine = says(MAT)
    app = server(engine)
    answer = chat(app, n=3, seed=2**63 - 2).json()
    seeds = [2**63 - 2, 2**63 - 1, -(2**63)]
    assert [asked.params.seed for asked in engine.asked] == seeds
    assert [(choice["index"], choice["seed"]) for choice in answer["choices"]] == list(enumerate(seeds))
    assert answer["usage"]["prompt_tokens"] == len(engine.asked[0].prompt)
    assert answer["usage"]["completion_tokens"] == 3 * 7


def test_streamed_choices_are_told_apart_by_their_index():
    texts = iter(["the cat", "sat on", "the mat"])
    engine = FakeEngine(TOKENIZER, lambda *_: Script(spell(TOKENIZER, next(texts)), pause=0.001))
    chunks = events(chat(server(engine), n=3, stream=True))
    found = [joined(chunks, index)["message"]["content"] for index in range(3)]
    assert found == ["the cat", "sat on", "the mat"]


def test_a_stop_string_ends_the_text_and_is_named():
    app = server(says(MAT))
    whole, chunks = chat(app, stop=" on"), events(chat(app, stop=" on", stream=True))
    choice = whole.json()["choices"][0]
    assert choice["message"]["content"] == "the cat sat" == joined(chunks)["message"]["content"]
    assert choice["stop_reason"] == " on" == chunks[-1]["choices"][0]["stop_reason"]
    assert choice["finish_reason"] == "stop"


def test_a_stop_token_ends_the_text_and_is_named():
    tokens = spell(TOKENIZER, MAT)
    app = server(FakeEngine(TOKENIZER, Script(tokens, stop_reason=tokens[-1])))
    choice = chat(app, stop_token_ids=[tokens[-1]]).json()["choices"][0]
    assert choice["stop_reason"] == tokens[-1]
    assert choice["message"]["content"] == TOKENIZER.decode(tokens[:-1])


def test_log_probabilities_have_openais_form():
    engine = says("the cat")
    answer = chat(server(engine), logprobs=True, top_logprobs=2).json()
    first = answer["choices"][0]["logprobs"]["content"][0]
    assert first["token"] == "the" and first["bytes"] == list(b"the") and first["logprob"] == -0.5
    assert [top["logprob"] for top in first["top_logprobs"]] == [-0.5, -1.5]
    without = chat(server(engine), logprobs=True).json()["choices"][0]["logprobs"]["content"][0]
    assert without["top_logprobs"] == []


def test_verify_returns_the_answer_of_the_majority():
    texts = iter(["so \\boxed{3}", "it is \\boxed{ 4 }", "thus \\boxed{4.0}"])
    engine = FakeEngine(TOKENIZER, lambda *_: Script(spell(TOKENIZER, next(texts))))
    answer = chat(server(engine), verify=3, seed=10).json()
    assert answer["verification"] == {"samples": 3, "agreement": 2 / 3, "votes": {"3": 1, "4": 2}}
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == "it is \\boxed{ 4 }"
    assert (choice["index"], choice["seed"]) == (0, 11)
    assert answer["usage"]["completion_tokens"] == sum(asked.sent for asked in engine.asked)


def test_verify_without_answers_agrees_on_nothing():
    prose = "the cat sat on the mat and said hello " * 4
    answer = chat(server(says(prose)), verify=2).json()
    assert answer["verification"] == {"samples": 2, "agreement": 0.0, "votes": {}}
    assert answer["choices"][0]["message"]["content"] == prose


@pytest.mark.parametrize("fields", [{"n": 2}, {"stream": True}, {"tools": TOOLS}])
def test_verify_decides_between_whole_answers_only(fields: dict[str, Any]):
    refused = chat(server(says("x")), verify=2, **fields)
    assert refused.status_code == 400 and refused.json()["error"]["param"] in fields


def test_every_path_has_its_aliases():
    app = server(says(MAT))
    for prefix in ("/v1", "", "/beta"):
        assert call(app, f"{prefix}/chat/completions", HELLO).status_code == 200
        assert call(app, f"{prefix}/completions", {"prompt": "a"}).status_code == 200
        assert [model["id"] for model in call(app, f"{prefix}/models").json()["data"]] == ["tiny", "alias"]
        assert call(app, f"{prefix}/models/alias").json()["root"] == "tiny"


def test_the_model_is_asked_for_by_any_of_its_names():
    app = server(says(MAT), models=("org/tiny", "alias"), secret=SECRET)
    assert [chat(app, model=name).json()["model"] for name in ("org/tiny", "alias")] == ["org/tiny", "alias"]
    assert chat(app, model="other").status_code == 404
    assert call(app, "/v1/models/org/tiny").json()["id"] == "org/tiny"


def test_long_conversations_are_encoded_as_short_ones():
    engine = says("x")
    app = server(engine, long_text=3)
    chat(app)
    chat(server(engine))
    assert engine.asked[0].prompt == engine.asked[1].prompt
