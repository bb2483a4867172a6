"""Samples are kept one by one: whatever ends the process, none is lost and none is drawn twice."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import distilling
import openai_server
import pytest
from distilling import Teacher, config_of, questions, read_rows, sum_of, thinking, write_rows
from hypothesis import given
from hypothesis import strategies as st
from openai_server import completion, last_words

from dsv3.core import endpoint
from dsv3.errors import UserError
from dsv3.training.distill.config import DistillConfig
from dsv3.training.distill.prompts import load_prompts, seeds
from dsv3.training.distill.worklog import WorkLog


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "prompts.jsonl", questions(6))


def right(question: str, seed: int) -> str:
    return thinking(sum_of(question))


def keys(config: DistillConfig) -> list[tuple[str, int]]:
    folder = Path(config.run_dir)
    files = [folder / "samples.jsonl", *sorted(folder.glob("samples.*.jsonl"))]
    return [(row["prompt"], row["seed"]) for file in files if file.exists() for row in read_rows(file)]


def wanted(config: DistillConfig) -> set[tuple[str, int]]:
    found = load_prompts(config.data.prompts)
    return {(p.id, s) for p in found for s in seeds(p.id, config.seed, config.sampling.samples)}


def test_every_prompt_is_asked_as_often_as_wanted_each_time_with_another_seed(tmp_path: Path, prompts: Path) -> None:
    config, teacher = config_of(tmp_path, prompts, sampling={"samples": 3}), Teacher(right)
    distilling.run(config, teacher)
    assert Counter(question for question, _ in teacher.asked) == {row["prompt"]: 3 for row in questions(6)}
    assert len({seed for _, seed in teacher.asked}) == 18
    assert set(keys(config)) == wanted(config) and len(keys(config)) == 18
    # All prompts have their first sample before any has its second: an early end has seen all of them.
    assert len({question for question, _ in teacher.asked[:6]}) == 6


def test_a_second_run_asks_nothing_and_more_samples_ask_only_for_these(tmp_path: Path, prompts: Path) -> None:
    config = config_of(tmp_path, prompts)
    first, again, more = Teacher(right), Teacher(right), Teacher(right)
    distilling.run(config, first)
    distilling.run(config, again)
    assert again.asked == []
    distilling.run(config_of(tmp_path, prompts, sampling={"samples": 5, "max_tokens": 64}), more)
    assert len(more.asked) == 18
    assert not set(more.asked) & set(first.asked)


def test_another_order_of_the_prompts_changes_no_seed(tmp_path: Path) -> None:
    asked = []
    for name, rows in (("a", questions(5)), ("b", questions(5)[::-1])):
        (tmp_path / name).mkdir()
        teacher = Teacher(right)
        distilling.run(config_of(tmp_path / name, write_rows(tmp_path / f"{name}.jsonl", rows)), teacher)
        asked.append(set(teacher.asked))
    assert asked[0] == asked[1]


@given(st.text(max_size=8), st.integers(0, 2**40), st.integers(1, 200))
def test_the_seeds_of_a_prompt_differ_and_fit_every_server(prompt: str, seed: int, count: int) -> None:
    found = seeds(prompt, seed, count)
    assert len(set(found)) == count and min(found) >= 0 and max(found) < 2**31
    assert seeds(prompt, seed, count + 1)[:count] == found


def test_an_error_of_the_teacher_keeps_what_it_had_written(tmp_path: Path, prompts: Path) -> None:
    config = config_of(tmp_path, prompts)

    def tires(question: str, seed: int) -> str:
        if len(weak.asked) == 8:
            raise UserError("the teacher is tired")
        return right(question, seed)

    weak, fresh = Teacher(tires), Teacher(right)
    with pytest.raises(UserError, match="tired"):
        distilling.run(config, weak)
    assert len(keys(config)) == 7
    distilling.run(config, fresh)
    assert len(fresh.asked) == 5
    assert len(keys(config)) == 12 and set(keys(config)) == wanted(config)


def test_a_line_that_a_kill_tore_is_drawn_again(tmp_path: Path, prompts: Path) -> None:
    config, again = config_of(tmp_path, prompts), Teacher(right)
    distilling.run(config, Teacher(right))
    path = tmp_path / "run" / "samples.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    distilling.run(config, again)
    assert len(again.asked) == 1
    assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_samples_of_other_settings_are_not_mixed(tmp_path: Path, prompts: Path) -> None:
    distilling.run(config_of(tmp_path, prompts), Teacher(right))
    warmer = config_of(tmp_path, prompts, sampling={"samples": 2, "max_tokens": 64, "temperature": 1.0})
    with pytest.raises(UserError, match=r"drawn otherwise \(sampling.temperature has changed\)"):
        distilling.run(warmer, Teacher(right))
    other = {"endpoint": "http://127.0.0.1:9/v1", "served_model": "other"}
    with pytest.raises(UserError, match=r"teacher\.teacher has changed"):
        distilling.run(config_of(tmp_path, prompts, teacher=other), Teacher(right))
    with pytest.raises(UserError, match="seed has changed"):
        distilling.run(config_of(tmp_path, prompts, seed=1), Teacher(right))


def test_a_system_message_is_asked_with_and_not_kept(tmp_path: Path, prompts: Path) -> None:
    seen = []

    class Listening(Teacher):
        def complete(self, conversations, params, on_reply=None):  # type: ignore[no-untyped-def]
            seen.extend(conversations)
            return super().complete(conversations, params, on_reply)

    config = config_of(tmp_path, prompts, sampling={"samples": 1, "system": "Think well."})
    distilling.run(config, Listening(right))
    assert all(conversation[0] == {"role": "system", "content": "Think well."} for conversation in seen)
    assert all(row["messages"][0]["role"] == "user" for row in distilling.traces(config))


def test_prompts_may_be_conversations_and_are_asked_once_each(tmp_path: Path) -> None:
    talk = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "What is 1 plus 2?"},
    ]
    answered = [*talk, {"role": "assistant", "content": "3"}]
    rows = [{"prompt": talk}, {"prompt": talk}, {"messages": answered}, {"prompt": "What is 1 plus 2?", "id": 7}]
    found = load_prompts([str(write_rows(tmp_path / "rows.jsonl", rows))])
    assert [len(prompt.messages) for prompt in found] == [3, 1]
    assert found[1].id == "7"
    with pytest.raises(UserError, match=r"line 2: its id '1' is that of another prompt"):
        load_prompts([str(write_rows(tmp_path / "ids.jsonl", [{"prompt": "a", "id": 1}, {"prompt": "b", "id": 1}]))])
    with pytest.raises(UserError, match="no message of a user"):
        load_prompts([str(write_rows(tmp_path / "odd.jsonl", [{"prompt": [{"role": "system", "content": "x"}]}]))])


# Through a server, and through death.


def solve(body: dict) -> dict:
    return completion(str(sum_of(last_words(body))), reasoning_content="I add the two numbers")


def served(folder: Path, prompts: Path, base: str, **tables: object) -> DistillConfig:
    teacher = {"endpoint": base, "served_model": "tutor", "concurrency": 2, "retries": 2}
    return config_of(folder, prompts, teacher=teacher, **tables)


def test_an_endpoint_that_dies_and_comes_back_loses_nothing_and_doubles_nothing(
    tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "FIRST_DELAY", 0.01)
    first = openai_server.Server()
    first.answer = solve
    config = served(tmp_path, prompts, first.base, sampling={"samples": 10})
    died_after = 13

    def dying(body: dict) -> dict:
        if len(first.bodies) >= died_after:
            first.plan = [openai_server.hangs_up] * 1000
        return solve(body)

    first.answer = dying
    with pytest.raises(UserError, match="no answer after 3 tries"):
        distilling.run(config)
    first.close()
    before = keys(config)
    assert died_after - 2 <= len(before) < 60
    with openai_server.serving(first.port) as second:
        second.answer = solve
        report = distilling.run(config)
        assert len(second.bodies) == 60 - len(before)
    assert len(keys(config)) == 60 and set(keys(config)) == wanted(config)
    assert report["samples"] == 60 and report["rejected"] == {"duplicate": 54}


def test_a_refused_prompt_is_counted_and_asked_only_once(tmp_path: Path, prompts: Path) -> None:
    with openai_server.serving() as server:

        def answer(body: dict) -> dict:
            return solve(body)

        server.answer = answer
        server.plan = [lambda handler: openai_server.send(handler, 400, {"error": {"message": "too long"}})]
        config = served(tmp_path, prompts, server.base, sampling={"samples": 1})
        report = distilling.run(config)
        assert report["rejected"] == {"refused": 1} and report["kept"] == 5
        distilling.run(config)
        assert len(server.bodies) == 6


def test_where_all_requests_are_refused_that_is_the_error(tmp_path: Path, prompts: Path) -> None:
    with openai_server.serving() as server:
        server.plan = [openai_server.fails(400, "temperature must be 1")] * 100
        with pytest.raises(UserError, match=r"refuses the request \(400 temperature must be 1"):
            distilling.run(served(tmp_path, prompts, server.base))


def test_a_wrong_model_name_is_said_before_anything_is_asked(tmp_path: Path, prompts: Path) -> None:
    with openai_server.serving() as server:
        server.models = ["other"]
        with pytest.raises(UserError, match="has no model 'tutor'; it has other"):
            distilling.run(served(tmp_path, prompts, server.base))
        assert server.bodies == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_goes_on_where_it_was(tmp_path: Path, prompts: Path, number: signal.Signals) -> None:
    with openai_server.serving() as server:
        server.answer = lambda body: time.sleep(0.05) or solve(body)  # type: ignore[func-returns-value]
        config = served(tmp_path, prompts, server.base, sampling={"samples": 8})
        path = tmp_path / "distill.toml"
        path.write_text(config.to_toml())
        environment = dict(
            os.environ, PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        )
        argv = [sys.executable, distilling.__file__, str(path)]
        process = subprocess.Popen(argv, env=environment, stderr=subprocess.DEVNULL)
        while len(server.bodies) < 20:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(30) != 0
        asked = len(server.bodies)
        before = keys(config)
        assert asked - 4 <= len(before) <= asked
        assert subprocess.run(argv, env=environment, stderr=subprocess.DEVNULL).returncode == 0
        assert len(keys(config)) == 48 and set(keys(config)) == wanted(config)
        assert keys(config)[: len(before)] == before
        assert len(server.bodies) <= 48 + 2  # those under way at the end were asked in vain
    report = json.loads((tmp_path / "run" / "filter_report.json").read_text())
    assert report["samples"] == 48


# The log itself.


def test_results_of_several_processes_are_one_log_and_the_first_of_a_key_counts(tmp_path: Path) -> None:
    log = WorkLog(tmp_path, "work", ("key",))
    for rank, values in ((0, [1, 2]), (3, [2, 3])):
        with log.open(rank):
            for value in values:
                log.append({"key": value, "rank": rank})
    assert sorted(path.name for path in log.files()) == ["work.3.jsonl", "work.jsonl"]
    places = log.places()
    assert log.read(places.values()) == [{"key": 1, "rank": 0}, {"key": 2, "rank": 0}, {"key": 3, "rank": 3}]
    assert log.read([places[(3,)], places[(1,)]]) == [{"key": 3, "rank": 3}, {"key": 1, "rank": 0}]


@given(st.lists(st.text(max_size=20), min_size=1, max_size=5), st.data())
def test_a_log_cut_anywhere_keeps_its_whole_lines_and_can_be_gone_on_with(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], data: st.DataObject
) -> None:
    log = WorkLog(tmp_path_factory.mktemp("log"), "work", ("n",))
    with log.open():
        for n, text in enumerate(texts):
            log.append({"n": n, "text": text})
    path = log.directory / "work.jsonl"
    size = data.draw(st.integers(0, path.stat().st_size))
    os.truncate(path, size)
    left = log.read(log.places().values())
    assert [record["text"] for record in left] == texts[: len(left)]
    with log.open():
        log.append({"n": 99, "text": "after"})
    assert [record["n"] for record in log.read(log.places().values())] == [*range(len(left)), 99]


def test_a_full_disk_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = WorkLog(tmp_path, "work", ("n",))
    with log.open():
        monkeypatch.setattr(os, "write", lambda file, data: len(data) // 2)
        with pytest.raises(UserError, match="the disk is full; make room"):
            log.append({"n": 1})
        monkeypatch.undo()


def test_nobody_at_the_endpoint_is_one_line(tmp_path: Path, prompts: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        base = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(UserError, match="is the server running there"):
        distilling.run(served(tmp_path, prompts, base))
