"""Runs Python programs that nobody has read, against tests, where they can do no harm and cannot cheat.

Two walls, the first one preferred:

- bubblewrap: namespaces of their own (no network, no other processes, no files but Python's), with the second wall
  inside.
- seccomp: limits, no capabilities, a filter of system calls, and Landlock where the kernel has it (`jail`).

What holds behind both: no network, no other program, no process besides the two of the run, no file can be written,
no signal reaches anybody; memory, time, threads and output are bounded, and when the time is over, all is killed.
Files: behind bubblewrap or Landlock nothing can be read but Python itself and the system's libraries. With seccomp
alone, programs can read what this user can read, though they can tell nobody but whoever reads their output;
`Sandbox.description` says so. Not claimed: safety from faults in the kernel.

That a program passed is said by the tests' process alone, which the program never meets (`harness`), on a pipe that it
does not have, with a number that it never saw. Exit codes and what it prints say nothing.

Programs and tests have the standard library, no installed packages.
"""

import contextlib
import functools
import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from .wire import frame

Tier = Literal["bubblewrap", "seccomp", "none"]

OUTPUT = 4 << 20
"""Bytes that a program may print."""
TAIL = 2000
"""Characters of it that are kept."""
START_SECONDS = 120.0  # a busy machine, a cold disk
GRACE_SECONDS = 2.0  # in which the inside reports a timeout by itself
LEAST_MEMORY = 64  # MiB: an interpreter and a few modules

_BOOT = "import sys; sys.path.append({root!r}); from grading.harness import main; sys.path.pop(); main()"
_INSIDE = "/sandbox"
# Fixed hashes: whether a program passes must not depend on the order of a set.
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "LC_ALL": "C.UTF-8"}
_FLAGS = ("-P", "-s", "-S", "-B")
_SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/etc/ld.so.cache", "/nix/store")


class Outcome(StrEnum):
    """REFUSED: it was stopped for what it did: too much output, or a signal (memory, stack, crash)."""

    PASSED = "passed"
    FAILED = "failed"
    TIMEOUT = "timeout"
    REFUSED = "refused"


@dataclass(frozen=True)
class Result:
    """output: the end of what the program printed. seconds: on the clock. why: one line, where it did not pass."""

    outcome: Outcome
    output: str
    seconds: float
    why: str = ""


@dataclass(frozen=True)
class _Ending:
    """How the processes ended. report: what the inside said; killed: why they were ended from here."""

    report: list[dict[str, Any]]
    nonce: str
    printed: bytes
    seconds: float
    killed: str


class SandboxError(UserError):
    """The sandbox itself did not work: this says nothing about the program."""


class Sandbox:
    """Runs programs. timeout: seconds on the clock. memory_mib: address space of a program, and of its tests.

    unsafe: where neither wall stands, run programs all the same, with limits alone. tier: a wall of the user's choice
    instead of the best. UserError where there is none. Any thread may use it; it holds nothing open.
    """

    def __init__(
        self,
        timeout: float = 5.0,
        memory_mib: int = 512,
        unsafe: bool = False,
        tier: Literal["auto"] | Tier = "auto",
    ) -> None:
        if timeout <= 0:
            raise UserError(f"timeout must be above 0 seconds, not {timeout:g}")
        if memory_mib < LEAST_MEMORY:
            raise UserError(f"memory_mib must be at least {LEAST_MEMORY} for Python to start, not {memory_mib}")
        self.timeout, self.memory_mib = timeout, memory_mib
        self.tier, self.description = _choose(tier, unsafe)

    def run(self, program: str, tests: str = "", stdin: str | None = None, expected: str | None = None) -> Result:
        """Run `program` against `tests`: Python that uses the program's names and raises where it is wrong.

        With `expected` instead of tests: the program reads `stdin` and must print that, up to white space at the ends
        of lines and of the text, and end by itself with exit code 0. Neither: it must end so.
        """
        if tests and expected is not None:
            raise ValueError("tests or expected output, not both")
        ending = _run(self.tier, self.timeout, self.memory_mib, program, tests, stdin)
        result = _result(ending)
        if expected is None or result.outcome is not Outcome.PASSED or same_output(ending.printed, expected):
            return result
        return Result(Outcome.FAILED, result.output, result.seconds, "it printed something else")

    def run_many(self, jobs: Sequence[tuple[str, str]], workers: int = 2) -> list[Result]:
        """Results of (program, tests) pairs, `workers` of them running at a time."""
        with ThreadPoolExecutor(max(1, workers)) as pool:
            return list(pool.map(lambda job: self.run(*job), jobs))


def same_output(printed: bytes, expected: str) -> bool:
    """Equal up to white space at the ends of lines and at the end of the text?"""

    def lines(text: str) -> list[str]:
        return [line.rstrip() for line in text.rstrip().splitlines()]

    return lines(printed.decode(errors="replace")) == lines(expected)


_TOO_LONG = "it took too long"
_TOO_MUCH = f"it printed more than {OUTPUT >> 20} MiB"


def _result(ending: _Ending) -> Result:
    output = ending.printed[-4 * TAIL :].decode(errors="replace")[-TAIL:]
    first, last = (ending.report[0], ending.report[-1]) if ending.report else ({}, {})
    if "started" not in first:
        why = first.get("problem") or ending.killed or (output.strip().splitlines() or ["it ended without a word"])[-1]
        raise SandboxError(f"the sandbox does not start: {why}")
    if ending.killed:
        outcome = Outcome.TIMEOUT if ending.killed == _TOO_LONG else Outcome.REFUSED
        return Result(outcome, output, ending.seconds, ending.killed)
    if last.get("nonce") != ending.nonce:
        return Result(Outcome.REFUSED, output, ending.seconds, "the tests were stopped: too much memory?")
    outcome = Outcome(last["outcome"])
    return Result(outcome, output, ending.seconds, last["why"] or (_TOO_LONG if outcome is Outcome.TIMEOUT else ""))


# ---- Processes


def _run(tier: Tier, timeout: float, memory_mib: int, program: str, tests: str, stdin: str | None) -> _Ending:
    """Starts the inside, hands it its orders, reads what comes until it ends, and leaves no process behind."""
    nonce = secrets.token_hex(16)
    job = {
        "program": program,
        "stdin": stdin,
        "tests": bool(tests),
        "timeout": timeout,
        "memory_mib": memory_mib,
        "tier": tier,
        "readable": _readable(),
    }
    orders = frame(job) + frame({"tests": tests, "nonce": nonce})
    process = subprocess.Popen(
        _command(tier),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=_ENVIRONMENT,
        cwd="/",
        start_new_session=True,
    )
    try:
        return _Ending(*_converse(process, orders, timeout, nonce))
    finally:
        # It is not waited for yet, so its group cannot have become somebody else's.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def _converse(
    process: subprocess.Popen[bytes], orders: bytes, timeout: float, nonce: str
) -> tuple[list[dict[str, Any]], str, bytes, float, str]:
    """What `_Ending` holds. The time of the program begins when the inside says that it has started."""
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    told, printed, left = bytearray(), bytearray(), memoryview(orders)
    began, killed = time.monotonic(), ""
    deadline = began + START_SECONDS
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdin, selectors.EVENT_WRITE)
        open_ends = {process.stdout: told, process.stderr: printed}
        for end in open_ends:
            selector.register(end, selectors.EVENT_READ)
        os.set_blocking(process.stdin.fileno(), False)
        while open_ends and not killed:
            for key, _ in selector.select(max(0.0, deadline - time.monotonic())):
                if key.fileobj is process.stdin:
                    left = left[_written(key.fd, left) :]
                    if not left:
                        selector.unregister(process.stdin)
                    continue
                end = process.stdout if key.fileobj is process.stdout else process.stderr
                if piece := os.read(key.fd, 1 << 16):
                    if end is process.stdout and not told:
                        began = time.monotonic()
                        deadline = began + timeout + GRACE_SECONDS
                    open_ends[end] += piece
                else:
                    selector.unregister(end)
                    del open_ends[end]
            if len(printed) > OUTPUT:
                killed = _TOO_MUCH
            elif open_ends and time.monotonic() > deadline:
                killed = _TOO_LONG
    return _messages(bytes(told)), nonce, bytes(printed), time.monotonic() - began, killed


def _written(fd: int, data: memoryview) -> int:
    """How much of `data` was written; all of it, where nobody reads any more."""
    try:
        return os.write(fd, data)
    except BrokenPipeError:
        return len(data)


def _messages(data: bytes) -> list[dict[str, Any]]:
    """The whole messages in what the inside reported."""
    found = []
    while len(data) >= 4 and len(data) >= (end := 4 + int.from_bytes(data[:4], "little")):
        found.append(json.loads(data[4:end]))
        data = data[end:]
    return found


# ---- Walls


def _python() -> str:
    """The interpreter itself: one of a virtual environment would need that environment."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def _readable() -> list[str]:
    """Files and folders that Python needs to run."""
    paths = sysconfig.get_paths()
    own = [paths["stdlib"], paths["platstdlib"], os.path.join(sys.base_prefix, "lib"), _python()]
    return [path for path in dict.fromkeys((*_SYSTEM, *own, "/dev/null", "/dev/urandom")) if os.path.exists(path)]


def _command(tier: Tier) -> list[str]:
    here = Path(__file__).resolve().parent
    if tier != "bubblewrap":
        return [_python(), *_FLAGS, "-c", _BOOT.format(root=str(here.parent))]
    binds: list[str] = []
    for path in (*_SYSTEM, sys.base_prefix, sys.base_exec_prefix):
        if os.path.islink(path):
            binds += ["--symlink", os.readlink(path), path]
        elif os.path.exists(path):
            binds += ["--ro-bind", path, path]
    return [
        *(shutil.which("bwrap") or "bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"),
        *("--uid", "65534", "--gid", "65534", "--hostname", "sandbox", *binds, "--dev", "/dev"),
        *("--ro-bind", str(here), f"{_INSIDE}/grading", "--chdir", "/"),
        *(_python(), *_FLAGS, "-c", _BOOT.format(root=_INSIDE)),
    ]


_PROBE = """
def look():
    import os, socket
    for attempt in (socket.socket, os.fork, lambda: open("/tmp/sandbox-probe", "w")):
        try:
            attempt()
        except OSError:
            continue
        return "open"
    return "shut"
"""


@functools.cache
def _stands(tier: Tier) -> tuple[str, str]:
    """(description, "") of a wall that holds a program that tries it; ("", why) of one that does not."""
    if tier == "bubblewrap" and shutil.which("bwrap") is None:
        return "", "bwrap is not installed"
    try:
        ending = _run(tier, 20.0, 256, _PROBE, "assert look() == 'shut', 'it lets programs out'", None)
        result = _result(ending)
    except (SandboxError, OSError) as error:
        return "", " ".join(str(error).split())
    if result.outcome is not Outcome.PASSED:
        return "", result.why
    if ending.report[0]["hidden"]:
        return tier if tier == "bubblewrap" else "seccomp and Landlock", ""
    return "seccomp, without Landlock: programs can read what this user can read", ""


def _choose(tier: Literal["auto"] | Tier, unsafe: bool) -> tuple[Tier, str]:
    """The wall to use and what to call it. UserError: there is none."""
    wanted: tuple[Tier, ...] = ("bubblewrap", "seccomp") if tier == "auto" else (tier,)
    failed = []
    for wall in wanted:
        if wall == "none":
            break
        description, why = _stands(wall)
        if description:
            return wall, description
        failed.append(f"{wall}: {why}")
    if unsafe:
        return "none", "none: programs ran unconfined"
    found = f" ({'; '.join(failed)})" if failed else ""
    raise UserError(
        f"there is no sandbox for generated code on this machine{found}: install bubblewrap, "
        "or set unsafe to run such code without one"
    )
