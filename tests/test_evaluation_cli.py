"""`dsv3 eval` from end to end: a tiny model of random weights, and servers that behave and misbehave."""

import json
from pathlib import Path

import pytest
from evaluating import Silent
from openai_server import completion, hangs_up, last_words, serving
from openai_server import fails as answers_with
from test_evaluation_data import put, put_rows
from tiny_model import TOKENIZER, prints, save

from dsv3 import backends, cli
from dsv3.core import endpoint
from dsv3.core.tokenizer import Tokenizer
from dsv3.errors import UserError
from dsv3.eval_run import usual_protocol
from dsv3.evaluation.runner import Options
from dsv3.evaluation.session import evaluate
from dsv3.training.data.prepare import prepare
from dsv3.training.data.sources import Document, MemorySource


@pytest.fixture(autouse=True)
def process_of_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backends, "_active", None)
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    monkeypatch.setattr(endpoint, "FIRST_DELAY", 0.001)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights that thinks."""
    return save(tmp_path_factory.mktemp("models") / "tiny", "r1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small samples, each under its task's name."""
    root = tmp_path_factory.mktemp("data")
    put(root / "mmlu" / "test" / "law_test.csv", "".join(f"Q{i}?,a cat,a mat,1,2,{'ABCD'[i % 4]}\n" for i in range(6)))
    put(root / "mmlu" / "dev" / "law_dev.csv", "".join(f"S{i}?,a,b,c,d,A\n" for i in range(5)))
    row = {"question": "1 + 1?", "answer": "It is 2.\n#### 2"}
    put_rows(root / "gsm8k" / "test.jsonl", *[row] * 3)
    put_rows(root / "gsm8k" / "train.jsonl", *[row] * 8)
    put_rows(root / "own.jsonl", *[{"prompt": f"{i} + 1 =", "answer": i + 1} for i in range(5)])
    put(root / "pile.txt", "the cat sat on the mat and said 1 + 1 = 2\n" * 30)
    return root


def report_of(out: Path) -> dict:
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_model_directory_from_options_to_report(folder, data, tmp_path, capsys):
    out = tmp_path / "out"
    options = ("--data", data, "--data", f"own={data / 'own.jsonl'}", "--protocol", "base", "--out", out)
    what = ("--tasks", "mmlu,gsm8k,own,needle,pile", "--lengths", "128,256", "--shots", 1)
    text = prints(capsys, "eval", folder, *what, *options)
    tree = report_of(out)
    rows = {row["task"]: row for row in tree["results"]}
    assert list(rows) == ["mmlu", "gsm8k", "own", "needle", "pile"]
    assert rows["mmlu"]["metric"] == "accuracy by likelihood" and rows["mmlu"]["items"] == 6
    assert rows["pile"]["metric"] == "bits per byte" and 1 < rows["pile"]["value"] < 20
    assert rows["needle"]["items"] == 22 and set(rows["needle"]["groups"]) == {"128", "256"}
    assert all(row["low"] is None or row["low"] <= row["value"] <= row["high"] for row in rows.values())
    assert tree["subject"]["name"] == "tiny" and tree["subject"]["context"] == 256 and tree["subject"]["digest"]
    assert tree["command"].startswith("dsv3 eval ") and "--shots 1" in tree["command"]
    assert "MMLU, base: " in text and (out / "report.html").is_file() and (out / "report.md").is_file()
    kept = (out / "replies" / "gsm8k.jsonl").read_bytes()
    before = {row["task"]: row["value"] for row in tree["results"]}
    prints(capsys, "eval", folder, *what, *options)
    assert (out / "replies" / "gsm8k.jsonl").read_bytes() == kept
    assert {row["task"]: row["value"] for row in report_of(out)["results"]} == before


def test_a_model_that_thinks_is_asked_so_and_its_reflection_is_looked_at(folder, data, tmp_path, capsys):
    options = ("--data", data, "--max-tokens", 12, "--samples", 2, "--limit", 2, "--reflection", "--json")
    tree = json.loads(prints(capsys, "eval", folder, "--tasks", "gsm8k", "--out", tmp_path, *options))
    (row,) = tree["results"]
    assert row["protocol"] == "r1" and row["samples"] == 2 and row["full_samples"] == 16
    assert tree["subject"]["format"] == "r1"
    assert row["extra"]["reflection"]["traces"] == 4
    assert any("room for 12 tokens, not 32,768" in flag for flag in row["flags"])
    replies = [json.loads(line) for line in (tmp_path / "replies" / "gsm8k.jsonl").open()]
    assert all(reply["text"].startswith("<think>\n") for reply in replies)


def test_bits_per_byte_of_any_text(folder, data, tmp_path, capsys):
    text = prints(capsys, "eval", folder, "--perplexity", data / "pile.txt", "--out", tmp_path)
    assert text.startswith("Pile, base: ") and "bits per byte" in text


def test_a_suite_runs_what_there_is_and_names_the_rest(folder, data, tmp_path, capsys):
    prints(capsys, "eval", folder, "--suite", "v3-paper", "--protocol", "base", "--data", data, "--out", tmp_path)
    rows = {row["benchmark"]: row for row in report_of(tmp_path)["suite"]["rows"]}
    assert rows["mmlu"]["verdict"] in ("not run", "fail") and rows["mmlu"]["value"] is not None
    assert (rows["humaneval"]["verdict"], rows["humaneval"]["reason"]) == ("not run", "data absent")
    assert "--tasks lm:piqa runs it" in rows["piqa"]["reason"]


def test_contamination_is_looked_for_in_texts(folder, tmp_path, capsys):
    words = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    own = put_rows(tmp_path / "own.jsonl", {"prompt": words, "answer": "x"}, {"prompt": "short", "answer": "y"})
    corpus = put(tmp_path / "corpus.txt", f"He said: {words}, and left.")
    options = ("--data", f"own={own}", "--out", tmp_path / "out", "--max-tokens", 4)
    prints(capsys, "eval", folder, "--tasks", "own", "--contamination", corpus, *options)
    (overlap,) = report_of(tmp_path / "out")["contamination"]
    assert overlap["found"] == 1 and overlap["too_short"] == 1


def test_token_shards_are_read_with_the_models_tokenizer(folder, tmp_path, capsys):
    words = "the cat sat on the mat and said one and one is two a cat is a cat"
    own = put_rows(tmp_path / "own.jsonl", {"prompt": words, "answer": "x"})
    (tmp_path / "shards").mkdir()
    source = MemorySource("code", [Document("a", f"He wrote: {words}."), Document("b", "nothing of the kind")])
    prepare([source], Tokenizer.load(folder), tmp_path / "shards", validation_fraction=0.0)
    options = ("--data", f"own={own}", "--out", tmp_path / "out", "--max-tokens", 4)
    corpus = tmp_path / "shards" / "code"
    prints(capsys, "eval", folder, "--tasks", "own", "--contamination", corpus, *options)
    (overlap,) = report_of(tmp_path / "out")["contamination"]
    assert (overlap["found"], overlap["documents"]) == (1, 2)
    assert overlap["hits"][0]["where"].startswith(f"{corpus}, document ")
    manifest = json.loads((corpus / "manifest.json").read_text())
    (corpus / "manifest.json").write_text(json.dumps(manifest | {"tokenizer": "other"}))
    asked = ("eval", folder, "--tasks", "own", "--contamination", corpus, *options)
    assert "was made with another tokenizer" in fails_in(capsys, *map(str, asked))
    assert report_of(tmp_path / "out")["results"]  # what was measured before is reported


@pytest.mark.peer
def test_tasks_of_lm_eval_stand_beside_ours(folder, data, tmp_path, capsys, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yaml = f"""task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}/own.jsonl}}, cache_dir: {tmp_path}/cache}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["Q:"], max_gen_toks: 8}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
    put(tmp_path / "tasks" / "sums.yaml", yaml)
    where = ("--harness-path", tmp_path / "tasks", "--data", data, "--out", tmp_path / "out", "--limit", 2)
    prints(capsys, "eval", folder, "--tasks", "lm:sums,pile", *where)
    assert [row["task"] for row in report_of(tmp_path / "out")["results"]] == ["pile", "lm:sums"]


# Servers


def ask_server(server, out: Path, *options: object) -> tuple[str, ...]:
    own = put_rows(out.parent / "own.jsonl", *[{"prompt": f"{i} + 1 =", "answer": i + 1} for i in range(8)])
    where = ("--name", "tutor", "--data", f"own={own}", "--out", out, "--concurrency", 2, "--retries", 1)
    return tuple(map(str, ("eval", server.base, "--tasks", "own", "--protocol", "greedy", *where, *options)))


def adds(body: dict) -> dict:
    return completion(str(int(last_words(body).split()[0]) + 1))


def test_a_server_is_asked_and_what_passes_is_tried_again(tmp_path, capsys):
    with serving() as server:
        server.answer = adds
        server.plan = [answers_with(503), hangs_up, answers_with(429)]
        text = prints(capsys, *ask_server(server, tmp_path / "out"), "--retries", 3)
    assert text.startswith("own, greedy: 100.0 [67.6, 100.0], accuracy, 8 of 8 items")
    assert report_of(tmp_path / "out")["subject"]["device"] == "server"
    assert {body["seed"] for body in server.bodies if "seed" in body} and server.bodies[0]["temperature"] == 0


def test_a_server_that_dies_costs_the_rest_only(tmp_path, capsys):
    with serving() as server:
        command = ask_server(server, tmp_path / "out")
        answered = 0

        def until_four(body: dict) -> dict:
            nonlocal answered
            answered += 1
            if answered == 4:
                server.plan = [answers_with(500)] * 99
            return adds(body)

        server.answer = until_four
        assert cli.main([*command, "--backend", "cpu"]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "replies are kept in" in error and "go on with: dsv3 eval " in error
        kept = len((tmp_path / "out" / "replies" / "own.jsonl").read_text().splitlines())
        assert 4 <= kept < 8
        server.plan, server.bodies, server.answer = [], [], adds
        assert prints(capsys, *command).startswith("own, greedy: 100.0")
        assert len(server.bodies) == 8 - kept


def test_tasks_that_were_finished_are_reported_when_a_later_one_fails(tmp_path, capsys):
    one = put_rows(tmp_path / "one.jsonl", {"prompt": "1 + 1 =", "answer": 2})
    with serving() as server:
        server.answer = lambda body: (
            adds(body) if len(server.bodies) < 4 else server.plan.append(hangs_up) or adds(body)
        )
        command = ask_server(server, tmp_path / "out", "--tasks", "one,own", "--data", f"one={one}", "--retries", 0)
        assert "own: " in fails_in(capsys, *command)
    assert [row["task"] for row in report_of(tmp_path / "out")["results"]] == ["one"]


def test_a_question_that_the_server_refuses_costs_no_more_than_itself(tmp_path, capsys):
    with serving() as server:
        server.answer = adds
        server.plan = [answers_with(400, "too long for the context")]
        text = prints(capsys, *ask_server(server, tmp_path / "out"))
    assert text.startswith("own, greedy: 87.5 [") and "refused, and so wrong: 1 question (" in text
    with serving() as server:
        server.plan = [answers_with(400, "max_tokens is too large")] * 8
        error = fails_in(capsys, *ask_server(server, tmp_path / "other"))
    assert "every question was refused" in error and "max_tokens is too large" in error


def fails_in(capsys, *argv: str) -> str:
    """The error, where progress was shown before it."""
    assert cli.main([*argv, "--backend", "cpu"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("dsv3: error: ")
    return line


def test_needles_for_a_server_need_its_context(tmp_path, capsys):
    with serving() as server:
        server.answer = lambda body: completion("no")
        where = (server.base, "--name", "tutor", "--tasks", "needle", "--out", tmp_path, "--protocol", "v3")
        assert "give --context, or the lengths" in fails_in(capsys, "eval", *map(str, where))
        text = prints(capsys, "eval", *where, "--context", 512, "--lengths", "256,512")
    assert "Needle in a haystack, v3: 0.0" in text
    assert len(server.bodies) == 22 and max(len(last_words(body)) for body in server.bodies) < 512 * 4


# What is wrong


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((), "nothing to measure: give --tasks, --suite or --perplexity"),
        (("--tasks", "gsm8"), "unknown task 'gsm8'; did you mean 'gsm8k'?"),
        (("--tasks", "gsm8k"), "gsm8k: the data is missing; give --data gsm8k=PATH, where PATH is"),
        (("--tasks", "gsm8k", "--data", "nowhere"), "--data nowhere: no such folder"),
        (("--tasks", "gsm8k", "--data", "gsm8k=nowhere"), "gsm8k: nowhere does not exist; expected the folder"),
        (("--tasks", "gsm8k", "--protocol", "r3"), "unknown protocol 'r3'"),
        (("--suite", "v4"), "unknown suite 'v4'"),
        (("--suite", "v3-paper"), "none of its data is in --data, which is not given"),
        (("--tasks", "needle", "--lengths", "1k"), "--lengths: '1k' is no list of whole numbers"),
        (("--tasks", "needle", "--lengths", "4096"), "lengths go from 128 to the context of 256"),
        (("--tasks", "needle", "--data", "gsm8k=x"), "--data gsm8k=x is for no task that is run"),
        (("--perplexity", "nowhere.txt"), "nowhere.txt does not exist; expected text"),
        (("--tasks", "needle", "--samples", "0"), "--samples must be 1 or more"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(folder, tmp_path, capsys, argv, said):
    assert said in fails_in(capsys, "eval", str(folder), *argv, "--out", str(tmp_path))


def test_servers_are_named_and_reached(tmp_path, capsys):
    with serving() as server:
        base = ("eval", server.base, "--tasks", "needle", "--lengths", 128, "--out", tmp_path)
        assert "say which of the server's models is meant" in fails_in(capsys, *map(str, base))
        assert "it has tutor" in fails_in(capsys, *map(str, base), "--name", "guru")
        assert "--body must be a JSON object" in fails_in(capsys, *map(str, base), "--name", "tutor", "--body", "[1")
    assert "does not answer" in fails_in(capsys, *map(str, base), "--name", "tutor")


def test_the_list_needs_no_model(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["eval", "--list"])
    assert ended.value.code in (0, None)
    assert "gsm8k" in capsys.readouterr().out


def test_the_usual_protocol(folder):
    assert usual_protocol(None) == "v3" and usual_protocol(Tokenizer.load(folder)) == "r1"
    assert usual_protocol(TOKENIZER) in ("v3", "base")


# From a program


def test_a_program_measures_a_directory_on_its_own_questions(folder, data, tmp_path):
    questions, options = {"arithmetic": data / "own.jsonl"}, Options(tmp_path, max_tokens=8, limit=4)
    results = evaluate(folder, questions, options, Silent(), machine={"cpu": "two cores"}, command="make quickstart")
    assert [(row.task, row.items, row.of) for row in results] == [("arithmetic", 4, 5)]
    tree = report_of(tmp_path)
    assert (tree["command"], tree["machine"]) == ("make quickstart", {"cpu": "two cores"})
    assert tree["subject"]["parameters"] > 1000 and tree["subject"]["device"] == "cpu"
    with pytest.raises(UserError, match="does not exist"):
        evaluate(folder, {"arithmetic": data / "no.jsonl"}, options, Silent())
