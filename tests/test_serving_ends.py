"""How a server in a process of its own, with an engine in another, ends: on a signal, and when either is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from serving_server import TEXT, save_model, serve, until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("served") / "tiny")


def test_case_19_on_sigterm_streams_finish_and_nothing_new_is_taken(model: Path):
    with serve(model, "--cache-gib", "0.01", "--drain", "120") as served:
        engine = served.engine_pid()
        with served.streaming(max_tokens=300) as running:
            chunks = [next(running)]
            served.process.send_signal(signal.SIGTERM)
            until(lambda: served.client.get("/ready").json() == {"status": "draining"})
            refused = served.post(TEXT, {"prompt": "a"})
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
            assert served.client.get("/health").status_code == 200
            chunks += running
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert served.ended() == 0
        assert not Path(f"/proc/{engine}").exists()


def test_case_21_when_the_engine_is_killed_the_server_says_so_and_ends(model: Path):
    with serve(model, "--cache-gib", "0.01") as served:
        with served.streaming() as running:
            next(running)
            os.kill(served.engine_pid(), signal.SIGKILL)
            *_, last = running
        assert last["error"]["code"] == "engine_dead"
        assert served.ended() == 1
        assert "the engine is gone" in served.log.read_text()


def test_case_21_when_the_server_is_killed_the_engine_ends(model: Path):
    with serve(model, "--cache-gib", "0.01") as served:
        engine = served.engine_pid()
        served.process.kill()
        until(
            lambda: not Path(f"/proc/{engine}").exists() or Path(f"/proc/{engine}/stat").read_text().split()[2] == "Z"
        )


def loading(model: Path) -> tuple["subprocess.Popen[str]", int]:
    """A server whose engine has just been started, and the engine's process."""
    command = [sys.executable, "-m", "dsv3", "serve", str(model), "--port", "0", "--backend", "cpu", "--threads", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until(lambda: "dsv3.engine_process" in "".join(map(command_line, children.read_text().split())))
    return process, int(children.read_text().split()[0])


def command_line(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:  # it has ended
        return ""


def test_on_sigterm_while_the_model_is_loaded_server_and_engine_end_with_one_line(model: Path):
    process, engine = loading(model)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert said.splitlines() == ["INFO dsv3.serve_verb: ended before the model was loaded"]
    assert not Path(f"/proc/{engine}").exists()


def test_an_engine_whose_server_is_killed_while_it_loads_says_nothing(model: Path):
    process, engine = loading(model)
    process.kill()
    _, said = process.communicate(timeout=60)  # the engine has its end of the pipe, too
    assert "Traceback" not in said
    until(lambda: not command_line(str(engine)))
