"""Replies are told apart as their formats wrote them, however they are cut, and nothing that a model writes is lost."""

import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import TOKENIZER

from dsv3.core import encoding_kimi as kimi
from dsv3.core import special_tokens as family
from dsv3.core.encoding import FORMATS, encode_chat, stop_token
from dsv3.core.reply_events import (
    CallArguments,
    CallBegin,
    CallEnd,
    Content,
    Event,
    Reasoning,
    ReceivedCall,
    ReplyParts,
)
from dsv3.core.reply_splitter import MARKUP, ReplySplitter
from dsv3.core.reply_stream import ReplyStream, TextReplyStream, opens_reasoning
from dsv3.core.special_tokens import END_THINK, THINK, Segment, Special
from dsv3.core.text_stream import TextStream
from dsv3.core.tokenizer import Tokenizer

quick = settings(max_examples=100, deadline=None)
WITH_CALLS = sorted(MARKUP)
OF_KIMI = {
    family.CALLS_BEGIN: kimi.SECTION_BEGIN.name,
    family.CALLS_END: kimi.SECTION_END.name,
    family.CALL_BEGIN: kimi.KIMI_CALL_BEGIN.name,
    family.CALL_END: kimi.KIMI_CALL_END.name,
    family.TOOL_SEP: kimi.ARGUMENT_BEGIN.name,
    family.EOT: kimi.IM_END.name,
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """format -> a small tokenizer with its control tokens."""
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save(folder)
    document = (folder / "tokenizer.json").read_text(encoding="utf-8")
    for old, new in OF_KIMI.items():
        document = document.replace(old, new)
    of_kimi = Tokenizer(document, {})
    return {name: of_kimi if name in ("kimi-k2", "moonlight") else TOKENIZER for name in FORMATS}


def joined(events: list[Event]) -> list[Event]:
    """Events with neighbouring pieces of one text made one."""
    whole: list[Event] = []
    for event in events:
        last = whole[-1] if whole else None
        if isinstance(event, Reasoning | Content) and type(event) is type(last):
            whole[-1] = type(event)(last.text + event.text)
        elif isinstance(event, CallArguments) and isinstance(last, CallArguments):
            whole[-1] = CallArguments(event.index, last.text + event.text)
        else:
            whole.append(event)
    return whole


def split(segments: list[Segment], format: str, reasoning: bool = False, tools: bool = True) -> list[Event]:
    splitter = ReplySplitter(format, reasoning, tools)
    return joined([event for segment in segments for event in splitter.feed(segment)] + splitter.finish())


def split_text(pieces: list[str], format: str, reasoning: bool = False, tools: bool = True) -> list[Event]:
    stream = TextReplyStream(format, reasoning, tools)
    return joined([event for piece in pieces for event in stream.push(piece)] + stream.finish())


def split_tokens(tokens: list[int], stream: ReplyStream) -> list[Event]:
    return joined([event for token in tokens for event in stream.push(token)] + stream.finish())


def parts(events: list[Event]) -> ReplyParts:
    whole = ReplyParts()
    whole.add(events)
    return whole


def text_parts(text: str, format: str, reasoning: bool = False, tools: bool = True) -> ReplyParts:
    return parts(split_text(list(text), format, reasoning, tools))


def cut(text: str, seed: int, most: int) -> list[str]:
    chance, pieces = random.Random(seed), []
    while text:
        size = chance.randint(1, most)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


# --- what a reply may be: in order, and in no order at all ---

ALL_MARKERS = sorted({THINK, END_THINK} | {marker for markup in MARKUP.values() for marker in markup.markers})
WORDS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        [*ALL_MARKERS, "\n", "\n\n", " ", "```", "\n```", "```json\n{}\n```", "深度 😀", "<", "<｜tool", "x\n`"]
    ),
)
TEXTS = st.lists(WORDS, max_size=4).map("".join)
NAMES = st.text(st.characters(exclude_categories=["Z", "C"]), min_size=1, max_size=8)
PIECES = st.one_of(
    WORDS,
    st.sampled_from(
        ["function", "f", "\n```json\n", "\n```json\n{}", "```", "functions.f:0", '{"a": 1}', "\n", "\n\n"]
    ),
)


def disorder(format: str) -> st.SearchStrategy[list[Segment]]:
    """Markers of a format and texts in any order."""
    markers = st.sampled_from([THINK, END_THINK, *(MARKUP[format].markers if format in MARKUP else ())]).map(Special)
    return st.lists(markers | PIECES, max_size=14)


def reply_to(format: str, message: dict, reasoning: str | None) -> list[Segment]:
    """The reply that, in this format, says `message` (behind `reasoning`), without its end token."""
    user = {"role": "user", "content": "?"}
    whole = encode_chat([user, message], format, add_generation_prompt=False)
    last_turn = max(i for i, s in enumerate(whole) if s in (Special(family.ASSISTANT), kimi.IM_MIDDLE))
    turn = whole[last_turn + (2 if format == "v3.1" else 1) : -1]
    if reasoning is None:
        return turn
    return [reasoning, Special(END_THINK), *(["\n\n"] if format == "r1" else []), *turn]


@quick
@given(data=st.data(), format=st.sampled_from(FORMATS), thinks=st.booleans(), opened=st.booleans())
def test_what_a_format_writes_is_read_back(data: st.DataObject, format: str, thinks: bool, opened: bool) -> None:
    content = data.draw(TEXTS)
    calls = data.draw(st.lists(st.tuples(NAMES, TEXTS), max_size=3)) if format in MARKUP else []
    message = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = [{"function": {"name": name, "arguments": text}} for name, text in calls]
    else:  # of a plain message, encode_chat repeats only what follows the end of a thought
        message["content"] = content = content.replace(END_THINK, "")
    reasoning = data.draw(TEXTS) if thinks else None
    segments = reply_to(format, message, reasoning)
    if thinks and not opened:
        segments = [Special(THINK), *segments]
    read = parts(split(segments, format, reasoning=thinks and opened))
    assert read.reasoning == (reasoning or "").lstrip("\n")
    assert read.content == (content.lstrip("\n") if thinks else content)
    assert [(call.name, call.arguments, call.complete) for call in read.calls] == [(*call, True) for call in calls]
    if format == "kimi-k2":
        assert [call.id for call in read.calls] == [f"functions.{name}:{i}" for i, (name, _) in enumerate(calls)]


def test_a_second_section_of_v3_has_no_marker_and_its_line_break_is_no_content() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    messages = [{"role": "user", "content": "?"}, call, {"role": "tool", "content": "1"}]
    before = encode_chat(messages, "v3", add_generation_prompt=False)
    whole = encode_chat([*messages, call], "v3", add_generation_prompt=False)
    assert before[-1] == Special(family.OUTPUTS_END)
    read = parts(split(whole[len(before) - 1 : -1], "v3"))
    assert read == ReplyParts("", "", [ReceivedCall("f", None, "{}", True)])


# --- cuts ---


@quick
@given(
    st.data(),
    st.sampled_from(FORMATS),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
    st.sampled_from([1, 2, 4, 30]),
)
def test_events_do_not_depend_on_how_text_is_cut(
    data: st.DataObject, format: str, reasoning: bool, tools: bool, seed: int, most: int
) -> None:
    text = family.render(data.draw(disorder(format)))
    options = (format, reasoning, tools)
    whole = split_text([text], *options)
    assert split_text(cut(text, seed, most), *options) == whole == split_text(list(text), *options)
    markers = ReplySplitter(*options).markers
    pieces = re.split("(" + "|".join(map(re.escape, markers)) + ")", text)
    assert whole == split([Special(p) if i % 2 else p for i, p in enumerate(pieces)], *options)


@quick
@given(st.data(), st.sampled_from(FORMATS), st.booleans(), st.booleans())
def test_events_of_tokens_are_those_of_the_segments(
    tokenizers: dict[str, Tokenizer], data: st.DataObject, format: str, reasoning: bool, tools: bool
) -> None:
    segments = data.draw(disorder(format))
    tokenizer = tokenizers[format]
    tokens = [*tokenizer.encode_segments(segments), tokenizer.special_id(stop_token(format))]
    stream = ReplyStream(tokenizer, format, reasoning, tools)
    assert split_tokens(tokens, stream) == split(segments, format, reasoning, tools)


@given(st.sampled_from(WITH_CALLS), TEXTS, st.integers(0, 200))
@quick
def test_a_reply_that_breaks_off_has_given_a_part_of_the_arguments_and_never_a_fence(
    format: str, arguments: str, length: int
) -> None:
    message = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    whole = reply_to(format, message, None)
    units = [unit for segment in whole for unit in ([segment] if isinstance(segment, Special) else segment)]
    read = parts(split(units[:length], format))
    ended = Special(MARKUP[format].call_end) in units[:length]
    assert not ended or read.calls[0].arguments == arguments
    for call in read.calls:
        assert arguments.startswith(call.arguments) and call.complete == ended


# --- malformed replies ---


def lead_characters(segments: list[Segment], format: str) -> str:
    """What stands where V3 has the word "function"; it is markup, whatever it says."""
    markup, found, inside = MARKUP[format], "", False
    for segment in segments:
        if isinstance(segment, Special):
            inside = segment.name == markup.call_begin or (
                inside and segment.name not in (markup.separator, markup.call_end, markup.section_end)
            )
        elif inside and markup.lead:
            found += segment
    return found


@quick
@given(st.data(), st.sampled_from(WITH_CALLS), st.booleans(), st.booleans())
def test_no_character_is_lost_or_doubled_whatever_the_order(
    data: st.DataObject, format: str, reasoning: bool, tools: bool
) -> None:
    segments = data.draw(disorder(format))
    numbered, code = list[Segment](), 0x4E00
    for segment in segments:  # every other text gets characters that occur once
        numbered.append(segment)
        if isinstance(segment, str):
            numbered[-1] = segment + chr(code)
            code += 1
    events = split(numbered, format, reasoning, tools)
    shown = "".join(
        (event.id or event.name) if isinstance(event, CallBegin) else getattr(event, "text", "") for event in events
    )
    may_be_lost = lead_characters(numbered, format) if tools else ""
    for character in map(chr, range(0x4E00, code)):
        assert shown.count(character) == 1 or (character in may_be_lost and shown.count(character) == 0)
    begun = [event.index for event in events if isinstance(event, CallBegin)]
    assert begun == [event.index for event in events if isinstance(event, CallEnd)] == list(range(len(begun)))


CB, CE, SEP, B, E = family.CALL_BEGIN, family.CALL_END, family.TOOL_SEP, family.CALLS_BEGIN, family.CALLS_END


@pytest.mark.parametrize(
    ("text", "format", "content", "calls"),
    [
        (f"{B}{CB}function{SEP}f\n```json\n{{}}\n```{CE}", "v3", "", [("f", "{}", True)]),  # no end of the section
        (f"{CB}f{SEP}{{}}{CE}after", "v3.1", "after", [("f", "{}", True)]),  # no section at all
        (f'{B}{CB}f{SEP}{{"a', "v3.1", "", [("f", '{"a', False)]),
        (f"{B}{CB}f{SEP}{{}}{CB}g{SEP}1{CE}{E}", "v3.1", "", [("f", "{}", False), ("g", "1", True)]),
        (f"{B}{CB} f {SEP}{{}}{E}", "v3.1", "", [("f", "{}", False)]),
        (f"{B}{CB}f\n{{}}{CE}{E}", "v3.1", "", [("f", "\n{}", False)]),  # no separator
        (f"{B}{CB}function{SEP}f\n{{}}\n```{CE}{E}", "v3", "", [("f", "\n{}", True)]),  # no opening of the arguments
        (f"{B}{CB}f{SEP}{{}}{CE}{E}", "v3", "", [("f", "{}", False)]),  # as V3.1 writes it
        (f"{B}{CB}f{SEP}\n```json\n{{}}\n```{CE}{E}", "v3", "", [("f", "{}", True)]),  # without "function"
        (f"{B}{CB}function{SEP}f\n```json\n{{}}{CE}{E}", "v3", "", [("f", "{}", True)]),  # no closing
        (f"{B}{CB}function{SEP}f", "v3", "", [("f", "", False)]),
        (f"a{B}\n b {CB}f{SEP}{{}}{CE}\n{E}\n", "v3.1", "a\n b", [("f", "{}", True)]),  # words between calls
        (f"a{B}{CB}", "v3", "a", []),
        (f"{SEP}a{CE}{E}", "v3", f"{SEP}a{CE}{E}", []),
    ],
)
def test_what_is_made_of_malformed_calls(text: str, format: str, content: str, calls: list) -> None:
    read = text_parts(text, format)
    assert (read.content, [(c.name, c.arguments, c.complete) for c in read.calls]) == (content, calls)


# --- thinking ---


@pytest.mark.parametrize(
    ("text", "format", "opened", "reasoning", "content"),
    [
        ("so\n</think>\n\nyes", "r1", True, "so\n", "yes"),
        ("<think>\nso\n</think>\n\nyes", "r1", True, "so\n", "yes"),  # of R1-0528, which opens it once more
        ("<think>so</think>yes", "v3", False, "so", "yes"),
        ("\n<think>so</think>yes", "v3.1", False, "so", "yes"),
        ("so", "v3.1", True, "so", ""),
        ("</think>yes", "v3.1", True, "", "yes"),
        ("\nyes", "v3.1", False, "", "\nyes"),
        ("yes <think>so</think>", "v3", False, "", "yes <think>so</think>"),
        ("a<think>b</think>c</think>d", "r1", True, "a<think>b", "c</think>d"),
        (f"a{B}{CB}b</think>c", "r1", True, f"a{B}{CB}b", "c"),  # calls are made after thinking
        (" \n", "v3", False, "", " \n"),
        ("", "r1", True, "", ""),
    ],
)
def test_reasoning_and_content(text: str, format: str, opened: bool, reasoning: str, content: str) -> None:
    assert text_parts(text, format, opened) == ReplyParts(reasoning, content)


def test_a_prompt_tells_whether_its_reply_begins_inside_a_thought() -> None:
    user, call = {"role": "user", "content": THINK}, [{"function": {"name": "f", "arguments": "{}"}}]
    results = [user, {"role": "assistant", "content": "", "tool_calls": call}, {"role": "tool", "content": "1"}]
    thought = {"role": "assistant", "content": "", "reasoning_content": "hm", "prefix": True}
    cases = [
        ([user], "v3", False, False),
        ([user], "r1", False, True),
        ([user], "v3.1", False, False),
        ([user], "v3.1", True, True),
        (results, "r1", False, False),
        (results, "v3.1", True, False),
        ([user, thought], "r1", False, True),
        ([user, thought | {"content": "so"}], "r1", False, False),
    ]
    for messages, format, thinking, opened in cases:
        prompt = TOKENIZER.encode_segments(encode_chat(messages, format, thinking=thinking))
        assert opens_reasoning(TOKENIZER, prompt) == opened, (messages, format, thinking)


def test_the_next_token_belongs_to_the_thought_until_its_end_and_is_counted() -> None:
    thought = TOKENIZER.encode("the </think> cat\n")
    end, answer = TOKENIZER.special_id(END_THINK), TOKENIZER.encode("\n\nsat")
    opening = TOKENIZER.special_id(THINK)
    for start, opened in (([], True), ([opening], True), ([opening], False)):
        stream = ReplyStream(TOKENIZER, "r1", reasoning=opened)
        told = []
        for token in [*start, *thought, end, *answer]:
            told.append(stream.reasoning)
            stream.push(token)
        inside = len(start) + len(thought)
        assert told == [opened or i > 0 for i in range(inside + 1)] + [False] * len(answer)
        assert stream.reasoning_tokens == len(thought)


# --- tools, text that spells markers, stop strings ---


@pytest.mark.parametrize("format", WITH_CALLS)
def test_markup_shows_as_text_where_no_tools_are_offered(format: str, tokenizers: dict[str, Tokenizer]) -> None:
    message = {"role": "assistant", "content": "so", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    segments = reply_to(format, message, None)
    stream = ReplyStream(tokenizers[format], format)
    assert split_tokens(tokenizers[format].encode_segments(segments), stream) == [Content(family.render(segments))]
    assert text_parts(family.render(segments), format, tools=False).content == family.render(segments)


@pytest.mark.parametrize("format", WITH_CALLS)
def test_text_that_spells_markers_stays_text(format: str, tokenizers: dict[str, Tokenizer]) -> None:
    spelled = "".join(["x", THINK, *MARKUP[format].markers, END_THINK])
    arguments = f'{{"a": "{spelled}"}}'
    message = {
        "role": "assistant",
        "content": spelled,
        "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
    }
    segments = [Special(THINK), *reply_to(format, message, spelled)]
    stream = ReplyStream(tokenizers[format], format, tools=True)
    read = parts(split_tokens(tokenizers[format].encode_segments(segments), stream))
    assert (read.reasoning, read.content) == (spelled, spelled)
    assert [(call.name, call.arguments, call.complete) for call in read.calls] == [("f", arguments, True)]


@quick
@given(text=TEXTS, stop=st.lists(st.text("ab\n😀<", min_size=1, max_size=3), max_size=2), more=st.text("ab\n😀<"))
def test_stop_strings_hold_and_end_the_text_as_in_any_other_text(text: str, stop: list[str], more: str) -> None:
    tokens = TOKENIZER.encode(text + more)
    stream, plain = ReplyStream(TOKENIZER, "v3", tools=True, stop=stop), TextStream(TOKENIZER, stop)
    for token in tokens:
        plain.push(token)
    plain.finish()
    assert parts(split_tokens(tokens, stream)).content == plain.text


def test_nothing_follows_a_stop_string_not_even_a_call() -> None:
    call = {"role": "assistant", "content": "a END b", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    tokens = TOKENIZER.encode_segments([Special(THINK), *reply_to("r1", call, "hm")])
    stream = ReplyStream(TOKENIZER, "r1", tools=True, stop=["END"])
    assert split_tokens(tokens, stream) == [Reasoning("hm"), Content("a ")]
    stream = ReplyStream(TOKENIZER, "r1", tools=True, stop=["hm"])
    assert split_tokens(tokens, stream) == []


def test_calls_come_as_they_are_written() -> None:
    stream = TextReplyStream("v3", tools=True)
    heard = [stream.push(text) for text in (f"{B}{CB}function{SEP}", "f\n```", "json\n", '{"a"', ": 1}\n", "```", CE)]
    assert heard == [
        [],
        [],
        [CallBegin(0, "f")],
        [CallArguments(0, '{"a"')],
        [CallArguments(0, ": 1}")],
        [],
        [CallEnd(0, True)],
    ]
