"""The inside of the sandbox: one process runs the program, another one the tests.

    main ── reads the program ── forks ┬─ runs it: the program's process, confined, which holds nothing but the program
                                       └─ reads the tests, then runs them against it: the tests' process, confined

The program never meets the tests. It is asked to call its functions with arguments, and what it answers is data
(`wire`); the comparison happens where it cannot reach. So the verdict depends on what its functions return and on
nothing else: leaving early, printing, replacing builtins, walking frames, objects that equal everything.

Tests are ordinary Python that uses names of the program. Such a name is the program's value where that is data, else a
handle to it (`examiner`). Builtins and modules of the standard library are the tests' own, whatever the program calls
so (unless the tests use nothing else of it, as where the function asked for is called `sum`). Helpers that the tests
take from the program are the program's: tests should bring their own.

Started by `sandbox` in an interpreter of its own, without the package. Standard library alone.
"""

import builtins
import contextlib
import copy
import math
import operator
import os
import signal
import sys
import time
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from . import jail
from .examiner import Run, await_end, judge
from .wire import Peer, WireError, changed, in_words, pack, receive, send, unpack


def main() -> None:
    """Orders come in on standard input, the report goes out on standard output; all else that is written, on standard
    error. First order: {"program", "stdin", "tests": is it run against tests?, "timeout", "memory_mib", "tier",
    "readable"}. Second one, read when the program is out of reach: {"tests", "nonce"}. Report: {"started", ...} or
    {"problem"}, then {"outcome", "why", "nonce"}."""
    orders, report = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]  # which `site` would have added
    job = receive(orders)
    jail.end_with_parent()
    (there, asking), (here, answering) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        for fd in (orders, report, asking, here):
            os.close(fd)
        _be_program(job, there, answering)
    os.close(there)
    os.close(answering)
    try:
        # The first message is the sandbox's own; behind it, nothing that comes is to be believed.
        kind, *about = receive(here)
        if kind != "confined":
            raise jail.JailError(*about)
        _confine(job, child)
    except (jail.JailError, WireError) as error:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return send(report, {"problem": str(error)})
    send(report, {"started": True, "hidden": about[0]})
    order = receive(orders)
    run = Run(child, report, order["nonce"], here, asking, time.monotonic() + job["timeout"])
    if job["tests"]:
        judge(run, order["tests"])
    await_end(run)


def _confine(job: dict[str, Any], child: int | None = None) -> bool:
    """Are this user's files hidden now? child: as in `jail.confine`."""
    memory, seconds = job["memory_mib"], math.ceil(job["timeout"]) + 1
    jail.limit(memory, seconds if child is None else seconds + 5)  # the tests' process reports the other's end
    if job["tier"] == "none":
        return False
    try:
        return jail.confine(job["readable"], child) or job["tier"] == "bubblewrap"
    except jail.JailError:
        if job["tier"] != "bubblewrap":
            raise
        # No filter for this machine: the namespaces hold by themselves, but no process may be started.
        jail.limit(memory, seconds, processes=0)
        return True


# ---- The program's process


def _be_program(job: dict[str, Any], reading: int, writing: int) -> NoReturn:
    """The child's life."""
    try:
        if job["stdin"] is not None:
            _give_input(job["stdin"])
        if not job["tests"]:
            os.dup2(os.open(os.devnull, os.O_RDWR), 2)  # what is judged is standard output alone
        jail.end_with_parent()
        send(writing, ["confined", _confine(job)])
    except BaseException as error:
        _tell(writing, ["problem", in_words(error)])
        os._exit(1)
    peer = _ProgramSide(reading, writing)
    module = types.ModuleType("program" if job["tests"] else "__main__")
    sys.modules[module.__name__] = module
    sys.argv = ["program.py"]
    code = 0
    try:
        exec(compile(job["program"], "<program>", "exec"), module.__dict__)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        _tell(writing, ["ended", "SystemExit"])
    except BaseException as error:
        code = 1
        with contextlib.suppress(BaseException):
            sys.excepthook(type(error), error, error.__traceback__)
        _tell(writing, ["ended", in_words(error)])
    else:
        if job["tests"]:
            peer.names = module.__dict__
            with contextlib.suppress(BaseException):
                send(writing, ["ready", [name for name in module.__dict__ if not name.startswith("__")]])
                while True:
                    peer.serve(receive(reading)[1:])
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
    os._exit(code & 0xFF)


def _tell(fd: int, message: Any) -> None:
    with contextlib.suppress(BaseException):
        send(fd, message)


def _give_input(text: str) -> None:
    fd = os.memfd_create("stdin") if hasattr(os, "memfd_create") else _unnamed_file()
    data = memoryview(text.encode(errors="replace"))
    while data:
        data = data[os.write(fd, data) :]
    os.lseek(fd, 0, os.SEEK_SET)
    os.dup2(fd, 0)
    os.close(fd)


def _unnamed_file() -> int:
    import tempfile

    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class _ProgramSide(Peer):
    """Does with the program's objects what the tests ask for."""

    names: dict[str, Any]

    def answer(self, operation: Any, *parts: Any) -> list[Any]:
        if operation == "call":
            return self._call(*parts)
        values = [self.unpack(part) for part in parts]
        if operation in _OPERATORS:
            return ["give", self.pack(getattr(operator, operation)(*values))]
        return ["give", self.pack(_OPERATIONS[operation](self, *values))]

    def _call(self, function: Any, arguments: list[Any], named: dict[str, Any]) -> list[Any]:
        values = [self.unpack(argument) for argument in arguments]
        found = self.unpack(function)(*values, **{name: self.unpack(value) for name, value in named.items()})
        containers = [isinstance(value, list | dict | set | bytearray | deque) for value in values]
        after = (self.pack(v) if held else a for v, a, held in zip(values, arguments, containers, strict=True))
        return ["give", self.pack(found), changed(arguments, after)]

    def pack(self, value: Any) -> Any:
        return pack(value, self._refer)

    def _refer(self, value: Any) -> list[Any]:
        if isinstance(value, _Borrowed):
            return ["yours", value.number]
        if isinstance(value, types.ModuleType):
            return ["module", value.__name__]
        if isinstance(value, type):
            name = value.__name__
            if getattr(builtins, name, None) is value:
                return ["builtin", name]
            if issubclass(value, BaseException):
                return ["exception", self.lend(value), name, _builtin_base(value)]
        return ["mine", self.lend(value)]

    def unpack(self, tree: Any) -> Any:
        return unpack(tree, self._resolve)

    def _resolve(self, tree: list[Any]) -> Any:
        kind = tree[0]
        if kind == "yours":
            return self.lent(tree[1])
        if kind == "mine":
            return _Borrowed(self, tree[1])
        return getattr(builtins, tree[1]) if kind == "builtin" else iter([self.unpack(part) for part in tree[1:]])

    def raised(self, error: BaseException) -> list[Any]:
        arguments: Any = [in_words(error)]
        with contextlib.suppress(BaseException):
            arguments = [pack(argument, _no_data) for argument in error.args]
        return ["raise", self._refer(type(error)), arguments]


def _no_data(value: Any) -> list[Any]:
    raise TypeError


def _builtin_base(kind: type) -> str:
    names = (base.__name__ for base in kind.__mro__ if getattr(builtins, base.__name__, None) is base)
    return next(names, "Exception")


class _Borrowed:
    """A function of the tests, which the program may call."""

    def __init__(self, peer: _ProgramSide, number: int) -> None:
        self.peer, self.number = peer, number

    def __call__(self, *arguments: Any) -> Any:
        reply = self.peer.ask("call", self.number, [self.peer.pack(argument) for argument in arguments])
        if reply[0] == "raise":
            raise getattr(builtins, reply[1], RuntimeError)(reply[2])
        return self.peer.unpack(reply[1])


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "name": lambda side, name: side.names[name],
    "get": lambda side, value, name: getattr(value, name),
    "set": lambda side, value, name, new: setattr(value, name, new),
    "del": lambda side, value, name: delattr(value, name),
    "item": lambda side, value, key: value[key],
    "set item": lambda side, value, key, new: operator.setitem(value, key, new),
    "del item": lambda side, value, key: operator.delitem(value, key),
    "len": lambda side, value: len(value),
    "iter": lambda side, value: _Held(iter(value)),
    "next": lambda side, value: next(value.held),
    "bool": lambda side, value: bool(value),
    "str": lambda side, value: str(value),
    "repr": lambda side, value: repr(value),
    "int": lambda side, value: int(value),
    "float": lambda side, value: float(value),
    "copy": lambda side, value: copy.copy(value),
    "deepcopy": lambda side, value: copy.deepcopy(value),
    "enter": lambda side, value: value.__enter__(),
    "exit": lambda side, value: value.__exit__(None, None, None),
    "isinstance": lambda side, kind, value: isinstance(value, kind),
    "issubclass": lambda side, kind, value: issubclass(value, kind),
}
_OPERATORS = (
    *("eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "mod", "matmul"),
    *("and_", "or_", "xor"),
)


class _Held:
    """Keeps an iterator from being taken for data."""

    def __init__(self, held: Iterator[Any]) -> None:
        self.held = held
