"""`dsv3 serve` with a tiny model, started once for many tests, and the same engine in a thread of this process."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
from tiny_model import CONFIG, save

from dsv3.serving.engine import Engine
from dsv3.serving.messages import EngineInfo, ToEngine
from dsv3.serving.process import Loop
from dsv3.serving.wire import Wire

CONTEXT = 16_384  # a text of so many tokens takes minutes: what runs, runs until a test is done with it
LONG = CONFIG.replace(max_position_embeddings=CONTEXT)
ROOT = Path(__file__).parent.parent
PATIENCE = 60.0  # seconds, on a machine that has other work too
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
ENDLESS = {"prompt": "the cat", "ignore_eos": True, "seed": 1}


def save_model(folder: Path, format: str = "v3.1") -> Path:
    return save(folder, format, config=LONG)


@dataclass
class Served:
    """A running server. log: what it wrote to stderr. key: sent with every request."""

    process: "subprocess.Popen[str]"
    url: str
    log: Path
    client: httpx.Client
    key: str = ""

    def post(self, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
        return self.client.post(path, json=body, headers=headers)

    @contextmanager
    def streaming(self, path: str = TEXT, **body: Any) -> "Iterator[Iterator[dict[str, Any]]]":
        """The events of a stream, which is given up where the block ends early."""
        with self.client.stream("POST", path, json={**ENDLESS, "stream": True, **body}) as response:
            assert response.status_code == 200, response.read()
            yield events(response.iter_lines())

    def asked(self, path: str = TEXT, **body: Any) -> HTTPConnection:
        """A connection on which a request was sent, and nothing read yet."""
        connection = HTTPConnection(*self.client.base_url.netloc.decode().split(":"), timeout=PATIENCE)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        connection.request("POST", path, json.dumps({**ENDLESS, **body}), headers)
        return connection

    def metric(self, name: str) -> float:
        """The one value that the server's page of metrics has under this name."""
        lines = self.client.get("/metrics").text.splitlines()
        return float(next(line.rpartition(" ")[2] for line in lines if line.startswith(f"vllm:{name}{{")))

    @property
    def running(self) -> int:
        return int(self.metric("num_requests_running"))

    @property
    def waiting(self) -> int:
        return int(self.metric("num_requests_waiting"))

    def settle(self) -> None:
        """Wait until no request is left and every block is free, as it was at the start.

        What the page says may be older than what a test just did: a token that is asked for now makes it new.
        """
        before = self.metric("generation_tokens_total")
        body = {"prompt": "the cat", "max_tokens": 1, "ignore_eos": True}
        until(lambda: self.post(TEXT, body).status_code == 200)
        until(lambda: self.metric("generation_tokens_total") > before and self.running == self.waiting == 0)
        until(lambda: self.metric("kv_cache_usage_perc") == 0, seconds=5)

    def engine_pid(self) -> int:
        pid = self.process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def ended(self) -> int:
        """The exit code, once there is one."""
        return self.process.wait(PATIENCE)


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Of server-sent events, up to the one that says that it is over, which must come."""
    for line in lines:
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))
    raise AssertionError("the stream broke off")


@contextmanager
def serve(model: Path, *options: str, key: str = "", launcher: Sequence[str] = (sys.executable,)) -> Iterator[Served]:
    """`dsv3 serve MODEL OPTIONS` on a free port of this machine. launcher: what starts `-m dsv3`."""
    command = [*launcher, "-m", "dsv3", "serve", str(model), "--port", "0", "--backend", "cpu", "--threads", "1"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    log = model.with_name(f"{model.name}-{time.monotonic_ns()}.log")
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=stderr, text=True, env=env, start_new_session=True
        )
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith("serving on ")), "")
        assert line, f"the server did not start:\n{log.read_text()}"
        url = line.split()[-1].removesuffix("/v1")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_keepalive_connections=None)
        with httpx.Client(base_url=url, headers=headers, timeout=PATIENCE, limits=limits) as client:
            yield Served(process, url, log, client, key)
    finally:
        end(process)


def end(process: "subprocess.Popen[str]") -> None:
    """Ask it to end, and see to it."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    finally:
        assert process.stdout is not None
        process.stdout.close()


def until(condition: Callable[[], Any], seconds: float = PATIENCE) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)


@contextmanager
def looping(engine: Engine, capacity: int, name: str = "tiny") -> Iterator[socket.socket]:
    """The loop of the engine's process, in a thread; the server's end of its socket."""
    ours, theirs = socket.socketpair()
    wire: Wire[ToEngine] = Wire(theirs, ToEngine)
    settings, page = engine.settings, engine.runner.page_size
    wire.send(EngineInfo(name, settings.context, settings.vocab_size, page, capacity, "cpu"))

    def work() -> None:
        Loop(wire, engine).run()
        theirs.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield ours
    finally:
        ours.close()
        thread.join(PATIENCE)
        assert not thread.is_alive()
        engine.close()
