"""Calls that may hang, eat memory or crash, made in a process of their own that can be killed.

A `Worker` starts this file as a script. That server imports the wanted function once and then forks a child for every
batch of calls, so a child that must be killed costs milliseconds, and nothing that one batch leaves behind (caches,
memory) reaches the next. The kernel ends a call that takes too long: its child has an armed timer whose signal nobody
handles, which also works while the interpreter is inside one long multiplication and hears no other clock.

The server never imports this package, let alone torch; it ends when the process that started it does.
"""

import contextlib
import importlib.util
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

_LENGTH = struct.Struct("<I")
# Processes share the machine: a call may wait this many times its CPU time before it counts as hanging.
WAITING = 4
# Heavy imports on a busy machine.
START_SECONDS = 300.0


class WorkerError(RuntimeError):
    """The server could not be started or lost its mind; the text says why."""


@dataclass(frozen=True)
class Answer:
    """How a call ended. value: what it returned, None when it failed. failure: what stopped it, None when it returned.

    "crash" is an end by any other signal or exit, running out of memory included.
    """

    value: Any = None
    failure: Literal["timeout", "crash"] | None = None


class Worker:
    """Calls `function` of the file `module` with arguments and results that JSON can say. Any thread may use it.

    timeout: CPU seconds a call may take (and `WAITING` times as much on the clock). memory_mib: its address space.
    argument: if given, the server calls `function` with it once, and what that returns is what it makes the calls of.
    An exception in the function counts as a crash of that call. Started by the first call; a context manager.
    """

    def __init__(
        self, module: Path, function: str, timeout: float, memory_mib: int = 4096, argument: str | None = None
    ):
        self.module, self.function, self.timeout, self.memory_mib = module, function, timeout, memory_mib
        self._argument = argument
        self._lock = threading.Lock()
        self._server: subprocess.Popen[bytes] | None = None
        self._close: Callable[[], Any] = lambda: None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes. A later call starts new ones."""
        with self._lock:
            self._stop()

    def map(self, calls: Sequence[Sequence[Any]]) -> list[Answer]:
        """One answer to each of `calls`, which are lists of arguments. WorkerError when the server does not work."""
        if not calls:
            return []
        with self._lock:
            try:
                return self._map(calls)
            except BaseException:
                # Half an exchange is left in the pipes (an interrupt, a dead server): nobody may read it.
                self._stop()
                raise

    def _map(self, calls: Sequence[Sequence[Any]]) -> list[Answer]:
        if self._server is None or self._server.poll() is not None:
            self._stop()
            self._start()
        assert self._server is not None and self._server.stdin is not None and self._server.stdout is not None
        try:
            _send(self._server.stdin.fileno(), [list(call) for call in calls])
            patience = WAITING * self.timeout + 60
            return [Answer(*_receive(self._server.stdout.fileno(), patience)) for _ in calls]
        except (OSError, EOFError) as error:
            raise WorkerError(f"the worker for {self.module.name} ended unexpectedly: {error}") from error

    def _start(self) -> None:
        # -P: the script's own folder must not be importable, it may hold names of the standard library.
        # Fixed hashes: the order of sets must not decide what a symbolic comparison finds.
        settings = [str(self.module), self.function, str(self.timeout), str(self.memory_mib)]
        settings += [] if self._argument is None else [self._argument]
        self._server = subprocess.Popen(
            [sys.executable, "-P", __file__, *settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        self._close = weakref.finalize(self, _end, self._server)
        assert self._server.stdout is not None
        try:
            problem = _receive(self._server.stdout.fileno(), START_SECONDS)
        except (OSError, EOFError) as error:
            problem = str(error)
        if problem is not None:
            self._stop()
            raise WorkerError(f"the worker for {self.module.name} does not start: {problem}")

    def _stop(self) -> None:
        self._close()
        self._server = None


def _end(server: subprocess.Popen[bytes]) -> None:
    """The server reads the end of its input as the order to end; one that does not obey at once is killed."""
    assert server.stdin is not None and server.stdout is not None
    with contextlib.suppress(OSError):
        server.stdin.close()
    try:
        server.wait(1)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    server.stdout.close()


def _send(fd: int, message: Any) -> None:
    body = json.dumps(message).encode()
    data = memoryview(_LENGTH.pack(len(body)) + body)
    while data:
        data = data[os.write(fd, data) :]


def _receive(fd: int, timeout: float | None = None) -> Any:
    (length,) = _LENGTH.unpack(_read(fd, _LENGTH.size, timeout))
    return json.loads(_read(fd, length, timeout))


def _read(fd: int, size: int, timeout: float | None) -> bytes:
    data = b""
    deadline = None if timeout is None else time.monotonic() + timeout
    while len(data) < size:
        if deadline is not None and not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise EOFError(f"no answer for {timeout:.0f} s")
        piece = os.read(fd, size - len(data))
        if not piece:
            raise EOFError("it closed its pipe")
        data += piece
    return data


# ---- The server: what runs when this file is a script.


def _serve(module: str, function: str, timeout: float, memory_mib: int, *argument: str) -> None:
    # What the module prints must not get between the messages.
    requests, replies = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    try:
        call = _load(Path(module), function)
        if argument:
            call = call(*argument)
    except BaseException as error:
        return _send(replies, f"{type(error).__name__}: {error}")
    _send(replies, None)
    parent = os.getppid()
    while _input(requests, parent):
        calls = _receive(requests)
        done = 0
        while done < len(calls):
            done += _batch(call, calls[done:], timeout, memory_mib, requests, replies)


def _load(path: Path, function: str) -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location(path.stem + "_of_worker", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)


def _input(requests: int, parent: int) -> bool:
    """Waits for a request. False: the parent has ended. A fork of the parent may keep the pipe open, so it is also
    asked whose child this is."""
    while not select.select([requests], [], [], 5.0)[0]:
        if os.getppid() != parent:
            return False
    return not _closed(requests)


def _closed(pipe: int) -> bool:
    """Whether the readable `pipe` has nothing more to say, without reading from it."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    return all(not event & select.POLLIN for _, event in poll.poll(0))


def _batch(
    call: Callable[..., Any],
    calls: list[list[Any]],
    timeout: float,
    memory_mib: int,
    requests: int,
    replies: int,
) -> int:
    """Makes `calls` in a child until one of them ends it. Answers to the parent; returns how many were answered."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        # Held open here, they would hide from the others that the server has died.
        for fd in (reading, requests, replies):
            os.close(fd)
        _compute(call, calls, timeout, memory_mib, writing)
    os.close(writing)
    answered = 0
    try:
        while True:
            poll = select.poll()
            poll.register(reading, select.POLLIN)
            poll.register(requests, 0)  # only its end is news
            if any(fd == requests for fd, _ in poll.poll()):
                os.kill(child, signal.SIGKILL)
                os._exit(0)
            try:
                value = _receive(reading)
            except EOFError:
                break
            _send(replies, [value, None])
            answered += 1
    finally:
        os.close(reading)
        _, status = os.waitpid(child, 0)
    if answered < len(calls):
        late = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGALRM)
        _send(replies, [None, "timeout" if late else "crash"])
        answered += 1
    return answered


def _compute(call: Callable[..., Any], calls: list[list[Any]], timeout: float, memory_mib: int, out: int) -> None:
    """The child's life. It never returns."""
    try:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        with contextlib.suppress(OSError, ValueError):  # macOS knows the limit and refuses it
            resource.setrlimit(resource.RLIMIT_AS, (memory_mib << 20, memory_mib << 20))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for arguments in calls:
            signal.setitimer(signal.ITIMER_PROF, timeout)
            signal.setitimer(signal.ITIMER_REAL, WAITING * timeout)
            _send(out, call(*arguments))
    except BaseException:
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])
