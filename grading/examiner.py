"""The tests' process in the sandbox: runs the tests against the program, which is in another process (`harness`).

Standard library alone: this file also runs inside the sandbox.
"""

import ast
import builtins
import contextlib
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from .wire import Closed, Peer, WireError, in_words, pack, receive, rewrite, send, unpack

PASSED, FAILED, TIMEOUT, REFUSED = "passed", "failed", "timeout", "refused"  # `sandbox.Outcome`


class Run:
    """What the tests' process knows of the run, and the only way out of it."""

    def __init__(self, child: int, report: int, nonce: str, reading: int, writing: int, deadline: float) -> None:
        self.child, self.report, self.nonce = child, report, nonce
        self.reading, self.writing, self.deadline = reading, writing, deadline

    def over(self, outcome: str, why: str = "") -> NoReturn:
        """Reports and ends this process, whatever the tests would still like to do; the program's process is gone."""
        with contextlib.suppress(OSError):
            os.close(self.writing)  # the program's process leaves when nobody asks any more
        status = self.status(0.0 if outcome == TIMEOUT else 0.2)
        if status is not None and os.WIFSIGNALED(status) and outcome == FAILED:
            number = os.WTERMSIG(status)
            outcome = TIMEOUT if number == signal.SIGXCPU else REFUSED
            why = f"ended by {signal.Signals(number).name}"
        self.tell(outcome, why)

    def tell(self, outcome: str, why: str) -> NoReturn:
        send(self.report, {"outcome": outcome, "why": why, "nonce": self.nonce})
        os._exit(0)

    def status(self, patience: float) -> int | None:
        """How the child ended by itself; None: it was killed here, after `patience` seconds."""
        until = time.monotonic() + patience
        while True:
            child, status = os.waitpid(self.child, os.WNOHANG)
            if child:
                return status
            if time.monotonic() >= until:
                os.kill(self.child, signal.SIGKILL)
                os.waitpid(self.child, 0)
                return None
            time.sleep(0.002)


def await_end(run: Run) -> NoReturn:
    """A program that reads its input and prints: waits for its end. PASSED: it came there by itself."""
    said = ""
    while time.monotonic() < run.deadline:
        try:
            message = receive(run.reading, run.deadline)
            said = str(message[1])[:300] if isinstance(message, list) and len(message) > 1 else said
        except TimeoutError:
            break
        except Closed:
            status = run.status(run.deadline - time.monotonic())
            if status is None:
                break
            if os.WIFSIGNALED(status):
                late = os.WTERMSIG(status) == signal.SIGXCPU
                run.tell(TIMEOUT if late else REFUSED, f"ended by {signal.Signals(os.WTERMSIG(status)).name}")
            run.tell(*((PASSED, "") if status == 0 else (FAILED, said or f"exit code {os.WEXITSTATUS(status)}")))
        except WireError:
            pass
    run.over(TIMEOUT)


class TestsSide(Peer):
    """Asks the program, and ends the run where it does not answer: tests must not be able to catch that."""

    def __init__(self, run: Run) -> None:
        super().__init__(run.reading, run.writing)
        self.deadline, self._over = run.deadline, run.over
        self._handles: dict[int, Any] = {}
        self._exceptions: dict[int, type[BaseException]] = {}

    def request(self, operation: str, *values: Any) -> Any:
        return self._result(self._asked(operation, *(self.pack(value) for value in values)), [])

    def call(self, function: "Handle", arguments: Sequence[Any], named: dict[str, Any]) -> Any:
        packed = [self.pack(argument) for argument in arguments]
        reply = self._asked("call", self.pack(function), packed, {name: self.pack(v) for name, v in named.items()})
        return self._result(reply, arguments)

    def _asked(self, *question: Any) -> list[Any]:
        try:
            return self.ask(*question)
        except TimeoutError:
            self._over(TIMEOUT)
        except (Closed, BrokenPipeError):
            self._over(FAILED, "the program ended before the tests did")
        except WireError as error:
            self._over(FAILED, f"the program sent no answer but something else: {error}")

    def _result(self, reply: list[Any], arguments: Sequence[Any]) -> Any:
        try:
            if reply[0] == "raise":
                error = self._exception(reply[1], reply[2])
            elif reply[0] != "give":
                raise WireError("neither a value nor an exception")
            else:
                for place, now in (reply[2] if len(reply) > 2 else {}).items():
                    rewrite(arguments[int(place)], self.unpack(now))
                return self.unpack(reply[1])
        except (WireError, LookupError, TypeError, ValueError, AttributeError, ImportError, RecursionError) as problem:
            self._over(FAILED, f"the program sent no answer but something else: {problem}")
        raise error

    def _exception(self, kind: Any, arguments: list[Any]) -> BaseException:
        made = self.unpack(kind)
        if not (isinstance(made, type) and issubclass(made, BaseException)):
            raise WireError("no exception")
        try:
            return made(*(self.unpack(argument) for argument in arguments))
        except TypeError:
            return made()

    # What the program may ask for: to call what the tests handed to it.

    def answer(self, operation: Any, *parts: Any) -> list[Any]:
        if operation != "call" or len(parts) != 2:
            raise WireError("no question")
        number, arguments = parts
        return ["give", self.pack(self.lent(number)(*(self.unpack(argument) for argument in arguments)))]

    def raised(self, error: BaseException) -> list[Any]:
        return ["raise", type(error).__name__, str(error)]

    def pack(self, value: Any) -> Any:
        return pack(value, self._refer)

    def _refer(self, value: Any) -> list[Any]:
        if isinstance(value, Handle):
            return ["yours", _number(value)]
        name = getattr(value, "__name__", "")
        for number, known in self._exceptions.items():
            if value is known:
                return ["yours", number]
        if callable(value):
            return ["builtin", name] if getattr(builtins, name, None) is value else ["mine", self.lend(value)]
        if isinstance(value, Iterator):
            return ["iterator", *(self.pack(item) for item in value)]
        raise TypeError(f"the tests hand a {type(value).__name__} to the program, which only data and functions reach")

    def unpack(self, tree: Any) -> Any:
        return unpack(tree, self._resolve)

    def _resolve(self, tree: list[Any]) -> Any:
        kind, first = tree[0], tree[1]
        if kind == "yours":
            return self.lent(first)
        if kind == "mine" and isinstance(first, int):
            return self._handles.setdefault(first, Handle(self, first))
        if kind == "builtin" and isinstance(getattr(builtins, first, None), type):
            return getattr(builtins, first)
        if kind == "module" and first.split(".")[0] in sys.stdlib_module_names:
            return importlib.import_module(first)
        if kind == "exception" and isinstance(first, int):
            base = getattr(builtins, tree[3], None)
            if isinstance(base, type) and issubclass(base, BaseException):
                return self._exceptions.setdefault(first, type(tree[2], (base,), {}))
        raise WireError(f"a {kind}")


def _peer(handle: "Handle") -> TestsSide:
    return object.__getattribute__(handle, "(peer)")


def _number(handle: "Handle") -> int:
    return object.__getattribute__(handle, "(number)")


def _both(name: str) -> Callable[["Handle", Any], Any]:
    def operate(self: "Handle", other: Any) -> Any:
        # Never with data: the program would learn what is expected, and say how it compares.
        return _peer(self).request(name, self, other) if isinstance(other, Handle) else NotImplemented

    return operate


class Handle:
    """An object of the program, in the tests. It may be called, read, written, indexed, iterated and printed.

    Compared and calculated with it is only what is the program's, too: against data it is unequal, and without order.
    """

    def __init__(self, peer: TestsSide, number: int) -> None:
        # Names that no program can give to an attribute of its own.
        object.__setattr__(self, "(peer)", peer)
        object.__setattr__(self, "(number)", number)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return _peer(self).call(self, arguments, named)

    def __getattr__(self, name: str) -> Any:
        return _peer(self).request("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _peer(self).request("set", self, name, value)

    def __delattr__(self, name: str) -> None:
        _peer(self).request("del", self, name)

    def __getitem__(self, key: Any) -> Any:
        return _peer(self).request("item", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        _peer(self).request("set item", self, key, value)

    def __delitem__(self, key: Any) -> None:
        _peer(self).request("del item", self, key)

    def __len__(self) -> int:
        return _peer(self).request("len", self)

    def __iter__(self) -> Iterator[Any]:
        peer = _peer(self)
        iterator = peer.request("iter", self)
        while True:
            try:
                yield peer.request("next", iterator)
            except StopIteration:
                return

    def __next__(self) -> Any:
        peer = _peer(self)
        return peer.request("next", peer.request("iter", self))

    def __bool__(self) -> bool:
        return _peer(self).request("bool", self) is True

    def __str__(self) -> str:
        return _peer(self).request("str", self)

    def __repr__(self) -> str:
        return _peer(self).request("repr", self)

    def __int__(self) -> int:
        return _peer(self).request("int", self)

    def __float__(self) -> float:
        return _peer(self).request("float", self)

    def __copy__(self) -> Any:
        return _peer(self).request("copy", self)

    def __deepcopy__(self, _: object) -> Any:
        return _peer(self).request("deepcopy", self)

    def __enter__(self) -> Any:
        return _peer(self).request("enter", self)

    def __exit__(self, *_: object) -> None:
        _peer(self).request("exit", self)

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, Handle) and _peer(self).request("isinstance", self, value) is True

    def __subclasscheck__(self, value: Any) -> bool:
        return isinstance(value, Handle) and _peer(self).request("issubclass", self, value) is True

    def __hash__(self) -> int:
        return hash(_number(self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Handle) and _peer(self).request("eq", self, other) is True

    def __ne__(self, other: object) -> bool:
        return not self == other

    __lt__, __le__, __gt__, __ge__ = (_both(name) for name in ("lt", "le", "gt", "ge"))
    __add__, __sub__, __mul__, __truediv__ = (_both(name) for name in ("add", "sub", "mul", "truediv"))
    __floordiv__, __mod__, __matmul__ = (_both(name) for name in ("floordiv", "mod", "matmul"))
    __and__, __or__, __xor__ = (_both(name) for name in ("and_", "or_", "xor"))


def judge(run: Run, tests: str) -> NoReturn:
    """Runs the tests and reports."""
    try:
        code = ast.parse(tests, "<tests>")
        compiled = compile(code, "<tests>", "exec")
    except (SyntaxError, ValueError, RecursionError) as error:
        run.over(FAILED, f"the tests are no Python: {in_words(error)}")
    try:
        kind, about = receive(run.reading, run.deadline)
        if kind != "ready":
            run.over(FAILED, str(about)[:300])
        names = {name for name in about if isinstance(name, str)}
    except TimeoutError:
        run.over(TIMEOUT)
    except Closed:
        run.over(FAILED, "the program ended before the tests began")
    except (WireError, TypeError, ValueError):
        run.over(FAILED, "the program sent something before the tests began")
    side = TestsSide(run)
    namespace: dict[str, Any] = {"__name__": "tests"}
    for name in sorted(_taken(code, names)):
        namespace[name] = side.request("name", name)
    try:
        for name in _modules(code) - namespace.keys():
            namespace[name] = importlib.import_module(name)
        exec(compiled, namespace)
    except BaseException as error:
        run.over(FAILED, in_words(error) + _place(error, tests))
    run.over(PASSED)


def _taken(code: ast.Module, names: set[str]) -> set[str]:
    """Names in the tests that stand for what the program calls so."""
    used = {node.id for node in ast.walk(code) if isinstance(node, ast.Name)} & names
    own = used - set(dir(builtins)) - _modules(code)
    return own or used


def _modules(code: ast.Module) -> set[str]:
    """Modules of the standard library that the tests use as such; programs may have imported them for both."""
    bases = (node.value for node in ast.walk(code) if isinstance(node, ast.Attribute))
    return {base.id for base in bases if isinstance(base, ast.Name)} & set(sys.stdlib_module_names)


def _place(error: BaseException, tests: str) -> str:
    """The line of the tests at which it was raised."""
    trace, line = error.__traceback__, 0
    while trace:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == "<tests>" else line
        trace = trace.tb_next
    return f" (line {line} of the tests: {tests.splitlines()[line - 1].strip()[:120]})" if line else ""
