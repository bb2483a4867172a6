"""What crosses between a program and the tests that judge it: frames of JSON with plain data, references to the rest.

Data is copied: numbers, text, containers, and a few types of the standard library. Everything else (functions, classes,
instances, generators) stays where it is, and the other side gets a reference to it. A type that only claims to be data
is taken for the data that it holds, so no behaviour crosses with a value: what arrives as 4 is the number 4.

Standard library alone: this file also runs inside the sandbox, where nothing else can be read.
"""

import builtins
import importlib
import json
import os
import select
import struct
import time
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_LENGTH = struct.Struct("<I")
LARGEST = 64 << 20
"""Bytes of one frame."""


class WireError(Exception):
    """The other side sent something that is no message."""


class Closed(WireError):
    """The other side has ended."""


def frame(message: Any) -> bytes:
    """The bytes that `receive` reads as `message`. ValueError: it is too large."""
    body = json.dumps(message).encode()
    if len(body) > LARGEST:
        raise ValueError(f"a message of {len(body) >> 20} MiB is too large to be handed over")
    return _LENGTH.pack(len(body)) + body


def send(fd: int, message: Any) -> None:
    data = memoryview(frame(message))
    while data:
        data = data[os.write(fd, data) :]


def receive(fd: int, deadline: float | None = None) -> Any:
    """The next message. deadline: on `time.monotonic`; TimeoutError behind it."""
    (length,) = _LENGTH.unpack(_read(fd, _LENGTH.size, deadline))
    if length > LARGEST:
        raise WireError(f"a message of {length >> 20} MiB")
    try:
        return json.loads(_read(fd, length, deadline))
    except (ValueError, RecursionError) as error:
        raise WireError(str(error)) from None


def _read(fd: int, size: int, deadline: float | None) -> bytes:
    # Never more than asked for: what stands behind it may be meant for another reader.
    data = bytearray()
    while len(data) < size:
        if deadline is not None and not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError
        piece = os.read(fd, min(size - len(data), 1 << 20))
        if not piece:
            raise Closed("the other side has ended")
        data += piece
    return bytes(data)


# ---- Data

_SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {
    "list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque,
}  # fmt: skip
_MAPPINGS: dict[str, Callable[[dict[Any, Any]], Any]] = {
    "dict": dict, "OrderedDict": OrderedDict, "Counter": Counter, "defaultdict": lambda items: defaultdict(None, items),
}  # fmt: skip
# Bases before which a type of the program's own is taken for the data that it holds.
_BASES: tuple[tuple[type, str], ...] = (
    (str, "str"), (int, "int"), (float, "float"), (OrderedDict, "OrderedDict"), (Counter, "Counter"),
    (defaultdict, "defaultdict"), (dict, "dict"), (list, "list"), (tuple, "tuple"), (set, "set"),
    (frozenset, "frozenset"), (deque, "deque"), (bytes, "bytes"), (bytearray, "bytearray"),
)  # fmt: skip
# Types that are written as text: module, name -> how it is read back.
_WRITTEN: dict[tuple[str, str], tuple[Callable[[Any], str], str]] = {
    ("fractions", "Fraction"): (str, ""),
    ("decimal", "Decimal"): (str, ""),
    ("datetime", "date"): (lambda value: value.isoformat(), "fromisoformat"),
    ("datetime", "time"): (lambda value: value.isoformat(), "fromisoformat"),
    ("datetime", "datetime"): (lambda value: value.isoformat(), "fromisoformat"),
}
_SAFE_INT = 1 << 53
_named_tuple: Callable[[str, list[str]], Callable[..., Any]] = namedtuple


def pack(value: Any, refer: Callable[[Any], list[Any]]) -> Any:
    """`value` as JSON. refer: says how to write what is no data."""
    kind = type(value)
    if value is None or kind in (bool, str, float):
        return value
    if kind is int:
        return value if -_SAFE_INT < value < _SAFE_INT else ["int", hex(value)]
    name = kind.__name__
    if kind.__module__ in ("builtins", "collections"):
        if name in _SEQUENCES:
            return [name, *(pack(item, refer) for item in value)]
        if name in _MAPPINGS:
            return [name, *([pack(key, refer), pack(item, refer)] for key, item in value.items())]
        if kind is bytes or kind is bytearray:
            return [name, value.decode("latin-1")]
        if kind is complex:
            return [name, value.real, value.imag]
        if kind is range:
            return [name, *(pack(bound, refer) for bound in (value.start, value.stop, value.step))]
    if (kind.__module__, name) in _WRITTEN:
        return ["written", kind.__module__, name, _WRITTEN[kind.__module__, name][0](value)]
    if (kind.__module__, name) == ("datetime", "timedelta"):
        return ["timedelta", value.days, value.seconds, value.microseconds]
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return ["named", name, list(kind._fields), *(pack(item, refer) for item in tuple.__iter__(value))]
    for base, held in _BASES:
        if isinstance(value, base):
            return pack(_bare(value, held), refer)
    return refer(value)


def _bare(value: Any, held: str) -> Any:
    """The data in an instance of a subclass, without asking the subclass."""
    if held == "str":
        return str.__str__(value)
    if held == "int":
        return int.__int__(value)
    if held == "float":
        return float.__float__(value)
    if held in ("bytes", "bytearray"):
        return (bytes if held == "bytes" else bytearray)(memoryview(value))
    if held in _MAPPINGS:
        return _MAPPINGS[held]({key: dict.__getitem__(value, key) for key in dict.__iter__(value)})
    kind: Any = getattr(builtins, held, deque)
    return _SEQUENCES[held](list(kind.__iter__(value)))


def unpack(tree: Any, resolve: Callable[[list[Any]], Any]) -> Any:
    """The value that `pack` wrote. resolve: finds what a reference stands for. WireError: it is no such thing."""
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    if not isinstance(tree, list) or not tree or not isinstance(tree[0], str):
        raise WireError("no value")
    kind, parts = tree[0], tree[1:]
    try:
        if kind in _SEQUENCES:
            return _SEQUENCES[kind]([unpack(part, resolve) for part in parts])
        if kind in _MAPPINGS:
            return _MAPPINGS[kind]({unpack(key, resolve): unpack(item, resolve) for key, item in parts})
        if kind == "int":
            return int(parts[0], 16)
        if kind == "complex":
            return complex(parts[0], parts[1])
        if kind == "bytes" or kind == "bytearray":
            return (bytes if kind == "bytes" else bytearray)(parts[0].encode("latin-1"))
        if kind == "range":
            return range(*(unpack(part, resolve) for part in parts))
        if kind == "written":
            module, name, text = parts
            back = _WRITTEN[module, name][1]
            made: Any = getattr(importlib.import_module(module), name)
            return getattr(made, back)(text) if back else made(text)
        if kind == "timedelta":
            return importlib.import_module("datetime").timedelta(*parts)
        if kind == "named":
            return _named_tuple(*parts[:2])(*(unpack(part, resolve) for part in parts[2:]))
    except (ArithmeticError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise WireError(f"a {kind} that is none: {error}") from None
    return resolve(tree)


# ---- Conversation


class Peer(ABC):
    """One end of a conversation in which each side may ask the other, and answers while it waits.

    A side that asks waits for the answer, and serves what the other asks meanwhile: the program may call a function
    that the tests handed to it.
    """

    def __init__(self, reading: int, writing: int) -> None:
        self.reading, self.writing = reading, writing
        self.deadline: float | None = None
        self._table: dict[int, Any] = {}
        self._numbers: dict[int, int] = {}

    def ask(self, *question: Any) -> Any:
        """The message that answers `question`: ["give", value, ...] or ["raise", ...]."""
        send(self.writing, ["ask", *question])
        while True:
            message = receive(self.reading, self.deadline)
            if not isinstance(message, list) or not message:
                raise WireError("no message")
            if message[0] != "ask":
                return message
            self.serve(message[1:])

    def serve(self, question: list[Any]) -> None:
        try:
            reply = self.answer(*question)
        except WireError:
            raise
        except BaseException as error:
            reply = self.raised(error)
        send(self.writing, reply)

    @abstractmethod
    def answer(self, operation: Any, *parts: Any) -> list[Any]:
        """The reply to a question of the other side: ["give", value, ...] or ["raise", ...]."""

    @abstractmethod
    def raised(self, error: BaseException) -> list[Any]:
        """The reply where `answer` raised."""

    # What this side has lent to the other, by number.

    def lend(self, value: Any) -> int:
        number = self._numbers.setdefault(id(value), len(self._table))
        self._table[number] = value  # kept, so that its id stays its own
        return number

    def lent(self, number: Any) -> Any:
        if not isinstance(number, int) or number not in self._table:
            raise WireError("a reference to nothing")
        return self._table[number]


def changed(before: list[Any], after: Iterator[Any]) -> Mapping[str, Any]:
    """Arguments that a call changed in place: place -> packed value now."""
    return {str(place): now for place, (then, now) in enumerate(zip(before, after, strict=True)) if then != now}


def rewrite(value: Any, now: Any) -> None:
    """Make the container `value` hold what `now`, one of its type, holds."""
    if type(value) is not type(now):
        return
    if isinstance(value, list | bytearray):
        value[:] = now
    elif isinstance(value, dict | set | deque):
        value.clear()
        (value.extend if isinstance(value, deque) else value.update)(now)


def in_words(error: BaseException) -> str:
    """An exception in one line."""
    try:
        text = " ".join(str(error).split())[:300]
    except BaseException:
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
