"""One model, one seed, one text: on the command line, behind the API, and spread over processes."""

import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving_server import CHAT, TEXT, Served, save_model, serve, until
from tiny_model import prints

pytestmark = pytest.mark.slow

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
PROMPT = "the cat sat on the mat and said"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Served]:
    """It drafts, which changes no text."""
    with serve(model, "--cache-gib", "0.02", "--speculative-tokens", "2") as served:
        yield served
        assert served.metric("spec_decode_num_draft_tokens_total") > 0
        served.settle()


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.9, "seed": 3},
    {"temperature": 1.3, "top_k": 20, "min_p": 0.02, "seed": 9, "n": 3},
    {"temperature": 1.0, "top_p": 1.0, "seed": 5, "stop": "a"},
]


def as_options(settings: dict[str, Any]) -> list[str]:
    names = {"n": "-n", "temperature": "--temperature", "seed": "--seed", "stop": "--stop"}
    names |= {"top_p": "--top-p", "top_k": "--top-k", "min_p": "--min-p"}
    return [part for name, value in settings.items() for part in (names[name], str(value))]


@pytest.mark.parametrize("settings", SETTINGS)
def test_generate_and_completions_write_the_same(server: Served, model: Path, capsys, settings: dict[str, Any]):
    options = ["--prompt", PROMPT, "--max-tokens", "40", "--json", *as_options({"top_p": 1.0} | settings)]
    lines = prints(capsys, "generate", model, *options).splitlines()
    ours = [json.loads(line) for line in lines]
    theirs = server.post(TEXT, {"prompt": PROMPT, "max_tokens": 40, **settings}).json()["choices"]
    assert [choice["text"] for choice in theirs] == [sample["text"] for sample in ours]
    assert [choice["finish_reason"] for choice in theirs] == [sample["finish_reason"] for sample in ours]
    if "seed" in settings:
        assert [choice["seed"] for choice in theirs] == [sample["seed"] for sample in ours]


@pytest.mark.parametrize("settings", SETTINGS[:2])
def test_chat_and_chat_completions_say_the_same(server: Served, model: Path, capsys, monkeypatch, settings):
    """Two turns: the second one's prompt holds the first one's reply."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\na cat is a cat\n"))
    options = ["--system", "1 + 1 = 2", "--max-tokens", "25", *as_options({"top_p": 1.0} | settings)]
    said = prints(capsys, "chat", model, *options)
    messages: list[dict[str, Any]] = [{"role": "system", "content": "1 + 1 = 2"}]
    for turn, text in enumerate(("the cat", "a cat is a cat")):
        messages.append({"role": "user", "content": text})
        reply = server.post(CHAT, {"messages": messages, "max_tokens": 25, **settings}).json()["choices"][0]
        messages.append({"role": "assistant", "content": reply["message"]["content"]})
        assert reply["message"]["content"] in said, turn


# Over two processes --------------------------------------------------------------------------------------------------


def pids(served: Served) -> list[int]:
    """Of the processes that torchrun started, by rank."""
    ranks: dict[int, int] = {}
    for task in Path(f"/proc/{served.process.pid}/task").iterdir():
        for pid in (task / "children").read_text().split():
            entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found = [entry for entry in entries if entry.startswith(b"RANK=")]
            ranks |= {int(entry.removeprefix(b"RANK=")): int(pid) for entry in found}
    return [ranks[rank] for rank in sorted(ranks)]


def test_two_processes_answer_as_one_and_end_together(server: Served, model: Path):
    asked = [{"prompt": PROMPT, "max_tokens": 30, "logprobs": 2, "echo": True, **settings} for settings in SETTINGS]
    with serve(model, "--cache-gib", "0.02", launcher=TORCHRUN) as spread:
        for body in asked:
            for one, two in zip(*(each.post(TEXT, body).json()["choices"] for each in (server, spread)), strict=True):
                assert one["text"] == two["text"]
                for name in ("token_logprobs", "tokens"):
                    here, there = one["logprobs"][name][1:], two["logprobs"][name][1:]
                    assert here == (pytest.approx(there, abs=1e-3) if name == "token_logprobs" else there)
        spread.settle()
        with spread.streaming(max_tokens=100) as running:
            chunks = [next(running)]
            os.kill(pids(spread)[0], signal.SIGTERM)
            chunks += running
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert spread.ended() == 0, spread.log.read_text()


def test_a_signal_to_torchrun_lets_streams_finish(model: Path):
    """torchrun hands it on to every process, those that follow included."""
    with serve(model, "--cache-gib", "0.01", launcher=TORCHRUN) as spread:
        with spread.streaming(max_tokens=100) as running:
            chunks = [next(running)]
            spread.process.send_signal(signal.SIGTERM)
            until(lambda: spread.client.get("/ready").json() == {"status": "draining"})
            chunks += running
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        spread.ended()


def test_a_killed_follower_ends_the_server(model: Path):
    with serve(model, "--cache-gib", "0.01", launcher=TORCHRUN) as spread:
        with spread.streaming() as running:
            next(running)
            os.kill(pids(spread)[1], signal.SIGKILL)
            *_, last = running
        assert last["error"]["code"] == "engine_dead"
        assert spread.ended() != 0
        assert "there is no going on" in spread.log.read_text() or "is gone" in spread.log.read_text()
