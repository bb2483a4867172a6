"""What the sandbox lets programs do, and what it does not; each wall that this machine has is attacked."""

import os
import platform
import shutil
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dsv3.errors import UserError
from dsv3.grading import jail, sandbox
from dsv3.grading.sandbox import Outcome, Result, Sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


@pytest.fixture(scope="module", params=["bubblewrap", "seccomp"])
def walled(request: pytest.FixtureRequest) -> Sandbox:
    try:
        return Sandbox(timeout=8.0, memory_mib=256, tier=request.param)
    except UserError as error:
        pytest.skip(str(error))


def short(box: Sandbox, seconds: float = 0.5, memory_mib: int = 256) -> Sandbox:
    return Sandbox(seconds, memory_mib, tier=box.tier)


# Attacks on the machine. Each is the body of a function; tried behind both walls.

TRIED = """
import ctypes, os, sys, signal
libc = ctypes.CDLL(None, use_errno=True)
def raw(*arguments):
    if libc.syscall(*arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
def attack():
    try:
        found = act()
    except (OSError, MemoryError, RuntimeError, ValueError) as error:
        return "refused"
    return "done: " + repr(found)
def act():
"""

ATTACKS = {
    "socket": "import socket; return socket.socket()",
    "unix socket": "import socket; return socket.socket(socket.AF_UNIX).connect('/dev/log')",
    "datagram through a pair": """
    import socket
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    return one.sendto(b'x', '/dev/log')""",
    "execve": "return os.execv('/bin/true', ['true'])",
    "subprocess": "import subprocess; return subprocess.run(['/bin/true'])",
    "posix_spawn": "return os.posix_spawn('/bin/true', ['true'], {})",
    "fork": "return os.fork()",
    "fork of the C library": "pid = libc.fork(); return pid if pid >= 0 else raw(-1)",
    "clone": "return raw(CLONE, 17, 0, 0, 0, 0)",
    "clone3": "return raw(435, ctypes.create_string_buffer((17).to_bytes(40, 'little') + bytes(48)), 88)",
    "multiprocessing": "import multiprocessing; p = multiprocessing.Process(target=print); p.start()",
    "kill the parent": "return os.kill(os.getppid(), signal.SIGKILL)",
    "kill everybody": "return os.kill(-1, signal.SIGKILL)",
    "kill the group": "return os.killpg(os.getpgrp(), signal.SIGKILL)",
    "signal through a file": "import fcntl; r, w = os.pipe(); return fcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())",
    "leave the group": "return os.setpgid(0, 0)",
    "leave the session": "return os.setsid()",
    "outlive the parent": "return raw(PRCTL, 1, 0, 0, 0, 0)",
    "write a file": "return open('/tmp/sandbox-attack', 'w')",
    "write a file in the home": "return open(os.path.expanduser('~/sandbox-attack'), 'a')",
    "open to read and write": "return os.open('/dev/null', os.O_RDWR)",
    "openat2": "return raw(437, -100, b'/dev/null', (2).to_bytes(24, 'little'), 24)",
    "a big file in memory": "fd = os.memfd_create('x'); return os.write(fd, bytes(1 << 20))",
    "a folder": "return os.mkdir('/tmp/sandbox-attack')",
    "delete": "return os.unlink('/dev/null')",
    "rename": "return os.rename('/tmp', '/tmp2')",
    "permissions": "return os.chmod('/usr', 0o777)",
    "link": "return os.symlink('/', '/tmp/sandbox-attack')",
    "2 GiB": "return len(bytearray(2 << 30))",
    "2 GiB, mapped": "import mmap; return len(mmap.mmap(-1, 2 << 30))",
    "more memory": "import resource; return resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "more time": "import resource; return resource.setrlimit(resource.RLIMIT_CPU, (-1, -1))",
    "limits of another": "import resource; return resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
    "trace": "return raw(PTRACE, 16, os.getppid(), 0, 0)",
    "read another's memory": "return raw(VM_READ, os.getppid(), 0, 0, 0, 0, 0)",
    "take another's files": "return raw(438, raw(434, os.getppid(), 0), 1, 0)",
    "rings": "return raw(425, 8, ctypes.create_string_buffer(120))",
    "namespaces": "return raw(UNSHARE, 0x10000000)",
    "mount": "return libc.mount(b'x', b'/tmp', b'tmpfs', 0, None) and raw(-1)",
    "chroot": "return os.chroot('/usr')",
    "another filter": "return raw(317, 1, 0, None)",
    "keys": "return raw(KEYCTL, 0, -3, 0, 0, 0)",
    "shared memory": "return raw(SHMGET, 0, 4096, 0o1600)",
    "another's priority": "return os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
}  # fmt: skip
NUMBERS = {
    "x86_64": {"CLONE": 56, "PRCTL": 157, "PTRACE": 101, "VM_READ": 310, "UNSHARE": 272, "KEYCTL": 250, "SHMGET": 29},
    "aarch64": {"CLONE": 220, "PRCTL": 167, "PTRACE": 117, "VM_READ": 270, "UNSHARE": 97, "KEYCTL": 219, "SHMGET": 194},
}.get(platform.machine(), {})


def test_what_a_program_must_not_do_is_refused(walled: Sandbox):
    """One program tries everything in turn, so that the table costs one start."""
    body = TRIED + "".join(f"    {name} = {number}\n" for name, number in NUMBERS.items())
    programs = [body.replace("act()", f"act{i}()") + f"    {source}\n" for i, source in enumerate(ATTACKS.values())]
    program = "\n".join(text.replace("attack()", f"attack{i}()") for i, text in enumerate(programs))
    tests = "\n".join(
        f"assert attack{i}() == 'refused', {name!r} + ': ' + attack{i}()" for i, name in enumerate(ATTACKS)
    )
    found = walled.run(program, tests)
    assert found.outcome is Outcome.PASSED, found


READ = """
def look(path):
    import os
    try:
        return (os.listdir(path) if os.path.isdir(path) else open(path, 'rb').read(10)) and 'read'
    except OSError:
        return 'refused'
def parent():
    import os
    found = []
    for name in ('mem', 'environ', 'maps', 'syscall', 'stack', *(f'fd/{i}' for i in range(20))):
        try:
            found.append((name, os.read(os.open(f'/proc/{os.getppid()}/{name}', os.O_RDONLY | os.O_NONBLOCK), 10)))
        except OSError:
            continue
    return found
"""


def test_a_program_reads_nothing_but_python(walled: Sandbox, tmp_path: Path):
    secret = tmp_path / "tests.jsonl"
    secret.write_text("assert f(2) == 4")
    hidden = ["/etc/passwd", "/etc", "/", "/proc/1/environ", "/home", "/root", str(secret), str(Path(__file__).parent)]
    tests = "\n".join(f"assert look({path!r}) == 'refused', {path!r}" for path in hidden if os.path.exists(path))
    tests = tests.replace("assert look('/') == 'refused', '/'", "look('/')")  # its names may be seen behind bubblewrap
    if "without Landlock" in walled.description:
        tests = "pass"  # what the description says
    # These hold in any case: they would give away the tests.
    tests += "\nassert parent() == [], parent()"
    found = walled.run(READ, tests)
    assert found.outcome is Outcome.PASSED, found


def left_behind(marker: str) -> list[int]:
    """Processes whose environment holds the marker."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


BOMBS = {
    "infinite loop": ("while True: pass", Outcome.TIMEOUT),
    "loop in a call": ("def f(x):\n    while True: pass", Outcome.TIMEOUT),
    "sleep": ("import time\ntime.sleep(60)", Outcome.TIMEOUT),
    "one long multiplication": ("x = 7 ** (10 ** 9)", Outcome.TIMEOUT),
    "deaf": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except Exception: pass\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass", Outcome.TIMEOUT,
    ),
    "closes everything and goes on": ("import os\nos.closerange(0, 64)\nwhile True: pass", None),
    "fork bomb": (
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", Outcome.TIMEOUT,
    ),
    "thread bomb": (
        "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
        Outcome.FAILED,
    ),
    "memory": ("x = [0]\nwhile True: x = x * 2", Outcome.FAILED),
    "output": ("while True: print('x' * 10000)", Outcome.REFUSED),
    "crash": ("import ctypes\nctypes.string_at(0)", Outcome.REFUSED),
    "an endless answer": (
        "class T:\n    def __iter__(self):\n        while True: yield 1\nf = lambda x: tuple(T())", None,
    ),
    "a recursive answer": ("def f(x):\n    y = []\n    y.append(y)\n    return y", Outcome.FAILED),
    "a huge answer": ("def f(x): return 'x' * (1 << 26)", None),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_over_when_its_time_is(walled: Sandbox, bomb: str, monkeypatch: pytest.MonkeyPatch):
    program, outcome = BOMBS[bomb]
    marker = f"SANDBOX_TEST={uuid.uuid4().hex}"
    name, value = marker.split("=")
    monkeypatch.setitem(sandbox._ENVIRONMENT, name, value)
    began = time.monotonic()
    # What ends by itself gets the time to do so on a busy machine.
    found = short(walled, 0.5 if outcome in (None, Outcome.TIMEOUT) else 8.0).run(program, "assert f(1) == 1")
    assert time.monotonic() - began < 20
    assert found.outcome is outcome or (outcome is None and found.outcome is not Outcome.PASSED), found
    deadline = time.monotonic() + 5
    while left_behind(marker) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left_behind(marker) == []


def test_tests_that_hang_or_leave_are_no_pass(box: Sandbox):
    assert short(box).run("x = 1", "while True: pass").outcome is Outcome.TIMEOUT
    assert box.run("x = 1", "import os\nos._exit(0)").outcome is Outcome.REFUSED
    assert box.run("x = 1", "raise SystemExit(0)").outcome is Outcome.FAILED


# Cheating: passing without being right.

DOUBLE = "assert f(2) == 4\nassert abs(f(0.5) - 1.0) < 1e-6\nassert set(f([1])) == {1}\nassert 3 in f([3])"

CHEATS = {
    "exits": "import os\nos._exit(0)",
    "exits politely": "raise SystemExit",
    "exits when called": "import os\ndef f(x): os._exit(0)",
    "exits politely when called": "import sys\ndef f(x): sys.exit(0)",
    "exits from a thread": "import os, threading\nf = lambda x: 1\nthreading.Timer(0.05, lambda: os._exit(0)).start()",
    "exits at the end": "import atexit, os\natexit.register(os._exit, 0)\nf = lambda x: 1",
    "prints success": "print('PASSED', '{\"outcome\": \"passed\"}')\nf = lambda x: 1",
    "equals everything": """
class E:
    def __eq__(self, o): return True
    __hash__ = object.__hash__
def f(x): return E()""",
    "does everything": """
class E:
    def __getattr__(self, name): return lambda *a: True
    for name in "eq ne lt le gt ge contains bool sub rsub abs add and rand or index float int len".split():
        exec(f"def __{name}__(self, *a): return E() if {name!r} in ('sub', 'rsub', 'abs') else True")
    def __iter__(self): return iter([self])
    def __hash__(self): return 0
def f(x): return E()""",
    "a number that equals everything": """
class E(int):
    def __eq__(self, o): return True
    def __sub__(self, o): return 0
    __rsub__ = __sub__
    __hash__ = int.__hash__
class L(list):
    def __eq__(self, o): return True
    def __contains__(self, o): return True
def f(x): return L([E()]) if isinstance(x, list) else E()""",
    "other builtins": """
import builtins
builtins.abs = abs = lambda x: 0
builtins.set = set = lambda x: {1}
class AssertionError(Exception): pass
builtins.AssertionError = AssertionError
builtins.exec = builtins.compile = lambda *a, **k: None
f = lambda x: 4""",
    "tracing": """
import sys, threading
def trace(frame, event, argument):
    frame.f_trace_lines = False
    return None
sys.settrace(trace); threading.settrace(trace); sys.setprofile(lambda *a: None)
f = lambda x: 1""",
    "looks through frames and objects": """
import gc, sys
def seek():
    frame = sys._getframe()
    while frame:
        for value in list(frame.f_locals.values()) + list(frame.f_globals.values()): yield value
        frame = frame.f_back
    yield from gc.get_objects()
def f(x):
    for value in seek():
        for text in (value.values() if type(value) is dict else [value]):
            if isinstance(text, str) and "assert f" + "(2)" in text:
                return 4
    return 1""",
    "looks at what it was given": """
import os, sys
def f(x):
    texts = [*sys.argv, *sys.orig_argv, *os.environ.values()]
    for fd in range(64):
        try: texts.append(os.pread(fd, 1 << 16, 0).decode())
        except OSError: pass
    return 4 if any("assert f" + "(2)" in text for text in texts) else 1""",
    "writes reports to every pipe": """
import json, os, struct
for report in ({"started": True}, {"outcome": "passed", "why": "", "nonce": "0" * 32}, ["give", True], ["give", 4]):
    body = json.dumps(report).encode()
    for fd in range(3, 64):
        try: os.write(fd, struct.pack("<I", len(body)) + body)
        except OSError: pass
f = lambda x: 1""",
    "claims that the sandbox is broken": """
import json, os, struct
body = json.dumps(["problem", "no sandbox"]).encode()
for fd in range(3, 64):
    try: os.write(fd, struct.pack("<I", len(body)) + body)
    except OSError: pass""",
    "changes the sandbox": """
import sys, os
for name, module in list(sys.modules.items()):
    if "harness" in name or "wire" in name:
        for key in list(vars(module)):
            if callable(vars(module)[key]): setattr(module, key, lambda *a, **k: True)
f = lambda x: 1""",
    "changes its arguments": "def f(x):\n    if isinstance(x, list): x.clear()\n    return x",
    "nothing": "",
    "no Python": "def f(x:",
    "dies": "1 / 0",
}  # fmt: skip


@pytest.mark.parametrize("cheat", CHEATS)
def test_hack_is_no_pass(box: Sandbox, cheat: str):
    found = box.run(CHEATS[cheat], DOUBLE)
    assert found.outcome in (Outcome.FAILED, Outcome.REFUSED), found


def test_the_right_program_passes_where_the_hacks_do_not(box: Sandbox):
    assert box.run("def f(x):\n    return 2 * x", DOUBLE).outcome is Outcome.PASSED


@pytest.mark.parametrize("cheat", ["exits", "equals everything", "other builtins", "writes reports to every pipe"])
def test_hacks_fail_without_a_wall_too(cheat: str):
    found = Sandbox(5.0, tier="none", unsafe=True).run(CHEATS[cheat], DOUBLE)
    assert found.outcome in (Outcome.FAILED, Outcome.REFUSED), found


def test_a_failed_call_cannot_be_caught_by_the_tests_as_an_end_of_the_program(box: Sandbox):
    tests = "try:\n    f(1)\nexcept BaseException:\n    pass"
    assert box.run("import os\ndef f(x): os._exit(0)", tests).outcome is Outcome.FAILED
    assert box.run("def f(x): raise ValueError", tests).outcome is Outcome.PASSED


def test_fake_modules_and_helpers_are_not_the_tests_own(box: Sandbox):
    fake = "class math:\n    fabs = isclose = lambda *a: 0\n\nf = lambda x: 7"
    assert box.run(fake, "assert math.fabs(f(2) - 4) < 1e-6").outcome is Outcome.FAILED
    assert box.run("import math\nf = lambda x: 4", "assert math.fabs(f(2) - 4) < 1e-6").outcome is Outcome.PASSED


def test_the_expected_output_is_not_in_the_sandbox(box: Sandbox):
    program = CHEATS["looks through frames and objects"].replace(
        'isinstance(text, str) and "assert f" + "(2)" in text',
        "isinstance(text, str) and text is not word and word in text",
    )
    program = f"word = ''.join(reversed('terces'))\n{program}\nprint(word if f(1) == 4 else 'nothing')"
    assert "word in text" in program
    assert box.run(program, "", "", "secret").output == "nothing\n"
    assert box.run(f"known = 'sec' + 'ret'\n{program}", "", "", "secret").output == "secret\n"  # it would be found


# The sandbox itself.


def test_results_are_in_order_and_any_thread_may_run(box: Sandbox):
    jobs = [(f"def f(): return {i}", f"assert f() == {i % 5}") for i in range(10)]
    with ThreadPoolExecutor(2) as pool:
        for results in pool.map(lambda _: box.run_many(jobs, workers=3), range(2)):
            assert [found.outcome is Outcome.PASSED for found in results] == [i < 5 for i in range(10)]


def test_sets_have_the_same_order_in_every_run(box: Sandbox):
    found = {box.run("print({'a', 'b', 'c', 'd', 'e', 'f'})").output for _ in range(3)}
    assert len(found) == 1


def test_without_a_wall_nothing_runs_unless_it_is_wished(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "_stands", lambda tier: ("", f"no {tier} here"))
    with pytest.raises(
        UserError, match=r"bubblewrap: no bubblewrap here; seccomp: .*install bubblewrap, or set unsafe"
    ):
        Sandbox()
    with pytest.raises(UserError, match="set unsafe"):
        Sandbox(tier="none")
    open_box = Sandbox(unsafe=True)
    assert (open_box.tier, open_box.description) == ("none", "none: programs ran unconfined")
    assert open_box.run("def f(): return 1", "assert f() == 1").outcome is Outcome.PASSED
    assert short_open(open_box).outcome is Outcome.TIMEOUT


def short_open(box: Sandbox) -> Result:
    return Sandbox(0.5, unsafe=True).run("while True: pass", "pass")


@pytest.mark.parametrize("wrong", [{"timeout": 0}, {"memory_mib": 10}])
def test_settings_under_which_nothing_can_run(wrong: dict[str, Any]):
    with pytest.raises(UserError, match="must be"):
        Sandbox(**wrong)


def test_a_sandbox_that_breaks_blames_nobody(box: Sandbox, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "_BOOT", "raise RuntimeError({root!r})")
    with pytest.raises(sandbox.SandboxError, match=r"does not start: RuntimeError"):
        box.run("x = 1", "assert x")


def test_a_wall_that_lets_programs_out_does_not_stand(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "_command", lambda tier, real=sandbox._command: real("none"))
    monkeypatch.setattr(jail, "confine", None)
    real = sandbox._run
    monkeypatch.setattr(sandbox, "_run", lambda tier, *rest: real("none", *rest))
    assert sandbox._stands.__wrapped__("seccomp")[0] == ""


def test_a_kernel_without_landlock_is_said_and_still_keeps_the_tests_apart(
    box: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(Path(sandbox.__file__).parent, tmp_path / "grading")
    inside = tmp_path / "grading" / "jail.py"
    inside.write_text(inside.read_text() + "\n\ndef _landlock(readable, scopes):\n    return False\n")
    monkeypatch.setattr(sandbox, "__file__", str(tmp_path / "grading" / "sandbox.py"))
    description, why = sandbox._stands.__wrapped__("seccomp")
    if why:
        pytest.skip(why)
    assert "without Landlock: programs can read" in description
    monkeypatch.setattr(sandbox, "_stands", lambda tier: (description, ""))
    shut = Sandbox(5.0, tier="seccomp")
    found = shut.run(READ, "assert look('/etc/passwd') == 'read'\nassert parent() == [], parent()")
    assert found.outcome is Outcome.PASSED, found


def test_the_least_memory_is_enough(box: Sandbox):
    small = Sandbox(5.0, sandbox.LEAST_MEMORY, tier=box.tier)
    assert small.run("import collections, re, math\nf = lambda x: 2 * x", "assert f(2) == 4").outcome is Outcome.PASSED


def test_the_inside_needs_no_package_and_no_torch():
    code = "import sys; sys.path.append(sys.argv[1]); import grading.harness; print('torch' in sys.modules)"
    root = str(Path(sandbox.__file__).parent.parent)
    found = subprocess.run([sys.executable, "-S", "-P", "-c", code, root], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
