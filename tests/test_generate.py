"""`dsv3 generate`, the streams behind it, and how it and `dsv3 chat` refuse what they cannot run."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import CONFIG, CONTEXT, GREEDY, TEXTS, TOKENIZER, VOCABULARY, ending_at, fails, load, prints, save

from dsv3 import backends, talk
from dsv3.core import special_tokens as family
from dsv3.core.checkpoint import save_pretrained
from dsv3.core.generate import SimpleRollout
from dsv3.core.text_stream import TextStream
from dsv3.core.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def process_of_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backends, "_active", None)
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights that chats in the format V3."""
    return save(tmp_path_factory.mktemp("models") / "tiny", "v3")


@pytest.fixture(scope="module")
def rollout(folder: Path) -> SimpleRollout:
    return load(folder)


# --- the text of a stream ---


@settings(deadline=None)
@given(st.lists(st.integers(0, VOCABULARY - 1), max_size=40))
def test_the_pieces_of_a_stream_are_the_decoded_whole(ids: list[int]):
    stream = TextStream(TOKENIZER)
    pieces = [*map(stream.push, ids), stream.finish()]
    assert "".join(pieces) == stream.text == TOKENIZER.decode(ids, skip_special=True)


@settings(deadline=None)
@given(st.text("ab ", max_size=30), st.text("ab ", min_size=1, max_size=4))
def test_a_stream_ends_before_its_stop_string_and_shows_no_part_of_it(text: str, stop: str):
    stream = TextStream(TOKENIZER, (stop,))
    shown = ""
    for token in TOKENIZER.encode(text):
        shown += stream.push(token)
        assert text.partition(stop)[0].startswith(shown)
    assert shown + stream.finish() == text.partition(stop)[0]


# --- generate ---


def test_the_text_goes_on_behind_the_beginning_of_sentence(folder, rollout, capsys):
    prompt = [TOKENIZER.bos_id, *TOKENIZER.encode("the cat")]
    tokens = rollout.generate([prompt], GREEDY)[0].token_ids
    out = prints(capsys, "generate", folder, "--prompt", "the cat", "--max-tokens", 12, "--temperature", 0)
    assert out == TOKENIZER.decode(tokens, skip_special=True) + "\n"


def test_one_seed_gives_one_text_and_every_sample_has_its_own(folder, capsys):
    def samples(*options: object) -> list[dict]:
        argv = ("generate", folder, "--prompt", "cat", "--max-tokens", 9, "--temperature", 1, *options, "--json")
        return [json.loads(line) for line in prints(capsys, *argv).splitlines()]

    three = samples("-n", 3, "--seed", 5)
    assert [sample["seed"] for sample in three] == [5, 6, 7]
    (alone,) = samples("--seed", 6)
    logprobs = [three[1].pop("logprobs"), alone.pop("logprobs")]
    assert alone == three[1]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)  # batches of other sizes round otherwise
    three[1]["logprobs"] = logprobs[0]
    assert len({tuple(sample["token_ids"]) for sample in three}) == 3
    drawn = samples()[0]
    assert samples("--seed", drawn["seed"])[0] == drawn
    assert samples()[0]["seed"] != drawn["seed"]
    for sample in three:
        assert sample.keys() == {"text", "token_ids", "logprobs", "finish_reason", "seed"}
        assert sample["text"] == TOKENIZER.decode(sample["token_ids"], skip_special=True)
        assert len(sample["logprobs"]) == len(sample["token_ids"]) == 9
        assert sample["finish_reason"] == "length"


def test_samples_are_shown_whole_and_one_after_the_other(folder, capsys):
    argv = ("generate", folder, "--prompt", "cat", "--max-tokens", 9, "-n", 2, "--seed", 5)
    texts = [json.loads(line)["text"] for line in prints(capsys, *argv, "--json").splitlines()]
    shown = f"--- 1 of 2, seed 5 ---\n{texts[0]}\n--- 2 of 2, seed 6 ---\n{texts[1]}\n"
    assert prints(capsys, *argv) == shown


def test_a_stop_string_ends_the_text_and_is_cut_off(folder, capsys):
    argv = ("generate", folder, "--prompt", "cat", "--max-tokens", 30, "--seed", 5)
    whole = prints(capsys, *argv)[:-1]
    stop = whole[5:7]
    assert prints(capsys, *argv, "--stop", stop) == whole.partition(stop)[0] + "\n"


@pytest.mark.parametrize("in_config", [True, False])
def test_the_end_of_sentence_ends_the_text_and_does_not_show(in_config, tmp_path, capsys):
    model, text = ending_at([TOKENIZER.bos_id, *TOKENIZER.encode("the cat")])
    config = CONFIG if in_config else CONFIG.replace(eos_token_id=None)
    save_pretrained(model, config, tmp_path / "model", also=TOKENIZER.save)
    argv = ("generate", tmp_path / "model", "--prompt", "the cat", "--temperature", 0, "--json")
    sample = json.loads(prints(capsys, *argv))
    assert (sample["text"], sample["finish_reason"]) == (text, "stop")
    assert sample["token_ids"][-1] == TOKENIZER.eos_id


def test_more_likely_tokens_than_there_are_tokens_are_all_of_them(folder, capsys):
    argv = ("generate", folder, "--prompt", "cat", "--max-tokens", 9, "--seed", 5)
    assert prints(capsys, *argv, "--top-k", 10**12) == prints(capsys, *argv)


def test_the_prompt_may_come_from_a_file_or_standard_input(folder, capsys, tmp_path, monkeypatch):
    argv = ("generate", folder, "--max-tokens", 6, "--temperature", 0)
    text = "the cat\r\nsaid 深"
    (tmp_path / "prompt.txt").write_bytes(text.encode())
    wanted = prints(capsys, *argv, "--prompt", text)
    assert prints(capsys, *argv, "--prompt-file", tmp_path / "prompt.txt") == wanted
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert prints(capsys, *argv, "--prompt-file", "-") == wanted


def test_a_terminal_gets_no_control_characters_from_a_model():
    assert talk.harmless("a\x1b[2J\tb\r\n\x9b") == "a\ufffd[2J\tb\n\ufffd"


# --- errors ---


@pytest.mark.parametrize("verb", [("chat",), ("generate", "--prompt", "x")])
@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("no/such/model", "no such directory"),
        ("dsv3-2m", "is a preset, which has a shape but no weights"),
        ("owner/name", "pin it with --revision"),
        (__file__, "is a file; give the directory"),
    ],
)
def test_a_model_without_weights_is_refused(verb, model, says, capsys):
    line = fails(capsys, *verb, model)
    assert model in line and says in line


def test_a_directory_without_a_tokenizer_is_refused(folder, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert "has no tokenizer.json" in fails(capsys, "generate", tmp_path, "--prompt", "x")


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, capsys):
    place = save(tmp_path / "model", "v3", Tokenizer.train(TEXTS, VOCABULARY + 1))
    assert f"the model's vocabulary only {VOCABULARY}" in fails(capsys, "generate", place, "--prompt", "x")


def test_a_tokenizer_without_chat_tokens_can_generate_but_not_chat(tmp_path, capsys):
    place = save(tmp_path / "model", "v3")
    file = place / "tokenizer.json"
    tree = json.loads(file.read_text(encoding="utf-8"))
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] != family.USER]
    file.write_text(json.dumps(tree), encoding="utf-8")
    line = fails(capsys, "chat", place)
    assert repr(family.USER) in line and "`dsv3 generate`" in line
    assert prints(capsys, "generate", place, "--prompt", "the cat", "--max-tokens", 2)


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--temperature", -1, "temperature"),
        ("--temperature", "nan", "temperature"),
        ("--top-p", 0, "top_p"),
        ("--top-k", -1, "top_k"),
        ("--min-p", 2, "min_p"),
        ("--max-tokens", 0, "max_tokens"),
        ("--seed", 2**62, "seed"),
        ("--seed", "x", "--seed"),
        ("--stop", "", "stop"),
        ("--dtype", "float15", "did you mean 'float16'?"),
        ("--fp8", "drop", "there are keep, dequantize"),
        ("--revision", "main", "leave it out"),
    ],
)
@pytest.mark.parametrize("verb", [("chat",), ("generate", "--prompt", "x")])
def test_a_wrong_value_is_named(folder, verb, option, value, says, capsys):
    assert says in fails(capsys, *verb, folder, option, value)


def test_a_prompt_too_long_for_the_context_is_refused(folder, capsys):
    assert f"context of {CONTEXT}" in fails(capsys, "generate", folder, "--prompt", "!" * CONTEXT)


def test_a_hub_id_brings_no_code_and_the_pinned_revision(folder, monkeypatch, capsys):
    asked = {}

    def snapshot_download(model: str, **options: object) -> str:
        asked.update(options, model=model)
        return str(folder)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    prints(capsys, "generate", "owner/name", "--revision", "abc", "--prompt", "x", "--max-tokens", 1)
    assert (asked["model"], asked["revision"]) == ("owner/name", "abc")
    suffixes = {pattern.rpartition(".")[2] for pattern in asked["allow_patterns"]}
    assert suffixes == {"json", "safetensors", "jinja", "model"}


def test_a_hub_id_without_the_hub_library_or_without_the_hub_says_so(monkeypatch, capsys):
    argv = ("generate", "owner/name", "--revision", "abc", "--prompt", "x")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface-hub" in fails(capsys, *argv)

    def snapshot_download(model: str, **options: object) -> str:
        raise OSError("the cable is cut\nsecond line")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    assert "the cable is cut)" in fails(capsys, *argv)


def test_drafts_and_another_cache_leave_the_greedy_text_as_it_is(folder, capsys):
    argv = ("generate", folder, "--prompt", "the cat", "--max-tokens", 12, "--temperature", 0)
    plain = prints(capsys, *argv)
    assert prints(capsys, *argv, "--speculative-tokens", 2) == plain
    assert prints(capsys, *argv, "--cache", "float32") == plain


def test_a_model_that_cannot_draft_says_so_before_it_is_loaded(tmp_path, capsys):
    plain = save(tmp_path / "plain", "v3", config=CONFIG.replace(num_nextn_predict_layers=0))
    for file in plain.glob("*.safetensors"):
        file.unlink()
    assert "this model has none; leave it out" in fails(
        capsys, "generate", plain, "--prompt", "x", "--speculative-tokens", 1
    )
