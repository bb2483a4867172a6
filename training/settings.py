"""Run settings: frozen dataclasses read from TOML, with `key=value` overrides typed by the dataclass.

A settings class derives from `Section`. Its annotations are the schema: every value is converted and range-checked when
an instance is made, whether it comes from a file, from the command line or from Python. Whatever is wrong is a
`UserError` of one line that names the key by its dotted path.
"""

import dataclasses
import difflib
import json
import math
import re
import tomllib
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from ..errors import UserError

_MULTIPLES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Range:
    """The numbers a setting accepts: low <= value <= high, or low < value where `open`."""

    low: float = -math.inf
    high: float = math.inf
    open: bool = False

    def check(self, value: float, where: str) -> None:
        if value < self.low or value > self.high or (self.open and value == self.low):
            parts = [f"{'above' if self.open else 'at least'} {self.low:g}"] if self.low > -math.inf else []
            parts += [f"at most {self.high:g}"] if self.high < math.inf else []
            raise UserError(f"{where} must be {' and '.join(parts)}, not {value:g}")


Positive = Annotated[float, Range(0, open=True)]
NonNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
Size = Annotated[int, Range(1)]
Count = Annotated[int, Range(0)]


@dataclass(frozen=True)
class Span:
    """A length of training or a point in it, in steps, tokens or percent of the run.

    Written "2000 steps" (or the bare integer 2000), "14.3T tokens" (K, M, B, T are powers of ten) or "60%".
    """

    value: float
    unit: Literal["steps", "tokens", "percent"]

    @classmethod
    def parse(cls, value: object, where: str) -> "Span":
        if isinstance(value, Span):
            return value
        found = (
            None
            if isinstance(value, bool)
            else re.fullmatch(r"([\d.]+)\s*([KMBT]?)\s*(steps|tokens|%|)", str(value).strip())
        )
        try:
            number = Decimal(found[1]) * _MULTIPLES[found[2]] if found else None
        except InvalidOperation:
            number = None
        if found is None or number is None:
            raise UserError(f'{where} must read like "2000 steps", "10B tokens" or "60%", not {value!r}')
        if found[3] == "%":
            if found[2] or number > 100:
                raise UserError(f"{where} must be at most 100%, not {value!r}")
            return cls(float(number), "percent")
        if number != int(number):
            raise UserError(f"{where} must be a whole number of steps or tokens, not {value!r}")
        return cls(int(number), "tokens" if found[3] == "tokens" else "steps")

    def __str__(self) -> str:
        if self.unit == "percent":
            return f"{self.value:.10g}%"
        for suffix, multiple in reversed(_MULTIPLES.items()):
            if suffix and self.value and self.value % (multiple / 10) == 0 and self.value >= multiple:
                return f"{Decimal(int(self.value)) / multiple:f}{suffix} {self.unit}"
        return f"{int(self.value)} {self.unit}"


@dataclass(frozen=True)
class Section:
    """One table of a settings file. Subclasses are frozen dataclasses in which every field has a default."""

    extra: ClassVar[str | None] = None  # the dict field that collects keys which are no fields of this class

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            object.__setattr__(self, name, _convert(getattr(self, name), hint, name))
        self.check()

    def check(self) -> None:
        """Raise UserError where fields that are fine alone do not fit together; the text starts with the key."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "") -> Self:
        """Build from plain TOML data; `where` is the dotted prefix that error messages use ("optim.")."""
        hints = _hints(cls)
        fields: dict[str, Any] = {}
        for key, value in values.items():
            if key in hints and key != cls.extra:
                fields[key] = _convert(value, hints[key], where + key)
            elif cls.extra:
                fields.setdefault(cls.extra, {})[key] = value
            else:
                raise _unknown(where, key, hints)
        try:
            return cls(**fields)
        except UserError as error:
            raise UserError(f"{where}{error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain TOML data: what `from_dict` turns back into an equal instance. Fields that are None are left out."""
        result = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == self.extra:
                result.update(value)
            elif value is not None:
                result[field.name] = _plain(value)
        return result

    def to_toml(self) -> str:
        """The same as a TOML document: first the plain keys, then one table for each section."""
        tables = {key: value for key, value in self.to_dict().items() if isinstance(value, dict)}
        lines = [f"{_key(key)} = {_value(value)}" for key, value in self.to_dict().items() if key not in tables]
        for name, table in tables.items():
            lines += ["", f"[{_key(name)}]"] + [f"{_key(key)} = {_value(value)}" for key, value in table.items()]
        return "\n".join(lines).lstrip("\n") + "\n"

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Self:
        """Read a TOML file and apply `dotted.key=value` overrides, later ones over earlier ones and over the file."""
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot read settings {path}: {error.strerror or error}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not a TOML file: {error}") from None
        for override in overrides:
            _override(values, cls, override)
        return cls.from_dict(values)


def _hints(cls: type[Section]) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _unknown(where: str, key: str, known: Iterable[str]) -> UserError:
    known = list(known)
    close = difflib.get_close_matches(key, known, n=1)
    help_ = f"did you mean {where}{close[0]}?" if close else f"known here: {', '.join(known)}"
    return UserError(f"unknown key {where}{key}; {help_}")


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Section)


def _optional(hint: Any) -> tuple[Any, bool]:
    """(X, True) for `X | None`, else (hint, False)."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(arm for arm in get_args(hint) if arm is not type(None)), True
    return hint, False


def _convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotation `hint` wants it, or a UserError that names `where`."""
    hint, optional = _optional(hint)
    if optional and value is None:
        return None
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        value = _convert(value, arguments[0], where)
        arguments[1].check(value, where)
        return value
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{where} must be one of {', '.join(map(str, arguments))}, not {value!r}")
        return value
    if hint is Span:
        return Span.parse(value, where)
    if _is_section(hint):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping):
            raise UserError(f"{where} must be a table of settings, not {value!r}")
        return hint.from_dict(value, where + ".")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where} must be a list, not {value!r}")
        if arguments[-1] is Ellipsis:
            arguments = arguments[:1] * len(value)
        if len(arguments) != len(value):
            raise UserError(f"{where} must be a list of {len(arguments)} values, not {len(value)}")
        return tuple(
            _convert(item, arm, f"{where}[{i}]") for i, (item, arm) in enumerate(zip(value, arguments, strict=True))
        )
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{where} must be a table, not {value!r}")
        return {key: _convert(item, arguments[1], f'{where}."{key}"') for key, item in value.items()}
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise UserError(f"{where} must be a finite number, not {value}")
        return float(value)
    if hint is not Any and type(value) is not hint:
        kind = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[hint]
        raise UserError(f"{where} must be {kind}, not {value!r}")
    return value


def _override(values: dict[str, Any], cls: type[Section], text: str) -> None:
    """Set one `dotted.key=value` in plain TOML data; the annotation of the key decides how the value is read."""
    path, equals, value = text.partition("=")
    names = path.strip().split(".")
    if not equals or not all(names):
        raise UserError(f"override {text!r} must read key=value, for example optim.lr=1e-3")
    hint: Any = cls
    for depth, name in enumerate(names):
        if get_origin(hint) is dict and _is_section(get_args(hint)[1]):  # tables under names of the user's own
            hints = {name: get_args(hint)[1]}
        elif _is_section(hint):
            hints = _hints(hint)
            if name not in hints and not hint.extra:
                raise _unknown("".join(part + "." for part in names[:depth]), name, hints)
        else:
            raise UserError(f"{'.'.join(names[:depth])} is set as a whole, it has no key {name!r} of its own")
        if depth < len(names) - 1:
            values = values.setdefault(name, {})
            if not isinstance(values, dict):
                raise UserError(f"{'.'.join(names[: depth + 1])} must be a table of settings, not {values!r}")
        hint, optional = _optional(hints.get(name, Any))
    if optional and value.strip() == "none":
        values.pop(names[-1], None)
    else:
        values[names[-1]] = _read(value.strip(), hint, path.strip())


def _read(text: str, hint: Any, where: str) -> Any:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    base = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if base is str and not isinstance(value, str):  # a name that looks like a number stays a name
        value = text
    if isinstance(value, str) and base in (int, float, bool):
        raise UserError(f"{where} must be a {'switch: true or false' if base is bool else 'number'}, not {text!r}")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.to_dict()
    if isinstance(value, Span):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _value(name)


def _value(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return (
            "{ " + ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items()) + " }" if value else "{}"
        )
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    return repr(value)
