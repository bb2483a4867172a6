"""Bits per byte of texts, and needles in haystacks of exact length."""

import gzip
import json
import math
from pathlib import Path

import pytest
import torch
from evaluating import GREEDY, Scripted, Silent
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import CONFIG, CONTEXT, TOKENIZER, load, save

from dsv3.errors import UserError
from dsv3.evaluation.jobs import Job, hide
from dsv3.evaluation.needle import DEPTHS, default_lengths, needle_task
from dsv3.evaluation.perplexity import bits_per_byte, documents, ratio_interval
from dsv3.evaluation.protocols import PROTOCOLS
from dsv3.evaluation.runner import Options, Runner
from dsv3.evaluation.scoring import Graders
from dsv3.evaluation.subject import LocalSubject

TEXT = "the cat sat on the mat and said héllo 深度求索 😀\n" * 60


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> LocalSubject:
    folder = save(tmp_path_factory.mktemp("model") / "tiny", "v3")
    return LocalSubject(load(folder), TOKENIZER, "tiny", "0" * 16)


# Bits per byte


def by_hand(subject: LocalSubject, text: str) -> float:
    """Nats of a short text in one plain pass."""
    ids = subject.document(text)
    with torch.inference_mode():
        logprobs = subject.rollout.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return -logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None]).sum().item()


def test_bits_per_byte_of_short_texts_are_those_of_one_pass(subject, tmp_path):
    texts = ["the cat sat on the mat", "héllo 深度求索", "1 + 1 = 2"]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    result = bits_per_byte(subject, tmp_path / "d.jsonl", "mine", "Mine", Options(tmp_path), Silent())
    nats, size = sum(by_hand(subject, text) for text in texts), sum(len(text.encode()) for text in texts)
    assert result.value == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert result.extra["bytes"] == size and result.low < result.value < result.high
    assert result.extra["perplexity"] == pytest.approx(math.exp(nats / result.tokens), rel=1e-5)
    assert (result.lower, result.scale, result.metric, result.items) == (True, 1.0, "bits per byte", 3)


def test_a_long_text_goes_through_windows_and_a_model_of_no_opinion_needs_all_bits(subject, tmp_path):
    (tmp_path / "long.txt").write_text(TEXT, encoding="utf-8")
    tokens = len(TOKENIZER.encode(TEXT))
    assert tokens > 2 * CONTEXT
    model = subject.rollout.model
    kept = model.lm_head.weight.detach().clone()
    try:
        with torch.no_grad():
            model.lm_head.weight.zero_()
        result = bits_per_byte(subject, tmp_path / "long.txt", "long", "Long", Options(tmp_path), Silent())
    finally:
        with torch.no_grad():
            model.lm_head.weight.copy_(kept)
    assert result.tokens == tokens
    assert result.value == pytest.approx(tokens * math.log2(CONFIG.vocab_size) / len(TEXT.encode()), rel=1e-4)


def test_texts_that_are_scored_are_not_scored_again(subject, tmp_path):
    texts, out = tmp_path / "texts", tmp_path / "out"
    texts.mkdir()
    (texts / "a.txt").write_text("the cat")
    (texts / "b.txt").write_text("the mat")
    first = bits_per_byte(subject, texts, "two", "Two", Options(out, limit=1), Silent())
    before = subject.likelihood.computed
    both = bits_per_byte(subject, texts, "two", "Two", Options(out), Silent())
    assert (first.items, first.of, both.items) == (1, 2, 2)
    assert subject.likelihood.computed - before == len(TOKENIZER.encode("the mat"))
    before = subject.likelihood.computed
    assert bits_per_byte(subject, texts, "two", "Two", Options(out), Silent()).value == both.value
    assert subject.likelihood.computed == before


def test_texts_are_read_from_every_kind_of_file(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one", "meta": {}}\n{"text": "two"}\n'))
    (tmp_path / "b.txt").write_text("three")
    (tmp_path / "empty.txt").write_text("\n")
    assert [text for _, text in documents(tmp_path, "mine")] == ["one", "two", "three"]
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"c.txt: not a text in UTF-8"):
        list(documents(tmp_path, "mine"))
    with pytest.raises(UserError, match="nowhere does not exist"):
        list(documents(tmp_path / "nowhere", "mine"))


def test_the_interval_of_a_ratio_shrinks_with_more_documents():
    few = ratio_interval([1.0, 2.0, 1.5], [1.0, 1.0, 1.0])
    many = ratio_interval([1.0, 2.0, 1.5] * 20, [1.0] * 60)
    assert few[0] < 1.5 < few[1] and many[1] - many[0] < few[1] - few[0]
    assert ratio_interval([1.0], [1.0])[0] == -math.inf


# Needles


@settings(deadline=None, max_examples=20)
@given(st.integers(160, 3000), st.booleans(), st.integers(0, 3))
def test_every_haystack_has_its_length_and_its_needle_at_its_depth(length, thinks, seed):
    count = lambda text: len(TOKENIZER.encode(text))  # noqa: E731
    context = length + 40
    task, data = needle_task([length], context, thinks, count, seed)
    assert len(data.items) == len(DEPTHS)
    sizes = set()
    for item in data.items:
        before, found, after = item.question.partition(f"The secret number of {item.extra['city']} is {item.gold}.")
        assert found
        ask = count(task.chat(item))
        sizes.add(ask)
        assert ask <= min(length, context)  # with room left for the reply
        if length > 1000:
            share = count(before) / max(1, count(before) + count(after))
            assert abs(share - item.extra["depth"] / 100) < 0.05
    if length > 1000 and not thinks:
        assert min(sizes) > length - 120  # no more is lost than the frame and a sentence


def test_lengths_are_the_context_halved(subject):
    assert default_lengths(163840) == [1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072]
    assert default_lengths(256) == [128, 256]
    with pytest.raises(UserError, match="lengths go from 128 to the context of 256"):
        needle_task([512], 256, False, None, 0)


def test_a_model_that_reads_finds_and_one_that_does_not_does_not(tmp_path):
    def reads(text: str, params) -> str:
        return text.rpartition(" is ")[0].rpartition("The secret number of ")[2].split(" is ")[1].split(".")[0]

    loaded = hide(Job("needle", GREEDY), Scripted(reads, context=10000), [256, 512], 0)
    for answer, share in ((reads, 1.0), (lambda text, params: "1234567", 0.0)):
        with Graders() as graders:
            subject = Scripted(answer, context=10000)
            options = Options(tmp_path / str(share))
            result = Runner(subject, graders, options, Silent()).run(loaded.task, loaded.data, GREEDY)
        assert result.value == share
        assert set(result.groups) == {"256", "512"} and len(result.extra["cells"]) == 22


def test_a_small_model_is_asked_at_short_lengths(subject, tmp_path):
    loaded = hide(Job("needle", PROTOCOLS["base"]), subject, [128, 256], 0)
    with Graders() as graders:
        runner = Runner(subject, graders, Options(tmp_path), Silent())
        result = runner.run(loaded.task, loaded.data, PROTOCOLS["base"])
    assert result.items == 22 and result.value is not None and not result.flags
    assert all(TOKENIZER.encode(loaded.task.ask(item)) for item in loaded.items)


def test_a_haystack_of_ones_own(tmp_path):
    hay = tmp_path / "hay.txt"
    hay.write_text("\n".join(f"This is line {i} of the story." for i in range(400)))
    _, data = needle_task([512], None, False, None, 0, hay)
    assert "line 7" in "".join(item.question for item in data.items) and "made-up" not in " ".join(data.notes)
    with pytest.raises(UserError, match=r"fewer than the 8192 asked for; give more text"):
        needle_task([8192], None, False, None, 0, hay)
    with pytest.raises(UserError, match="does not exist"):
        needle_task([512], None, False, None, 0, Path("nowhere"))
