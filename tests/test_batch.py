"""`dsv3 batch`: what its files may hold, what becomes of every line, and how an interrupted run goes on."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from api_calls import HELLO, call, run, says, server
from fake_engine import FakeEngine, Script, spell
from tiny_model import TOKENIZER, fails, prints, save

from dsv3 import backends
from dsv3.errors import UserError
from dsv3.serving.api.direct import post
from dsv3.serving.batch_file import Results, read_lines
from dsv3.serving.batch_run import BatchRun

CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(autouse=True)
def process_of_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backends, "_active", None)
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")


def request(custom_id: str, url: str = TEXTS, method: str = "POST", **body: Any) -> dict[str, Any]:
    body = body or ({"prompt": "the cat"} if url == TEXTS else dict(HELLO))
    return {"custom_id": custom_id, "method": method, "url": url, "body": body}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read(path: Path) -> dict[str, dict[str, Any]]:
    results = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({result["custom_id"] for result in results}) == len(results)
    return {result["custom_id"]: result for result in results}


def answer(file: Path, engine: FakeEngine, at_a_time: int = 4, made_of: str = "") -> Path:
    """As the verb does it, over an engine of the test; where the results are."""
    lines, out = read_lines(file), file.with_suffix(".out")
    with Results(out, lines, made_of) as results:
        run(BatchRun(server(engine), engine, lines, results, at_a_time, lambda line: None).run())
        results.finish()
    return out


# --- what a file may hold ---


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("{", "truncated"),
        ("[]", "Expected `object`"),
        ('{"custom_id": "b"}', "missing required field `method`"),
        (request("b", method="GET"), "method must be POST"),
        (request("b", "/v1/embeddings"), "url must be /v1/chat/completions or /v1/completions"),
        (request("b") | {"body": [1]}, "body must be an object"),
        (request(""), "length >= 1"),
        (request("b", prompt="x", stream=True), "leave `stream` out"),
        (request("a"), "custom_id 'a' is that of line 1, too"),
        ("{" + "x", "malformed"),
    ],
)
def test_what_is_not_in_the_format_is_named_with_its_line(line, wrong, tmp_path):
    with pytest.raises(UserError) as raised:
        read_lines(write(tmp_path / "in.jsonl", request("a"), "", line))
    assert f"{tmp_path / 'in.jsonl'}, line 3: " in str(raised.value) and wrong in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_wrong_file_is_one_line_before_a_model_is_looked_for(tmp_path, capsys):
    assert "line 1: method" in fails(capsys, "batch", "no-model", write(tmp_path / "in", request("a", method="PUT")))
    assert "holds no requests" in fails(capsys, "batch", "no-model", write(tmp_path / "in", ""))
    assert "cannot be read" in fails(capsys, "batch", "no-model", tmp_path / "absent.jsonl")
    assert "no-model: no such directory" in fails(capsys, "batch", "no-model", write(tmp_path / "in", request("a")))


# --- what becomes of a line ---


def test_a_line_gets_what_the_server_answers(tmp_path):
    file = write(tmp_path / "in.jsonl", request("text"), request("chat", CHATS))
    results = read(answer(file, says("on the mat")))
    app = server(says("on the mat"))
    for name, path, body in (("text", TEXTS, {"prompt": "the cat"}), ("chat", CHATS, HELLO)):
        response, served = results[name]["response"], call(app, path, body).json()
        assert results[name]["error"] is None and results[name]["id"].startswith("batch_req_")
        assert response["status_code"] == 200 and response["request_id"]
        for drawn in ("id", "created"):
            del response["body"][drawn], served[drawn]
        for choice in (*response["body"]["choices"], *served["choices"]):
            choice.pop("seed")
        assert response["body"] == served


def test_a_wrong_request_is_a_result_with_its_status_and_does_not_stop_the_others(tmp_path):
    lines = [request("a", prompt="x"), request("b", prompt="x", temperature=7), request("c", model="other", prompt="x")]
    results = read(answer(write(tmp_path / "in.jsonl", *lines, request("d")), says("mat"), at_a_time=1))
    statuses = {name: result["response"]["status_code"] for name, result in results.items()}
    assert statuses == {"a": 200, "b": 400, "c": 404, "d": 200}
    assert results["b"]["response"]["body"]["error"]["param"] == "temperature"


def test_no_more_requests_are_under_way_than_wanted(tmp_path):
    most = 0

    def script(prompt: list[int], params: Any) -> Script:
        nonlocal most
        most = max(most, engine.running)
        return Script(spell(TOKENIZER, "mat"), pause=0.001)

    engine = FakeEngine(TOKENIZER, script)
    answer(write(tmp_path / "in.jsonl", *(request(f"{i}") for i in range(20))), engine, at_a_time=3)
    assert most == 3


def test_a_call_that_is_cancelled_lets_go_of_its_request():
    engine = says("mat", gate=asyncio.Event())

    async def cancelled() -> None:
        calling = asyncio.create_task(post(server(engine), TEXTS, b'{"prompt": "the cat"}'))
        while not engine.asked:
            await asyncio.sleep(0)
        calling.cancel()
        await asyncio.gather(calling, return_exceptions=True)

    run(cancelled())
    assert engine.asked[0].aborted


# --- interruptions ---


def test_a_run_goes_on_where_the_last_one_was_interrupted(tmp_path):
    file, first = write(tmp_path / "in.jsonl", *(request(name) for name in "abc")), says("mat")
    part = tmp_path / "in.out.part"
    lines = read_lines(file)
    with Results(tmp_path / "in.out", lines, "") as results:
        run(BatchRun(server(first), first, lines[:2], results, 1, lambda line: None).run())
    assert sorted(read(part)) == ["a", "b"] and not (tmp_path / "in.out").exists()
    before = part.read_bytes()
    part.write_bytes(before + b'{"id": "batch_req_')  # the line that was being written
    second = says("mat")
    assert answer(file, second).read_bytes().startswith(before)
    assert len(second.asked) == 1 and sorted(read(tmp_path / "in.out")) == ["a", "b", "c"]
    assert not part.exists()
    with pytest.raises(UserError, match="is there already"):
        answer(file, second)


@pytest.mark.parametrize("what", ["another request", "another model", "damage"])
def test_answers_to_something_else_are_not_taken_for_ones_to_these_requests(what, tmp_path):
    file = write(tmp_path / "in.jsonl", request("a"))
    answer(file, says("mat")).rename(tmp_path / "in.out.part")
    if what == "another request":
        write(file, request("a", prompt="another"))
    if what == "damage":
        write(tmp_path / "in.out.part", '{"id": 1}')
    with pytest.raises(UserError, match="line 1: is"):
        answer(file, says("mat"), made_of="another" if what == "another model" else "")


def test_two_runs_do_not_write_to_one_file(tmp_path):
    lines = read_lines(write(tmp_path / "in.jsonl", request("a")))
    with Results(tmp_path / "out", lines, ""), pytest.raises(UserError, match="another run"):
        Results(tmp_path / "out", lines, "").__enter__()


def test_an_engine_that_dies_ends_the_run_and_its_faults_are_no_results(tmp_path):
    def script(prompt: list[int], params: Any) -> Script:
        if len(engine.asked) == 2:
            engine.alive = False
        return Script(spell(TOKENIZER, "mat"))

    engine = FakeEngine(TOKENIZER, script)
    with pytest.raises(UserError, match="has ended; the same command goes on"):
        answer(write(tmp_path / "in.jsonl", *(request(name) for name in "abcd")), engine, at_a_time=1)
    assert sorted(read(tmp_path / "in.out.part")) == ["a", "b"]
    assert sorted(read(answer(tmp_path / "in.jsonl", says("mat")))) == ["a", "b", "c", "d"]


# --- the verb ---


@pytest.mark.slow
def test_the_verb_from_file_to_file(tmp_path, capsys):
    model = save(tmp_path / "tiny", "v3")
    lines = [request("t", prompt="the cat", max_tokens=5, seed=1, ignore_eos=True), request("w", prompt="x", n=0)]
    file = write(tmp_path / "in.jsonl", *lines)
    report = json.loads(prints(capsys, "batch", model, file, "--json", "--max-running", 2, "--context", 64))
    assert report["out"] == str(tmp_path / "in.out.jsonl")
    assert (report["requests"], report["answered_before"], report["failed"]) == (2, 0, {"400": 1})
    assert report["completion_tokens"] == 5 and report["seconds"] > 0
    results = read(tmp_path / "in.out.jsonl")
    [sample] = prints(
        capsys, "generate", model, "--prompt", "the cat", "--max-tokens", 5, "--seed", 1, "--temperature", 1,
        "--top-p", 1, "--json",
    ).splitlines()  # fmt: skip
    assert results["t"]["response"]["body"]["choices"][0]["text"] == json.loads(sample)["text"]
    write(file, request("t", model="gpt", prompt="x"))
    line = fails(capsys, "batch", model, file, "--out", tmp_path / "else")
    assert "give --served-model-name gpt" in line and not list(tmp_path.glob("else*"))
