"""Calls in a process of their own: what comes back, and what happens when one does not."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dsv3.grading.worker import Answer, Worker, WorkerError

CALLS = '''
import os, sys, time

print("noise on standard output")

def call(kind, value=None):
    print("more noise")
    if kind == "loop":
        while True:
            pass
    if kind == "sleep":
        time.sleep(60)
    if kind == "multiply":
        return len(str((10 ** 9) ** (10 ** 9)))
    if kind == "deaf":
        import signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            pass
    if kind == "memory":
        return len(bytearray(value << 30))
    if kind == "raise":
        raise KeyError(value)
    if kind == "exit":
        os._exit(value)
    if kind == "leave":
        sys.exit(value)
    if kind == "pid":
        return os.getpid()
    if kind == "odd":
        return {1, 2}
    return value
'''  # fmt: skip


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("worker") / "calls.py"
    path.write_text(CALLS)
    return path


@pytest.fixture(scope="module")
def worker(script: Path) -> Iterator[Worker]:
    with Worker(script, "call", timeout=0.3, memory_mib=1024) as worker:
        yield worker


def test_answers_come_in_order_whatever_some_calls_do(worker: Worker):
    calls = [("say", 1), ("loop",), ("say", "zwei"), ("raise", 3), ("exit", 0), ("leave", 0), ("say", [3]), ("odd",)]
    assert worker.map(calls) == [
        Answer(1),
        Answer(failure="timeout"),
        Answer("zwei"),
        *[Answer(failure="crash")] * 3,
        Answer([3]),
        Answer(failure="crash"),
    ]
    assert worker.map([]) == []


@pytest.mark.parametrize(
    ("call", "failure"),
    [("loop", "timeout"), ("sleep", "timeout"), ("multiply", "timeout"), ("deaf", "timeout"), ("memory", "crash")],
)
def test_a_call_that_does_not_come_back_is_ended(worker: Worker, call: str, failure: str):
    began = time.monotonic()
    assert worker.map([(call, 4), ("say", 1)]) == [Answer(failure=failure), Answer(1)]
    assert time.monotonic() - began < 20


def test_a_batch_has_a_process_that_nothing_else_sees(worker: Worker):
    first, second = worker.map([("pid",), ("pid",)])
    (third,) = worker.map([("pid",)])
    assert first == second != third
    with pytest.raises(ProcessLookupError):
        os.kill(first.value, 0)


def test_the_server_can_prepare_what_it_calls(tmp_path: Path):
    script = tmp_path / "counting.py"
    script.write_text(
        "import os\ndef ready(text):\n    made = os.getpid()\n    return lambda more: [text + more, made]\n"
    )
    with Worker(script, "ready", timeout=0.3, argument="a") as worker:
        (first,), (second,) = worker.map([("b",)]), worker.map([("c",)])
    assert [first.value[0], second.value[0]] == ["ab", "ac"]
    assert first.value[1] == second.value[1]  # once, before the processes of the batches


def test_any_thread_may_call(worker: Worker):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: worker.map([("say", i), ("raise",)])[0].value, range(12)))
    assert found == list(range(12))


def test_a_server_that_died_is_started_again(script: Path):
    with Worker(script, "call", timeout=5.0) as worker:
        assert worker.map([("say", 1)]) == [Answer(1)]
        os.kill(worker._server.pid, signal.SIGKILL)
        worker._server.wait()
        assert worker.map([("say", 2)]) == [Answer(2)]


def test_a_server_that_dies_while_it_is_asked_says_so(script: Path):
    with Worker(script, "call", timeout=5.0) as worker:
        worker.map([("say", 1)])
        threading.Timer(0.3, os.kill, (worker._server.pid, signal.SIGKILL)).start()
        began = time.monotonic()
        with pytest.raises(WorkerError, match=r"calls\.py ended unexpectedly"):
            worker.map([("sleep",)])
        assert time.monotonic() - began < 5  # not when the call's own time is over
        assert worker.map([("say", 2)]) == [Answer(2)]


def test_a_module_that_cannot_be_imported_is_named(tmp_path: Path):
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_this_name\n")
    with Worker(broken, "call", timeout=1.0) as worker, pytest.raises(WorkerError, match="nothing_of_this_name"):
        worker.map([("say",)])


def test_closing_ends_the_server(script: Path):
    worker = Worker(script, "call", timeout=5.0)
    worker.map([("say", 1)])
    server = worker._server
    assert server is not None
    worker.close()
    assert server.returncode is not None


def test_the_server_ends_with_whoever_started_it(script: Path):
    """Even if that one is killed while a call runs."""
    code = (
        "import sys; from pathlib import Path; from dsv3.grading.worker import Worker\n"
        f"w = Worker(Path({str(script)!r}), 'call', 60.0)\n"
        "print(w.map([('pid',)])[0].value, w._server.pid, flush=True)\n"
        "w.map([('sleep',)])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    server = int(process.stdout.readline().split()[1])
    time.sleep(0.2)
    process.kill()
    process.wait()
    process.stdout.close()
    for _ in range(200):
        if not running(server):
            break
        time.sleep(0.05)
    assert not running(server)


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
