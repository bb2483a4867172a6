"""POST /v1/completions, /tokenize and /detokenize."""

from typing import Any

import pytest
from api_calls import call, chat, complete, events, says, server
from fake_engine import FakeEngine, Script, logprob, spell
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import TOKENIZER

from dsv3.core.special_tokens import ASSISTANT, BOS, FIM_BEGIN, FIM_END, FIM_HOLE

CAT, MAT = TOKENIZER.encode("the cat"), " sat on the mat, héllo 😀"


def test_a_text_goes_on_behind_the_begin_token():
    engine = says(MAT)
    answer = complete(server(engine)).json()
    assert engine.asked[0].prompt == [TOKENIZER.bos_id, *CAT]
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
    seed = answer["choices"][0].pop("seed")
    assert answer["choices"] == [
        {"index": 0, "text": MAT, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]
    assert seed == 1001 and answer["usage"]["prompt_tokens"] == 1 + len(CAT)


@pytest.mark.parametrize(
    "prompt, expected",
    [
        (CAT, [CAT]),
        ([CAT, CAT[:1]], [CAT, CAT[:1]]),
        (["the cat", ""], [[TOKENIZER.bos_id, *CAT], [TOKENIZER.bos_id]]),
        ([5], [[5]]),
    ],
)
def test_prompts_come_as_texts_or_token_ids_one_or_many(prompt: Any, expected: list[list[int]]):
    engine = says(MAT)
    answer = complete(server(engine), prompt, n=2).json()
    assert [asked.prompt for asked in engine.asked] == [ids for ids in expected for _ in range(2)]
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(expected)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))


def test_the_begin_token_may_be_left_out():
    engine = says(MAT)
    complete(server(engine), add_special_tokens=False)
    assert engine.asked[0].prompt == CAT


def test_control_tokens_are_read_from_a_prompt_only_if_asked():
    engine = says(MAT)
    app = server(engine)
    for parse in (False, True):
        complete(app, f"a{ASSISTANT}", parse_special=parse)
    assert [TOKENIZER.special_id(ASSISTANT) in asked.prompt for asked in engine.asked] == [False, True]


def test_a_suffix_asks_for_what_stands_between():
    engine = says(MAT)
    complete(server(engine), "the", suffix="mat")
    prompt, suffix = TOKENIZER.encode("the"), TOKENIZER.encode("mat")
    begin, hole, end = map(TOKENIZER.special_id, (FIM_BEGIN, FIM_HOLE, FIM_END))
    assert engine.asked[0].prompt == [TOKENIZER.bos_id, begin, *prompt, hole, *suffix, end]


@pytest.mark.parametrize("fields", [{"prompt": ["a", "b"]}, {"prompt": CAT}, {"echo": True}])
def test_a_suffix_goes_with_one_text(fields: dict[str, Any]):
    refused = call(server(says(MAT)), "/v1/completions", {"prompt": "a", "suffix": "b"} | fields)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "suffix"


@pytest.mark.parametrize("prompt", [["a", 1], [1, [2]], ["a", [2]]])
def test_kinds_of_prompts_are_not_mixed(prompt: Any):
    refused = complete(server(says(MAT)), prompt)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "prompt"


def test_one_request_has_a_bounded_number_of_texts():
    app = server(says("x"), max_prompts=4)
    assert complete(app, ["a"] * 4).status_code == 200
    assert complete(app, ["a"] * 5).json()["error"]["param"] == "prompt"
    assert complete(app, ["a"] * 2, n=3).json()["error"]["param"] == "n"


def test_what_a_harness_needs_for_likelihoods():
    """Token ids in, one token out, the prompt's log-probabilities and the likeliest tokens with it."""
    prompt = [TOKENIZER.bos_id, *CAT]
    answer = complete(server(says(MAT)), [prompt, CAT], echo=True, logprobs=1, max_tokens=1, seed=1).json()
    first, second = answer["choices"]
    assert first["text"].startswith("the cat") and first["finish_reason"] == "length"
    assert first["logprobs"]["token_logprobs"] == [None, *map(logprob, CAT), first["logprobs"]["token_logprobs"][-1]]
    assert first["logprobs"]["top_logprobs"][0] is None
    values = zip(first["logprobs"]["token_logprobs"], first["logprobs"]["top_logprobs"], strict=True)
    assert all(max(top.values()) == value for value, top in list(values)[1:])
    assert len(second["logprobs"]["tokens"]) == len(CAT) + 1


def test_offsets_say_where_each_token_begins_in_the_text():
    choice = complete(server(says(MAT)), echo=True, logprobs=2).json()["choices"][0]
    offsets, tokens = choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"]
    assert tokens[0] == BOS and offsets[:2] == [0, 0]
    for offset, token in list(zip(offsets, tokens, strict=True))[1:-1]:
        assert token.startswith("bytes:") or choice["text"][offset:].startswith(token)
    assert len({len(tokens), len(offsets), len(choice["logprobs"]["token_logprobs"])}) == 1


def test_parts_of_characters_are_told_apart():
    choice = complete(server(says("😀")), logprobs=3).json()["choices"][0]
    assert choice["text"] == "😀"
    assert "bytes:\\xf0" in choice["logprobs"]["tokens"][0]
    assert len(set(choice["logprobs"]["tokens"])) == len(choice["logprobs"]["tokens"])


@given(
    cut=st.integers(1, 9),
    echo=st.booleans(),
    logprobs=st.sampled_from([None, 0, 3]),
    stop=st.sampled_from([None, ["on", "the"], "mat"]),
    limit=st.sampled_from([1, 4, 60]),
    many=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_a_stream_adds_up_to_the_whole_however_it_is_cut(cut, echo, logprobs, stop, limit, many):
    fields = {"echo": echo, "logprobs": logprobs, "stop": stop, "max_tokens": limit, "seed": 3}
    prompt = ["the cat", "a"] if many else "the cat"
    whole = complete(server(says(MAT)), prompt, **fields).json()
    options = {"include_usage": True}
    chunks = events(complete(server(says(MAT, cut=cut)), prompt, **fields, stream=True, stream_options=options))
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    for expected in whole["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == expected["index"]]
        assert "".join(part["text"] for part in parts) == expected["text"]
        assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert {name: parts[-1][name] for name in ("finish_reason", "stop_reason", "seed")} == {
            name: expected[name] for name in ("finish_reason", "stop_reason", "seed")
        }
        counted = [part["logprobs"] for part in parts if part["logprobs"] is not None]
        if expected["logprobs"] is None:
            assert not counted
        else:
            for name, values in expected["logprobs"].items():
                assert [value for part in counted for value in part[name]] == values


def test_forms_hold_for_plain_texts_too():
    engine = says("ab")
    complete(server(engine), guided_regex="[ab]+")
    assert (engine.asked[0].params.guide.kind, engine.asked[0].params.guide.after_thinking) == ("regex", False)


def test_a_model_without_a_chat_format_completes_texts():
    app = server(says(MAT), format=None)
    assert complete(app).json()["choices"][0]["text"] == MAT
    assert chat(app).status_code == 400


def test_infinite_surprise_is_a_number_that_json_has():
    class Certain(FakeEngine):
        async def stream(self, *args: Any, **named: Any) -> Any:
            async for output in super().stream(*args, **named):
                output.logprobs = [float("-inf")] * len(output.tokens)
                yield output

    engine = Certain(TOKENIZER, Script(spell(TOKENIZER, "a")))
    assert complete(server(engine), logprobs=0).json()["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0] * 2


def test_texts_and_chats_are_turned_into_tokens_and_back():
    app = server(says("x"))
    answer = call(app, "/tokenize", {"prompt": "the cat", "add_special_tokens": False}).json()
    assert answer == {"count": len(CAT), "max_model_len": 1024, "tokens": CAT}
    assert call(app, "/detokenize", {"tokens": CAT}).json() == {"prompt": "the cat"}
    messages = [{"role": "user", "content": "the cat"}]
    ids = call(app, "/tokenize", {"messages": messages}).json()["tokens"]
    assert TOKENIZER.decode(ids).endswith(ASSISTANT)
    assert call(app, "/detokenize", {"tokens": [TOKENIZER.vocab_size]}).status_code == 400
    assert call(app, "/tokenize", {"prompt": "a", "messages": messages}).status_code == 400
    assert call(app, "/tokenize", {}).status_code == 400
