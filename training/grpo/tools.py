"""Tools: python functions that the model calls in the format of its family, and gets the results of."""

import importlib
import inspect
import json
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...core.completer import split_reply
from ...core.encoding_deepseek import STYLES
from ...core.messages import Call
from ...core.special_tokens import CALL_BEGIN, CALL_END, CALLS_BEGIN, TOOL_SEP
from ...core.tokenizer import Tokenizer
from ...errors import UserError
from .environment import MalformedCall, Message, Opening, Reply, TookTooLong, within
from .prompts import messages_of

JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}


def load_function(name: str, key: str) -> Callable[..., Any]:
    """The function "module:function"; modules of the working directory are found, too. key: of the setting."""
    module, colon, function = name.partition(":")
    if not colon:
        raise UserError(f'{key}: {name!r} must read "module:function"')
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{key}: cannot import {name!r}: {error}") from None
    if not callable(found):
        raise UserError(f"{key}: {name!r} is no function")
    return found


def describe(function: Callable[..., Any]) -> dict[str, Any]:
    """A function as a tool in OpenAI's form: its docstring, and a JSON schema of its annotated parameters."""
    hints = typing.get_type_hints(function)
    properties: dict[str, Any] = {}
    required = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UserError(f"tool {function.__name__}: parameter {name!r} cannot be given by name")
        properties[name] = _schema(hints.get(name, str), f"tool {function.__name__}, parameter {name!r}")
        if parameter.default is parameter.empty:
            required.append(name)
    schema = {"type": "object", "properties": properties, "required": required}
    description = inspect.getdoc(function) or ""
    return {
        "type": "function",
        "function": {"name": function.__name__, "description": description, "parameters": schema},
    }


def _schema(hint: Any, where: str) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        inner = [argument for argument in arguments if argument is not type(None)]
        if len(inner) == 1:
            return _schema(inner[0], where)
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin is list:
        return {"type": "array", "items": _schema(arguments[0], where)}
    kind = JSON_TYPES.get(origin or hint)
    if kind is None:
        raise UserError(f"{where} must be annotated as one of {', '.join(t.__name__ for t in JSON_TYPES)}, not {hint}")
    return {"type": kind}


class ToolEnvironment:
    """Runs the functions that a reply calls, and answers with their results; a reply without calls is the last.

    What goes wrong (an unknown name, arguments that do not fit, an exception, a function slower than `timeout`
    seconds) is told to the model as the result. A function that hangs keeps its thread until the process ends.
    """

    reward: float | None = None

    def __init__(self, functions: Sequence[Callable[..., Any]], timeout: float = 10.0):
        self.functions = {function.__name__: function for function in functions}
        self.tools = [describe(function) for function in functions]
        self.timeout = timeout

    def reset(self, row: Mapping[str, Any]) -> Opening:
        return Opening(messages_of(row), self.tools)

    def step(self, reply: Reply) -> Sequence[Message] | None:
        return [{"role": "tool", "content": self.answer(call)} for call in reply.calls] or None

    def answer(self, call: Call | MalformedCall) -> str:
        """The result of one call as text."""
        if isinstance(call, MalformedCall):
            return f"error: {call.reason}"
        function = self.functions.get(call.name)
        if function is None:
            return f"error: there is no tool {call.name!r}; there are {', '.join(self.functions)}"
        try:
            arguments = json.loads(call.arguments)
        except ValueError as error:
            return f"error: the arguments are not JSON: {error}"
        if not isinstance(arguments, dict):
            return "error: the arguments must be a JSON object"
        return self._run(function, arguments)

    def _run(self, function: Callable[..., Any], arguments: dict[str, Any]) -> str:
        try:
            result = within(self.timeout, function, **arguments)
            return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
        except TookTooLong:
            return f"error: {function.__name__} took longer than {self.timeout:g} s"
        except Exception as error:  # whatever a tool raises is an answer
            return f"error: {type(error).__name__}: {error}"


def read_reply(ids: Sequence[int], tokenizer: Tokenizer, format: str, opened: str = "") -> Reply:
    """What the model wrote in a turn, from its token ids without the end token.

    Calls are told by control tokens, never by text that spells them. opened: what the prompt has begun of the text.
    Formats other than DeepSeek's have no calls here.
    """
    text = opened + tokenizer.decode(ids, skip_special=True)
    style, begin = STYLES.get(format), tokenizer.specials.get(CALL_BEGIN)
    if style is None or begin not in ids:
        return Reply(text, split_reply(text)[1])
    section, end = tokenizer.specials.get(CALLS_BEGIN), tokenizer.special_id(CALL_END)
    first = next(i for i, token in enumerate(ids) if token in (begin, section))
    calls: list[Call | MalformedCall] = []
    for start in (i for i, token in enumerate(ids) if token == begin):
        rest = list(ids[start + 1 :])
        if end not in rest or begin in rest[: rest.index(end)]:
            calls.append(MalformedCall("a tool call does not end"))
            continue
        calls.append(_read_call(rest[: rest.index(end)], tokenizer, bool(style.call_lead), style.call_open))
    return Reply(text, split_reply(opened + tokenizer.decode(ids[:first], skip_special=True))[1], calls)


def _read_call(ids: list[int], tokenizer: Tokenizer, has_kind: bool, opening: str) -> Call | MalformedCall:
    separator = tokenizer.special_id(TOOL_SEP)
    if ids.count(separator) != 1:
        return MalformedCall("a tool call needs its name and its arguments, with one separator between")
    place = ids.index(separator)
    before, after = tokenizer.decode(ids[:place]), tokenizer.decode(ids[place + 1 :])
    if not has_kind:
        return Call(before, after, "function", None)
    name, fence, arguments = after.partition(opening)
    if not fence:
        return MalformedCall("the arguments of a tool call must stand in a block of ```json")
    return Call(name, arguments.removesuffix("\n```"), before or "function", None)
