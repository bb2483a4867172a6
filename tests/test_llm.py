"""`dsv3.LLM`: texts, chats, votes, guides, sleep, new weights, and that nothing is left behind when it is closed."""

import json
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parity import random_model
from tiny_model import CONFIG, GREEDY, TOKENIZER, load, save

import dsv3
from dsv3 import Guide, SamplingParams, UserError
from dsv3.backends.cpu import native
from dsv3.core import special_tokens as family
from dsv3.core.encoding import encode_chat
from dsv3.core.generate import Completion, SimpleRollout
from dsv3.core.mla import MLA
from dsv3.serving.llm import LLM, Generated

HELLO = [{"role": "user", "content": "the cat"}]
LONG = "the cat sat on the mat and said " * 9
FREE = SamplingParams(temperature=1.0, max_tokens=8, seed=3)
CALL = [
    {
        "type": "function",
        "function": {"name": "look", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
    }
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same random weights with chat formats v3 and r1."""
    place = tmp_path_factory.mktemp("models")
    return {name: save(place / name, name) for name in ("v3", "r1")}


@pytest.fixture
def llm(folders: dict[str, Path]):
    with LLM(folders["v3"], "cpu") as made:
        yield made


def texts(made: list[Generated]) -> list[str]:
    return [one.text for one in made]


# --- texts ---


def test_the_package_offers_it():
    assert dsv3.LLM is LLM


def test_texts_begin_a_document_and_ids_are_taken_as_they_are(llm, folders):
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode("the cat")]
    one, two = llm.generate(["the cat"], GREEDY)[0], llm.generate([ids], GREEDY)[0]
    assert one.completion.prompt_ids == ids and one.token_ids == two.token_ids
    assert one.token_ids == load(folders["v3"]).generate([ids], GREEDY)[0].token_ids
    assert one.text == TOKENIZER.decode(one.token_ids, skip_special=True)
    assert texts(llm.generate("the cat", GREEDY)) == [one.text]


def test_every_prompt_may_have_parameters_of_its_own(llm):
    params = [replace(FREE, max_tokens=count, seed=count) for count in (2, 5, 9)]
    together = llm.generate(["the cat", "1 + 1", "a cat"], params)
    assert [len(one.token_ids) for one in together] == [2, 5, 9]
    assert [one.completion.seed for one in together] == [2, 5, 9]
    for prompt, chosen, one in zip(("the cat", "1 + 1", "a cat"), params, together, strict=True):
        assert llm.generate(prompt, chosen)[0].text == one.text
    with pytest.raises(UserError, match="2 prompts with parameters for 1"):
        llm.generate(["a", "b"], [FREE])


def test_a_stop_string_ends_the_text_and_is_not_part_of_it(llm):
    whole = llm.generate("the cat", replace(FREE, max_tokens=30, ignore_eos=True))[0].text
    stop = whole[4:6]
    cut = llm.generate("the cat", replace(FREE, max_tokens=30, ignore_eos=True, stop=(stop,)))[0]
    assert cut.text == whole.partition(stop)[0] and cut.finish_reason == "stop"


def test_tokens_are_told_as_they_come(llm):
    told: list[tuple[int, int]] = []
    made = llm.generate(["the cat", "1"], FREE, on_token=lambda token: told.append((token.index, token.token_id)))
    for index, one in enumerate(made):
        assert [token for place, token in told if place == index] == one.token_ids


def test_drafts_do_not_change_the_text(folders, llm):
    with LLM(folders["v3"], "cpu", speculative_tokens=2) as drafting:
        assert texts(drafting.generate([LONG, "1"], FREE)) == texts(llm.generate([LONG, "1"], FREE))
        assert drafting.rollout.engine.stats().draft_tokens > 0


def test_a_cache_in_fp8_is_one(folders):
    with LLM(folders["v3"], "cpu", cache_dtype="fp8") as small:
        assert len(small.generate("the cat", FREE)[0].token_ids) == 8
        assert small.rollout.layout.bytes_per_page < LLM(folders["v3"], "cpu").rollout.layout.bytes_per_page


# --- chats ---


def scripted(llm: LLM, monkeypatch: pytest.MonkeyPatch, *replies: list[int]) -> list[SamplingParams]:
    """From here on the engine says this; what it is asked with."""
    asked: list[SamplingParams] = []

    def generate(prompts: list[list[int]], params: list[SamplingParams]) -> list[Completion]:
        asked.extend(params)
        return [
            Completion(prompt, one.seed or 0, 0, list(reply), [0.0] * len(reply), "stop")
            for prompt, one, reply in zip(prompts, params, replies, strict=True)
        ]

    monkeypatch.setattr(llm.rollout, "generate", generate)
    return asked


def said(text: str, *names: str) -> list[int]:
    return [*TOKENIZER.encode(text), *map(TOKENIZER.special_id, names)]


def test_one_conversation_and_several(llm):
    [alone] = llm.chat(HELLO, GREEDY)
    ids = TOKENIZER.encode_segments(encode_chat(HELLO, "v3"))
    assert alone.completion.prompt_ids == ids
    assert alone.content == llm.generate([ids], GREEDY)[0].text
    other = [*HELLO, alone.message(), {"role": "user", "content": "and?"}]
    together = llm.chat([HELLO, other], GREEDY)
    assert [reply.content for reply in together] == [alone.content, llm.chat(other, GREEDY)[0].content]


def test_what_an_r1_model_thinks_stands_apart(folders, monkeypatch):
    with LLM(folders["r1"], "cpu") as llm:
        scripted(llm, monkeypatch, [*said("hmm", family.END_THINK), *said("\n\nmat", family.EOS)])
        [reply] = llm.chat(HELLO, GREEDY)
    assert (reply.reasoning, reply.content, reply.finish_reason) == ("hmm", "mat", "stop")
    assert reply.message() == {"role": "assistant", "content": "mat", "reasoning_content": "hmm"}


def test_calls_of_tools_are_read_where_tools_are_offered(llm, monkeypatch):
    history = [*HELLO, {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
    ]}]  # fmt: skip
    before, whole = (
        TOKENIZER.encode_segments(encode_chat(messages, "v3", CALL, add_generation_prompt=not history_end))
        for messages, history_end in ((HELLO, False), (history, True))
    )
    assert whole[: len(before)] == before
    scripted(llm, monkeypatch, whole[len(before) :])
    [reply] = llm.chat(HELLO, GREEDY, tools=CALL)
    [call] = reply.tool_calls
    assert call["function"]["name"] == "look" and json.loads(call["function"]["arguments"]) == {"at": 1}
    assert call["id"] and reply.finish_reason == "tool_calls"
    [plain] = llm.chat(HELLO, GREEDY)
    assert plain.tool_calls == [] and "look" in plain.content


def test_a_model_without_the_tokens_of_a_chat_format_does_not_chat(folders):
    with LLM(folders["v3"], "cpu", format="kimi-k2") as llm, pytest.raises(UserError):
        llm.chat(HELLO, GREEDY)


# --- votes ---


def test_the_majority_of_several_replies_wins(llm, monkeypatch):
    replies = [said(text, family.EOS) for text in ("cat", r"It is \boxed{mat}", "mat", "1", "2", "1")]
    asked = scripted(llm, monkeypatch, *replies)
    first, second = llm.chat([HELLO, HELLO], replace(FREE, seed=40), verify=3)
    assert [params.seed for params in asked] == [40, 41, 42] * 2
    assert first.content == r"It is \boxed{mat}"
    assert first.verdict.votes == {"cat": 1, "mat": 2} and first.verdict.agreement == pytest.approx(2 / 3)
    assert second.content == "1" and second.verdict.samples == 3
    with pytest.raises(UserError, match="1 or more"):
        llm.chat(HELLO, verify=0)


def test_one_reply_is_not_voted_on(llm):
    assert llm.chat(HELLO, GREEDY)[0].verdict is None


# --- sleep ---


def test_a_model_that_sleeps_has_no_cache_and_wakes_as_it_was(llm):
    before = texts(llm.generate(LONG, FREE))
    llm.sleep()
    assert llm.rollout.engine is None
    with pytest.raises(UserError, match=r"sleeps; call wake\(\)"):
        llm.generate(LONG, FREE)
    llm.wake()
    assert texts(llm.generate(LONG, FREE)) == before


# --- weights ---


def test_new_weights_write_new_texts_and_nothing_old_is_used_again(llm):
    old = llm.generate(LONG, GREEDY)[0]
    llm.generate(LONG, GREEDY)
    hits = llm.rollout.engine.stats().prefix_hits
    assert hits > 0  # the whole prompt was in the cache
    other = random_model(CONFIG, 1).state_dict()
    assert llm.update_weights(other) == 1
    new = llm.generate(LONG, GREEDY)[0]
    assert llm.rollout.engine.stats().prefix_hits == hits
    assert new.token_ids != old.token_ids and new.completion.weight_version == 1
    assert (
        new.token_ids
        == SimpleRollout(random_model(CONFIG, 1)).generate([new.completion.prompt_ids], GREEDY)[0].token_ids
    )
    assert llm.update_weights({}, version=70) == 70
    assert llm.generate("the cat", GREEDY)[0].completion.weight_version == 70


@pytest.mark.skipif(not native.built(), reason="nothing is captured without the C++ kernels")
def test_captured_steps_read_new_weights_where_the_old_ones_were(llm):
    llm.generate(LONG, GREEDY)
    graphs = llm.rollout.engine.runner.computer.graphs
    captured, replays = dict(graphs._main), graphs.replays
    assert replays and any(captured.values())
    llm.update_weights(random_model(CONFIG, 1).state_dict())
    new = llm.generate(LONG, GREEDY)[0]
    assert graphs.replays > replays and graphs._main == captured
    want = SimpleRollout(random_model(CONFIG, 1)).generate([new.completion.prompt_ids], GREEDY)[0]
    assert new.token_ids == want.token_ids
    for module in llm.model.modules():
        if isinstance(module, MLA):
            module._absorb = None
    llm.update_weights({})  # what is derived will be somewhere else
    assert not graphs._main
    assert llm.generate(LONG, GREEDY)[0].token_ids == want.token_ids


def test_weights_that_do_not_fit_are_refused_before_anything_is_written(llm):
    before = {name: tensor.clone() for name, tensor in llm.model.state_dict().items()}
    fits = {"lm_head.weight": torch.zeros_like(before["lm_head.weight"])}
    norm = "model.norm.weight"
    for wrong, why in (
        ({"model.nothing": torch.zeros(1)}, "has no 'model.nothing'"),
        ({norm: torch.zeros(3)}, r"'model.norm.weight' is \[3\], and the model's \[32\]"),
        ({norm: torch.zeros(32, dtype=torch.float8_e4m3fn)}, "is torch.float8_e4m3fn, and the model's torch.float32"),
    ):
        with pytest.raises(UserError, match=why):
            llm.update_weights(fits | wrong)
    assert all(torch.equal(tensor, before[name]) for name, tensor in llm.model.state_dict().items())
    assert llm.generate("the cat", GREEDY)[0].completion.weight_version == 0


# --- guides, and what they leave ---


def children() -> set[int]:
    """Processes that this one has started."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid() and fields[0] != "Z":
            found.add(int(entry.parent.name))
    return found


def test_who_asks_for_no_guide_starts_no_thread_and_no_process(folders):
    threads, processes = set(threading.enumerate()), children()
    with LLM(folders["v3"], "cpu") as llm:
        llm.generate("the cat", GREEDY)
        assert set(threading.enumerate()) == threads and children() == processes


@pytest.mark.slow
def test_a_guide_is_kept_and_closing_ends_all_that_it_started(folders):
    threads, processes = set(threading.enumerate()), children()
    with LLM(folders["v3"], "cpu") as llm:
        params = replace(FREE, guide=Guide("regex", "[0-9]{3}-(cat|mat)"), max_tokens=40)
        guided = texts(llm.generate(["the cat", "1"], [params, replace(params, seed=5)]))
        for text in guided:
            digits, _, animal = text.partition("-")
            assert len(digits) == 3 and digits.isdecimal() and animal in ("cat", "mat")
        assert set(threading.enumerate()) > threads and children() > processes
        with pytest.raises(UserError, match="cannot guide a text"):
            llm.generate("x", replace(FREE, guide=Guide("regex", "(")))
        assert llm.generate("the cat", params)[0].text == guided[0]
    assert set(threading.enumerate()) == threads and children() == processes
    assert llm.generate("the cat", params)[0].text == guided[0]  # a call behind the end begins anew
    llm.close()
    assert set(threading.enumerate()) == threads and children() == processes


def test_without_llguidance_a_guide_is_refused_in_a_line_and_everything_else_works(llm, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"needs the package llguidance: pip install 'dsv3\[serve\]'"):
        llm.generate("x", replace(FREE, guide=Guide("json_object")))
    assert llm.generate("the cat", GREEDY)[0].token_ids


def test_a_guide_holds_behind_the_thought_of_a_chat(folders, monkeypatch):
    for name, thinks in (("r1", True), ("v3", False)):
        with LLM(folders[name], "cpu") as llm:
            asked = scripted(llm, monkeypatch, said("x", family.EOS))
            llm.chat(HELLO, replace(FREE, guide=Guide("json_object")))
        assert [params.guide.after_thinking for params in asked] == [thinks]
