"""Conversations are read from every common form, and a sample holds what a model is asked and what it must write."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import TOKENIZER

from dsv3.core.encoding import encode_chat, stop_token
from dsv3.core.tokenizer import Tokenizer
from dsv3.errors import UserError
from dsv3.training.chat_data import ChatRow, Example, encode_example, load_rows

quick = settings(max_examples=200, deadline=None)

KIMI = (
    "<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>", "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>", "<|tool_call_argument_begin|>",
)  # fmt: skip


def with_tokens(*names: str) -> Tokenizer:
    tree = json.loads(TOKENIZER._document)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tree["added_tokens"] += [{"id": TOKENIZER.vocab_size + i, "content": n, **flags} for i, n in enumerate(names)]
    return Tokenizer(json.dumps(tree), {})


BOTH = with_tokens(*KIMI)
USER, ASK = {"role": "user", "content": "2+2?"}, {"role": "user", "content": "and 3+3?"}
CALL = {"function": {"name": "add", "arguments": '{"a": 1}'}, "id": "functions.add:0"}
RESULT = {"role": "tool", "content": "7", "tool_call_id": "functions.add:0"}


def says(content: str, thought: str = "", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content} | ({"reasoning_content": thought} if thought else {}) | more


def encoded(messages: list[dict], format: str = "v3", tools: Any = (), thinking: bool = True) -> list[Example]:
    return encode_example(ChatRow(messages, list(tools)), BOTH, format, thinking)


def learnt(example: Example) -> list[str]:
    """What is to be learnt, run by run."""
    runs: list[list[int]] = []
    before = False
    for token, wanted in zip(*example, strict=True):
        if wanted:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
        before = wanted
    return [BOTH.decode(run) for run in runs]


def text(example: Example) -> str:
    return BOTH.decode(example.token_ids)


# --- reading ---


def rows_of(path: Path) -> list[ChatRow]:
    return list(load_rows(path))


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    records = [
        {"messages": [USER, says("4", "so 4")], "source": "a"},
        {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, RESULT, says("7")], "source": "b"},
    ]
    lines = "".join(json.dumps(record) + "\n\n" for record in records).encode()
    with pa.CompressedOutputStream(str(tmp_path / "c.jsonl.zst"), "zstd") as stream:
        stream.write(lines)
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    pa.parquet.write_table(pa.Table.from_pylist(records), tmp_path / "d.parquet")  # every message has every key
    (tmp_path / "notes.txt").write_text("no data")
    expected = [(record["messages"], {"source": record["source"]}) for record in records]
    assert [(row.messages, row.columns) for row in rows_of(tmp_path)] == expected * 4
    places = [row.where.removeprefix(f"{tmp_path}/") for row in rows_of(tmp_path)]
    assert places[:2] == ["a.jsonl, line 1", "a.jsonl, line 3"] and places[-1] == "d.parquet, row 1"


def test_sharegpt_and_prompts_with_completions_become_messages(tmp_path: Path) -> None:
    turns = [("human", "hi"), ("function_call", '{"name": "f", "arguments": {}}'), ("observation", "1"), ("gpt", "bye")]
    records = [
        {"system": "S", "conversations": [{"from": who, "value": value} for who, value in turns], "tools": "[]"},
        {"conversations": [USER, says("4")]},
        {"prompt": "2+2?", "completion": "4", "answer": 4},
        {"prompt": [{"role": "system", "content": "S"}, USER], "completion": [says("4")]},
        {"prompt": "2+2?", "messages": None},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = rows_of(tmp_path / "a.jsonl")
    assert [message["role"] for message in rows[0].messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert rows[0].messages[2]["tool_calls"][0]["function"]["name"] == "f"
    assert rows[1].messages == rows[2].messages == [USER, says("4")]
    assert rows[2].columns == {"answer": 4}
    assert rows[3].messages == [{"role": "system", "content": "S"}, USER, says("4")]
    assert rows[4].messages == [USER]
    assert rows[5].messages == [{"role": "user", "content": "ab"}]


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"messages": [{"role": "robot", "content": "x"}]}, "message 0 has the unknown role 'robot'"),
        ({"messages": [{"role": "user"}]}, "message 0 has no content"),
        ({"messages": "hi"}, "messages must be a list"),
        ({"messages": []}, "messages must be a non-empty list"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "turn 0 comes from 'alien', which is unknown"),
        ({"conversations": [{"from": "human"}]}, "turn 0 has no value"),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, "turn 0 is a function_call, but its value"),
        ({"text": "x"}, r"no column 'messages', 'conversations' or 'prompt' \(found: text\)"),
        ({"prompt": 3}, "prompt must be text or a list of messages, not int"),
        ({"messages": [USER], "tools": "{"}, "tools is text, but not JSON"),
        ([1], "is no object with columns but list"),
    ],
)
def test_what_is_no_conversation_is_named_with_its_line(tmp_path: Path, record: Any, complaint: str) -> None:
    good = json.dumps({"messages": [USER]})
    (tmp_path / "a.jsonl").write_text(f"{good}\n{json.dumps(record)}\n")
    with pytest.raises(UserError, match=rf"^{tmp_path}/a\.jsonl, line 2: .*{complaint}"):
        rows_of(tmp_path / "a.jsonl")


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        rows_of(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no files of conversations"):
        rows_of(tmp_path)
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(UserError, match="unknown format; give"):
        rows_of(tmp_path / "a.csv")


# --- samples ---

WORDS = st.text("ab <\n", max_size=6)
THOUGHTS = st.text("ab <", min_size=1, max_size=6)


@st.composite
def conversations(draw: Any) -> tuple[str, list[dict]]:
    format = draw(st.sampled_from(["v3", "r1", "v3.1", "moonlight", "kimi-k2"]))
    thoughts = THOUGHTS | st.just("") if format in ("r1", "v3.1") else st.just("")
    messages = [{"role": "system", "content": draw(WORDS)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [{"role": "user", "content": draw(WORDS)}, says(draw(WORDS), draw(thoughts))]
    return format, messages


@quick
@given(conversations())
def test_every_reply_is_learnt_once_behind_the_prompt_that_asks_for_it(case: tuple[str, list[dict]]) -> None:
    format, messages = case
    examples = encoded(messages, format)
    places: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        thinking = format == "v3.1" and "reasoning_content" in message
        prompt = BOTH.encode_segments(encode_chat(messages[:index], format, thinking=thinking))
        if format == "r1":
            reply = f"{message.get('reasoning_content', '')}\n</think>\n\n{message['content']}"
        else:
            reply = f"{message.get('reasoning_content')}</think>" * thinking + message["content"]
        reply += stop_token(format)
        found = []
        for number, (ids, mask) in enumerate(examples):
            begins = ids[: len(prompt)] == prompt and mask[len(prompt) - 1 : len(prompt)] == [False]
            end = next((i for i in range(len(prompt), len(mask)) if not mask[i]), len(mask))
            if begins and BOTH.decode(ids[len(prompt) : end]) == reply:
                found.append((number, len(prompt)))
        assert found, f"reply {index} is learnt behind its prompt"
        places += [place for place in found if place not in places][:1]
    assert len(places) == sum(len(learnt(example)) for example in examples), "and nothing else is"


def test_a_conversation_is_one_sample_where_the_template_goes_on_from_its_own_tokens() -> None:
    (example,) = encoded([USER, says("4"), ASK, says("6")])
    eos = "<｜end▁of▁sentence｜>"
    assert (
        text(example)
        == f"<｜begin▁of▁sentence｜><｜User｜>2+2?<｜Assistant｜>4{eos}<｜User｜>and 3+3?<｜Assistant｜>6{eos}"
    )
    assert learnt(example) == [f"4{eos}", f"6{eos}"]


def test_r1_forgets_earlier_thoughts_so_every_reply_is_a_sample() -> None:
    first, second = encoded([USER, says("4", "two twos"), ASK, says("6", "two threes")], "r1")
    assert text(first).endswith("<｜Assistant｜><think>\ntwo twos\n</think>\n\n4<｜end▁of▁sentence｜>")
    assert learnt(first) == ["two twos\n</think>\n\n4<｜end▁of▁sentence｜>"]
    assert "two twos" not in text(second) and "<｜Assistant｜>4<｜end▁of▁sentence｜><｜User｜>and" in text(second)
    assert learnt(second) == ["two threes\n</think>\n\n6<｜end▁of▁sentence｜>"]


def test_a_reply_without_a_thought_closes_the_thought_that_r1_opens() -> None:
    (example,) = encoded([USER, says("4")], "r1")
    assert text(example).endswith("<｜Assistant｜><think>\n\n</think>\n\n4<｜end▁of▁sentence｜>")


@pytest.mark.parametrize(
    "content", ["<think>\ntwo twos\n</think>\n\n4", "two twos\n</think>\n\n4", "<think>two twos</think>4"]
)
def test_thoughts_written_into_the_content_are_thoughts(content: str) -> None:
    assert encoded([USER, says(content)], "r1") == encoded([USER, says("4", "two twos")], "r1")
    assert encoded([USER, says(content)], "v3.1") == encoded([USER, says("4", "two twos")], "v3.1")
    assert encoded([USER, says(content, "two twos")], "r1") == encoded([USER, says("4", "two twos")], "r1")


@pytest.mark.parametrize(("format", "answer"), [("r1", "\n\n4"), ("v3.1", "4")])
def test_thoughts_can_be_left_out_of_the_loss(format: str, answer: str) -> None:
    (whole,), (answers,) = (encoded([USER, says("4", "two twos")], format, thinking=flag) for flag in (True, False))
    assert whole.token_ids == answers.token_ids
    assert learnt(answers) == [f"{answer}<｜end▁of▁sentence｜>"]


def test_calls_are_learnt_with_all_their_marks_whatever_the_template_shows_later() -> None:
    reply = says("let me see", tool_calls=[CALL])
    examples = encoded([USER, reply, RESULT, says("7"), ASK, reply, RESULT, says("8")], "v3")
    calls = [
        part
        for example in examples
        for part in learnt(example)
        if "add" in part
    ]  # fmt: skip
    assert len(calls) == 2 and calls[0] == calls[1]
    assert calls[0].startswith(
        "let me see<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json"
    )
    assert calls[0].endswith("<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>")
    answers = [part for example in examples for part in learnt(example) if "add" not in part]
    assert answers == ["7<｜end▁of▁sentence｜>", "8<｜end▁of▁sentence｜>"]


def test_tools_are_declared_and_answered_in_every_format_that_has_them() -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    messages = [USER, says("", tool_calls=[CALL]), RESULT, says("7")]
    for format in ("v3", "r1", "v3.1", "kimi-k2"):
        parts = [part for example in encoded(messages, format, [tool]) for part in learnt(example)]
        assert len(parts) == 2 and '{"a": 1}' in parts[0] and "7" in parts[1]
        assert all(part.endswith(stop_token(format)) for part in parts)
    assert "### add" in text(encoded(messages, "v3", [tool])[0])


def test_what_nobody_asked_for_and_what_weighs_nothing_is_shown_but_not_learnt() -> None:
    (example,) = encoded([says("hello"), USER, says("4", weight=0), ASK, says("6")])
    assert "hello" in text(example) and learnt(example) == ["6<｜end▁of▁sentence｜>"]
    assert encoded([USER, says("4", weight=0)]) == []
    (short,) = encoded([USER, says("4"), ASK, says("6", weight=0)])
    assert text(short).endswith("4<｜end▁of▁sentence｜>"), "what nothing is learnt from any more is cut off"
    assert encoded([USER]) == []


@pytest.mark.parametrize(
    ("messages", "format", "complaint"),
    [
        ([USER, says("4", "so")], "v3", "message 1 has a thought .* the chat format 'v3' cannot hold"),
        ([USER, says("<think>so</think>4")], "kimi-k2", "message 1 has a thought .* 'kimi-k2' cannot hold"),
        ([USER, says("<think>so 4")], "r1", "message 1: its thought begins with <think> and never ends"),
        ([USER, says("<think>a</think>b</think>c")], "r1", "message 1: it has more than one thought"),
        ([USER, says("<think>a</think>b", "other")], "r1", "message 1: it has more than one thought"),
        ([USER, says("", tool_calls=[CALL]), RESULT, says("7", "so")], "v3.1", "message 3 has a thought in a place"),
        ([USER, says("", tool_calls=[CALL])], "moonlight", "the chat format 'moonlight' has no tools"),
    ],
)
def test_what_a_format_cannot_hold_is_named_with_its_row(messages: list[dict], format: str, complaint: str) -> None:
    with pytest.raises(UserError, match=f"^a.jsonl, line 3: {complaint}"):
        encode_example(ChatRow(messages, where="a.jsonl, line 3"), BOTH, format)


def test_a_tokenizer_without_the_tags_is_refused() -> None:
    tree = json.loads(TOKENIZER._document)
    tree["added_tokens"] = [token for token in tree["added_tokens"] if "think" not in token["content"]]
    tree["model"]["vocab"] = {token: i for token, i in tree["model"]["vocab"].items() if "think>" not in token}
    with pytest.raises(UserError, match="the tokenizer has no token '<think>'"):
        encode_example(ChatRow([USER, says("4", "so")]), Tokenizer(json.dumps(tree), {}), "r1")
