"""Guided decoding lets through what its guide allows and nothing else, whatever the guide asks for."""

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import TOKENIZER

from dsv3.core import encoding_kimi as kimi
from dsv3.core import special_tokens as family
from dsv3.core.encoding import encode_chat, stop_token
from dsv3.core.reply_events import ReplyParts
from dsv3.core.reply_splitter import MARKUP
from dsv3.core.reply_stream import ReplyStream
from dsv3.core.sampling_params import Guide
from dsv3.core.special_tokens import END_THINK, THINK
from dsv3.core.tokenizer import Tokenizer
from dsv3.errors import UserError
from dsv3.serving import guide_trial, guides
from dsv3.serving.guides import Guides, GuideState
from dsv3.serving.sampler import forbid

pytestmark = pytest.mark.slow

VOCABULARY = TOKENIZER.vocab_size + 13  # a model's embedding is padded
EOS = TOKENIZER.eos_id
OF_KIMI = {
    family.CALLS_BEGIN: kimi.SECTION_BEGIN.name,
    family.CALLS_END: kimi.SECTION_END.name,
    family.CALL_BEGIN: kimi.KIMI_CALL_BEGIN.name,
    family.CALL_END: kimi.KIMI_CALL_END.name,
    family.TOOL_SEP: kimi.ARGUMENT_BEGIN.name,
    family.EOT: kimi.IM_END.name,
}
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 1, "maxLength": 20},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "units": {"enum": ["metric", "imperial", None]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{2,5}$"}, "maxItems": 3},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER, TIME = ("get_weather", json.dumps(SCHEMA)), ("heure_à", "")
SECTION_ENDS = [markup.section_end for markup in MARKUP.values()]
CLOSERS = '"}]:0\n'


def of_kimi(folder: Path) -> Tokenizer:
    TOKENIZER.save(folder)
    document = (folder / "tokenizer.json").read_text(encoding="utf-8")
    for old, new in OF_KIMI.items():
        document = document.replace(old, new)
    return Tokenizer(document, {})


@pytest.fixture(scope="module")
def compiler() -> Iterator[Guides]:
    compiler = Guides(TOKENIZER, VOCABULARY, [EOS])
    yield compiler
    compiler.close()


@pytest.fixture(scope="module")
def start(compiler: Guides) -> Callable[[Guide], GuideState]:
    return lambda guide: compiler.compile(guide).result().start()


def new_mask(size: int = VOCABULARY) -> guides.Mask:
    return np.zeros(-(-size // 32), np.int32)


def allowed(state: GuideState, size: int = VOCABULARY) -> list[int]:
    mask = new_mask(size)
    state.fill(mask)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    assert state._thinking or state.error is not None or not bits[size:].any()
    return np.flatnonzero(bits[:size]).tolist()


def feed(state: GuideState, text: str, tokenizer: Tokenizer = TOKENIZER) -> None:
    for token in tokenizer.encode(text):
        assert token in allowed(state), tokenizer.decode([token])
        assert state.accept(token)


def walk(state: GuideState, tokenizer: Tokenizer, size: int, ends: set[int], seed: int, steps: int = 40) -> list[int]:
    """A random text that the guide lets through, and lets end; behind `steps` tokens it hurries to its end."""
    rng, tokens = np.random.default_rng(seed), list[int]()
    closers = [tokenizer.specials[name] for name in SECTION_ENDS if name in tokenizer.specials]
    closers += [tokenizer.encode(closer)[0] for closer in CLOSERS]
    for step in range(400):
        may = allowed(state, size)
        assert may and state.error is None
        if ends & set(may) and (step >= steps or len(ends & set(may)) == len(may)):
            return tokens
        pool = [token for token in may if token not in ends]
        if step >= steps:
            pool = [token for token in closers if token in pool][:1] or pool
        tokens.append(int(rng.choice(pool)))
        assert state.accept(tokens[-1])
    raise AssertionError(f"no end: {tokenizer.decode(tokens)!r}")


def fits(value: Any) -> bool:
    """Is it of SCHEMA? By hand, since no other reader of schemas should have to agree."""
    return (
        isinstance(value, dict)
        and {"city", "days"} <= value.keys() <= SCHEMA["properties"].keys()
        and 1 <= len(value["city"]) <= 20
        and type(value["days"]) is int
        and 1 <= value["days"] <= 14
        and value.get("units") in ("metric", "imperial", None)
        and len(value.get("tags", [])) <= 3
        and all(re.fullmatch("[a-z]{2,5}", tag) for tag in value.get("tags", []))
    )


TEXTS: dict[str, tuple[Guide, Callable[[str], bool]]] = {
    "json_object": (Guide("json_object"), lambda text: isinstance(json.loads(text), dict)),
    "json_schema": (Guide("json_schema", json.dumps(SCHEMA)), lambda text: fits(json.loads(text))),
    "any schema": (Guide("json_schema", "true"), lambda text: json.loads(text) is not Ellipsis),
    "regex": (
        Guide("regex", r"(\d{1,3}/[a-z]+\n){2,4}深?[^é]"),
        re.compile(r"(\d{1,3}/[a-z]+\n){2,4}深?[^é]").fullmatch,
    ),
    "grammar": (
        Guide("grammar", 'start: sum\nsum: N ("+" N)*  // & is a comment here\nN: /[0-9]+/ | "(~)" ~ 2'),
        re.compile(r"(\d+|\(~\)\(~\))(\+(\d+|\(~\)\(~\)))*").fullmatch,
    ),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_random_texts_are_what_the_guide_asks_for(start: Callable[[Guide], GuideState], kind: str):
    guide, right = TEXTS[kind]
    for seed in range(12):
        text = TOKENIZER.decode(walk(start(guide), TOKENIZER, VOCABULARY, {EOS}, seed))
        assert right(text), text


def read_calls(tokens: list[int], tokenizer: Tokenizer, format: str) -> ReplyParts:
    stream, parts = ReplyStream(tokenizer, format, tools=True), ReplyParts()
    for token in tokens:
        parts.add(stream.push(token))
    parts.add(stream.finish())
    return parts


@pytest.mark.parametrize("format", sorted(MARKUP))
def test_random_calls_are_read_back_whole(format: str, tmp_path: Path):
    tokenizer = of_kimi(tmp_path) if format == "kimi-k2" else TOKENIZER
    end = tokenizer.special_id(stop_token(format))
    compiler = Guides(tokenizer, VOCABULARY, [end])
    grammar = compiler.compile(Guide("tools", tools=(WEATHER, TIME), format=format)).result()
    names, counts = set(), set()
    for seed in range(12):
        parts = read_calls(walk(grammar.start(), tokenizer, VOCABULARY, {end}, seed, 60), tokenizer, format)
        assert parts.content == parts.reasoning == "" and parts.calls
        for call in parts.calls:
            assert call.complete
            assert (
                fits(json.loads(call.arguments))
                if call.name == WEATHER[0]
                else type(json.loads(call.arguments)) is dict
            )
        names |= {call.name for call in parts.calls}
        counts.add(len(parts.calls) > 1)
    assert names == {WEATHER[0], TIME[0]}
    assert counts == {True, False}
    compiler.close()


@pytest.mark.parametrize("format", ["v3", "r1", "v3.1"])
def test_the_published_form_of_calls_is_let_through(start: Callable[[Guide], GuideState], format: str):
    calls = [{"function": {"name": "get_weather", "arguments": '{"city": "Paris", "days": 3}'}}] * 2
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    ids = TOKENIZER.encode_segments(encode_chat(turns, format, add_generation_prompt=False))
    reply = ids[ids.index(TOKENIZER.special_id(family.CALLS_BEGIN)) :]
    state = start(Guide("tools", tools=(WEATHER,), format=format))
    assert reply[-1] == EOS
    for token in reply[:-1]:
        assert token in allowed(state), TOKENIZER.decode([token])
        assert state.accept(token)
    assert state.done and allowed(state) == [EOS]


def test_the_guide_is_done_where_nothing_may_follow(start: Callable[[Guide], GuideState]):
    state = start(Guide("regex", "ab?"))
    feed(state, "a")
    assert not state.done and EOS in allowed(state)
    feed(state, "b")
    assert state.done and allowed(state) == [EOS]
    assert state.accept(EOS) and state.accept(EOS) and state.error is None
    assert not state.accept(TOKENIZER.encode("b")[0])


def test_every_end_token_ends_a_text():
    compiler = Guides(TOKENIZER, VOCABULARY, [EOS, TOKENIZER.special_id(family.EOT)])
    state = compiler.compile(Guide("regex", "a")).result().start()
    feed(state, "a")
    assert allowed(state) == sorted([EOS, TOKENIZER.special_id(family.EOT)])
    compiler.close()


def test_control_tokens_and_padding_are_no_text(start: Callable[[Guide], GuideState]):
    state = start(Guide("regex", r"(?s).*"))
    assert not set(allowed(state)) & ({*TOKENIZER.specials.values()} - {EOS})
    assert max(allowed(state)) < TOKENIZER.vocab_size
    assert allowed(start(Guide("grammar", f'start: {THINK} "a"'))) == [TOKENIZER.special_id(THINK)]


@pytest.mark.parametrize("guide", [Guide("json_schema", '{"type": "string"}'), Guide("regex", '"[深😀]+"')])
def test_characters_may_be_torn_between_tokens(start: Callable[[Guide], GuideState], guide: Guide):
    of = {TOKENIZER.token_bytes(i): i for i in range(TOKENIZER.vocab_size)}
    state = start(guide)
    for byte in '"深😀"'.encode():
        assert of[bytes([byte])] in allowed(state)
        assert state.accept(of[bytes([byte])])
    assert state.done
    inside = start(guide)
    assert inside.accept(of[b'"']) and inside.accept(of[b"\xe6"])
    assert of[b'"'] not in allowed(inside)


def test_blanks_in_json_come_to_an_end(start: Callable[[Guide], GuideState]):
    for text in ('{"a": 1, "b": [1, 2]}', '{"a":1}', json.dumps({"a": {"b": [1, {}]}}, indent=4)):
        state = start(Guide("json_object"))
        feed(state, text)
        assert state.done
    state, blank = start(Guide("json_object")), TOKENIZER.encode(" ")
    feed(state, '{"a":')
    for _ in range(70):
        if not state.accept(blank[0]):
            return
    raise AssertionError("blanks without end")


# --- after a thought ---


def test_the_thought_is_free_and_line_breaks_may_follow_it(start: Callable[[Guide], GuideState]):
    guide = Guide("regex", "[0-9]+", after_thinking=True)
    state, line_break = start(guide), TOKENIZER.encode("\n")[0]
    mask = new_mask()
    for token in (
        *TOKENIZER.encode("hm, 1 {"),
        TOKENIZER.special_id(family.CALLS_BEGIN),
        TOKENIZER.special_id(END_THINK),
    ):
        state.fill(mask)
        assert (mask == -1).all() and not state.done
        assert state.accept(token)
    assert line_break in allowed(state)
    assert state.accept(line_break) and state.accept(line_break)
    assert line_break not in allowed(state)
    feed(state, "12")
    assert EOS in allowed(state) and line_break not in allowed(state)


def test_line_breaks_that_the_guide_asks_for_belong_to_it(start: Callable[[Guide], GuideState]):
    state = start(Guide("regex", "\na", after_thinking=True))
    assert state.accept(TOKENIZER.special_id(END_THINK))
    feed(state, "\n")
    assert allowed(state) == TOKENIZER.encode("a")


MARKERS = [THINK, END_THINK, family.CALLS_BEGIN, family.CALLS_END, family.USER]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([*MARKERS, "a", "\n", "{}", "</think>", "<"]), max_size=8))
def test_the_guide_begins_where_the_splitter_hears_the_answer_begin(pieces: list[str]):
    compiler = thinking_compiler()
    state = compiler.compile(Guide("regex", "(?s).*", after_thinking=True)).result().start()
    stream = ReplyStream(TOKENIZER, "r1", reasoning=True)
    for piece in pieces:
        marker = piece in TOKENIZER.specials and piece != "</think>"
        for token in [TOKENIZER.special_id(piece)] if marker else TOKENIZER.encode(piece):
            assert state._thinking == stream.reasoning
            if not state._thinking:
                return
            stream.push(token)
            assert state.accept(token)
    assert state._thinking == stream.reasoning


_THINKING: list[Guides] = []


def thinking_compiler() -> Guides:
    if not _THINKING:
        _THINKING.append(Guides(TOKENIZER, VOCABULARY, [EOS]))
    return _THINKING[0]


# --- drafts ---


@pytest.mark.parametrize("kind", ["json_object", "json_schema", "regex", "grammar"])
@pytest.mark.parametrize("thinking", [False, True])
def test_masks_along_a_draft_are_those_of_its_steps(start: Callable[[Guide], GuideState], kind: str, thinking: bool):
    guide = Guide(TEXTS[kind][0].kind, TEXTS[kind][0].text, after_thinking=thinking)
    head = [*TOKENIZER.encode("so"), TOKENIZER.special_id(END_THINK), *TOKENIZER.encode("\n")] if thinking else []
    for seed in range(4):
        plain = start(Guide(guide.kind, guide.text))
        tokens = [*head, *walk(plain, TOKENIZER, VOCABULARY, {EOS}, seed), EOS]
        state, steps = start(guide), start(guide)
        place = 0
        while place < len(tokens):
            draft = tokens[place : place + 5]
            masks = np.zeros((len(draft) + 1, len(new_mask())), np.int32)
            assert state.allowed_prefix(draft) == len(draft)
            state.fill_along(draft, masks)
            mask = new_mask()
            for row, token in enumerate(draft):
                steps.fill(mask)
                assert (masks[row] == mask).all()
                assert steps.accept(token)
                assert state.accept(token)
            place += len(draft)
        assert state.error is None


def test_a_draft_is_walked_up_to_its_first_wrong_token(start: Callable[[Guide], GuideState]):
    state = start(Guide("regex", "[0-9]{3}"))
    one, letter = TOKENIZER.encode("1")[0], TOKENIZER.encode("a")[0]
    masks = np.full((5, len(new_mask())), 7, np.int32)
    assert state.allowed_prefix([one, one, letter, one]) == 2
    state.fill_along([one, one, letter, one], masks)
    assert (masks[:3] != 7).any(1).all() and (masks[3:] == 7).all()
    assert state.error is None and not state.done
    feed(state, "123")
    assert state.done


def test_a_copy_goes_its_own_way(start: Callable[[Guide], GuideState]):
    state = start(Guide("regex", "ab|ac"))
    feed(state, "a")
    other = state.copy()
    feed(other, "b")
    assert other.done and not state.done
    feed(state, "c")
    assert state.done


# --- what goes wrong ---

WRONG = {
    "no JSON": Guide("json_schema", '{"type": '),
    "no object": Guide("json_schema", "[1]"),
    "no number": Guide("json_schema", '{"const": NaN}'),
    "unknown type": Guide("json_schema", '{"type": "secret-word"}'),
    "unknown keyword": Guide("json_schema", '{"type": "array", "uniqueItems": true}'),
    "contradiction": Guide("json_schema", '{"type": "string", "minLength": 3, "maxLength": 1}'),
    "elsewhere": Guide("json_schema", '{"$ref": "http://example.org/schema"}'),
    "half a character": Guide("regex", "\ud800"),
    "open group": Guide("regex", "(secret-word"),
    "backslash": Guide("regex", "secret-word\\"),
    "closes more": Guide("regex", "a)(b"),
    "look-around": Guide("regex", "(?=a)b"),
    "empty grammar": Guide("grammar", " "),
    "unknown rule": Guide("grammar", "start: other"),
    "unknown token": Guide("grammar", "start: <secret-word>"),
    "no Lark": Guide("grammar", "secret-word"),
    "circle": Guide("grammar", "start: a\na: b\nb: a"),
    "intersection": Guide("grammar", "start: A\nA: /a/ & /b/"),
    "complement": Guide("grammar", 'start: A\nA: ~"a"'),
    "hidden intersection": Guide("grammar", 'start: A\nA: /x"\n/ & /"y/'),
    "no tools": Guide("tools", format="v3"),
    "a format without tools": Guide("tools", tools=(WEATHER,), format="moonlight"),
    "another tokenizer's tools": Guide("tools", tools=(WEATHER,), format="kimi-k2"),
    "tool without a name": Guide("tools", tools=(("", "{}"),), format="v3"),
    "tool with a wrong schema": Guide("tools", tools=(WEATHER, ("other", '{"type": "secret-word"}')), format="v3"),
    "deep": Guide("json_schema", '{"items": ' * 200 + "{}" + "}" * 200),
    "very deep": Guide("json_schema", "[" * 100_000),
    "long": Guide("regex", "a" * 300_000),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_guide_is_refused_in_a_line(compiler: Guides, name: str):
    with pytest.raises(UserError) as error:
        compiler.compile(WRONG[name]).result()
    text = str(error.value)
    assert "\n" not in text and len(text) < 350
    if name not in ("unknown type", "unknown token", "tool with a wrong schema"):
        assert "secret-word" not in text
    if name == "tool with a wrong schema":
        assert "tool 1" in text


def chain(kind: str, length: int) -> Guide:
    return Guide(
        "grammar",
        f"start: {kind}0\n"
        + "".join(f'{kind}{i}: {kind}{i + 1} "x"\n' for i in range(length))
        + f'{kind}{length}: "a"',
    )


BOMBS = {
    "nested repetition": Guide("regex", "((a{100}){100}){100}"),
    "repetition of repetition": Guide("regex", "a" + "{2}" * 60),
    "parentheses": Guide("regex", "(" * 20_000 + "a" + ")" * 20_000),
    "later": Guide("regex", "x{30}((a{100}){100}){100}"),
    "rules that call rules": chain("a", 10_000),
    "terminals of terminals": chain("A", 10_000),
    "doubling": Guide("grammar", "start: A0\n" + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(40)) + 'A40: "a"'),
    "reference to reference": Guide(
        "json_schema",
        json.dumps(
            {"$ref": "#/$defs/0", "$defs": {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(5000)} | {"5000": {}}}
        ),
    ),
    "combinations": Guide(
        "json_schema",
        json.dumps({"allOf": [{"anyOf": [{"properties": {f"{i} {j}": {}}} for j in range(10)]} for i in range(8)]}),
    ),
    "patterns": Guide(
        "json_schema", json.dumps({"allOf": [{"type": "string", "pattern": f"(.*a.{{{i}}}b)*"} for i in range(5, 25)]})
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_while_the_caller_goes_on(compiler: Guides, name: str):
    begin = time.monotonic()
    future = compiler.compile(BOMBS[name])
    assert time.monotonic() - begin < 0.2
    with pytest.raises(UserError) as error:
        future.result(30)
    assert "\n" not in str(error.value) and len(str(error.value)) < 350


WEARING = Guide("regex", "(.*a.{20})*(.*b.{20})*(.*c.{20})")


def wear_out(state: GuideState) -> int:
    rng = np.random.default_rng(0)
    for steps in range(2000):
        allowed(state)
        if state.error is not None:
            return steps
        state.accept(TOKENIZER.encode(rng.choice(["a", "b", "c"]))[0])
    raise AssertionError("the lexer learned without end")


def small_lexers(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = guide_trial.LLParserLimits(max_lexer_states=6000, verbose_errors=False)
    monkeypatch.setattr(guide_trial, "limits", lambda: limits)


def test_a_lexer_that_gives_up_is_an_error_in_a_line(compiler: Guides, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiler, "_prove", lambda _: None)
    small_lexers(monkeypatch)
    grammar = compiler.compile(WEARING).result()
    state = grammar.start()
    steps = wear_out(state)
    assert steps > 0 and "\n" not in (state.error or "\n") and not state.done
    assert EOS not in allowed(state) and not state.accept(EOS)
    masks = np.zeros((2, len(new_mask())), np.int32)
    state.fill_along([EOS], masks)
    assert state.allowed_prefix([EOS]) == 0


def test_one_text_cannot_wear_out_the_lexer_of_others(compiler: Guides, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiler, "_prove", lambda _: None)
    small_lexers(monkeypatch)
    grammar = compiler.compile(WEARING).result()
    before, token = grammar.start(), TOKENIZER.encode("a")[0]
    assert before.accept(token)
    assert wear_out(grammar.start()) > 0
    assert grammar.worn
    for other in (before, grammar.start()):
        assert len(allowed(other)) > 100 and other.error is None
        assert other.accept(token) and other.error is None


def test_a_text_goes_on_where_another_wore_out_its_lexer_between_mask_and_token(
    compiler: Guides, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(compiler, "_prove", lambda _: None)
    small_lexers(monkeypatch)
    grammar = compiler.compile(WEARING).result()
    state, token = grammar.start(), TOKENIZER.encode("a")[0]
    assert token in allowed(state)
    other = state.copy()
    other._renewed = True  # it shall wear out this very lexer
    wear_out(other)
    for _ in range(30):
        assert state.accept(token)


def test_a_token_that_breaks_the_guide_is_refused_for_good(start: Callable[[Guide], GuideState]):
    state = start(Guide("regex", "[0-9]+"))
    assert not state.accept(TOKENIZER.encode("a")[0])
    assert "grammar" in state.error and "\n" not in state.error
    assert not state.accept(TOKENIZER.encode("1")[0]) and not state.done
    assert EOS not in allowed(state)


@pytest.mark.parametrize("token", [-1, VOCABULARY, VOCABULARY + 5, TOKENIZER.vocab_size])
def test_ids_that_are_no_tokens_are_refused(start: Callable[[Guide], GuideState], token: int):
    assert not start(Guide("regex", "(?s).*")).accept(token)


def test_a_thought_needs_a_token_that_ends_it(tmp_path: Path):
    document = (TOKENIZER.save(tmp_path), (tmp_path / "tokenizer.json").read_text(encoding="utf-8"))[1]
    compiler = Guides(Tokenizer(document.replace(END_THINK, "<else>"), {}), VOCABULARY, [EOS])
    with pytest.raises(UserError, match="ends a thought"):
        compiler.compile(Guide("json_object", after_thinking=True)).result()
    compiler.close()


def test_a_guide_is_compiled_once_as_long_as_it_is_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(guides, "KEPT", 2)
    compiler = Guides(TOKENIZER, VOCABULARY, [EOS])
    first, wrong = Guide("regex", "a"), Guide("regex", "(")
    grammar = compiler.compile(first).result()
    failed = compiler.compile(wrong)
    assert isinstance(failed.exception(), UserError)
    assert compiler.compile(first).result() is grammar and compiler.compile(wrong) is failed
    compiler.compile(Guide("regex", "b"))
    assert compiler.compile(first).result() is not grammar
    compiler.close()


# --- masks on logits ---


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200), st.lists(st.integers(0, 5), unique=True, max_size=6), st.integers(0, 9), st.booleans())
def test_masks_forbid_tokens_of_their_rows_alone(size: int, rows: list[int], seed: int, half: bool):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(6, size))).to(torch.bfloat16 if half else torch.float32)
    may = rng.random((len(rows), size)) < 0.5
    masks = np.zeros((len(rows), -(-size // 32) * 32), np.uint8)
    masks[:, :size] = may
    packed = np.packbits(masks, axis=1, bitorder="little").view(np.int32)
    expected = logits.clone()
    for row, bits in zip(rows, may, strict=True):
        expected[row, ~torch.from_numpy(bits)] = -torch.inf
    forbid(logits, torch.tensor(rows, dtype=torch.int64), torch.from_numpy(packed))
    assert torch.equal(logits, expected)


# --- the released vocabulary ---


@pytest.mark.slow
def test_the_released_vocabulary_is_guided_as_the_small_one(v3_data: Path):
    tokenizer, size = Tokenizer.load(v3_data), 129_280
    compiler = Guides(tokenizer, size, [tokenizer.eos_id])
    for kind, (guide, right) in TEXTS.items():
        grammar = compiler.compile(guide).result()
        for seed in range(4):
            text = tokenizer.decode(walk(grammar.start(), tokenizer, size, {tokenizer.eos_id}, seed))
            assert right(text), (kind, text)
    for format in ("v3", "r1", "v3.1"):
        grammar = compiler.compile(Guide("tools", tools=(WEATHER, TIME), format=format)).result()
        for seed in range(4):
            parts = read_calls(walk(grammar.start(), tokenizer, size, {tokenizer.eos_id}, seed, 60), tokenizer, format)
            assert parts.calls and all(call.complete and json.loads(call.arguments) is not None for call in parts.calls)
    compiler.close()
