"""What a text must look like, in all the spellings that clients use: OpenAI's response_format, vLLM's
structured_outputs and guided_*, and tool_choice."""

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from ...core.sampling_params import Guide
from .errors import BadRequest
from .protocol import ChatTool, FormatJsonObject, FormatJsonSchema, Sampling


def guide_of(request: Sampling, most: int) -> Guide | None:
    """What the request asks for, if it does. most: bytes of a schema, pattern or grammar.

    Raises BadRequest where two fields ask for different forms, or one is too large.
    """
    asked: list[tuple[str, Guide]] = []
    match request.response_format:
        case FormatJsonObject():
            asked.append(("response_format", Guide("json_object")))
        case FormatJsonSchema(json_schema=wanted):
            guide = Guide("json_object") if wanted.schema is None else _schema(wanted.schema, "response_format")
            asked.append(("response_format", guide))
    asked += _fields("guided_", request, request.guided_json, request.guided_choice)
    if request.structured_outputs is not None:
        inner = request.structured_outputs
        found = _fields("", inner, inner.json, inner.choice)
        if inner.json_object:
            found.append(("json_object", Guide("json_object")))
        asked += [(f"structured_outputs.{name}", guide) for name, guide in found]
    if not asked:
        return None
    if len(asked) > 1:
        names = " and ".join(name for name, _ in asked)
        raise BadRequest(f"{names} ask for different forms of the text; give one", asked[1][0], "invalid_value")
    field, guide = asked[0]
    if len(guide.text.encode()) > most:
        raise BadRequest(f"{field} is larger than {most} bytes", field, "invalid_value")
    return guide


def tools_guide(tools: Sequence[ChatTool], format: str, after_thinking: bool, most: int) -> Guide:
    """One or more calls of these functions, and nothing else. BadRequest for schemas of more than `most` bytes."""
    pairs = tuple((tool.function.name, _text(tool.function.parameters or {"type": "object"})) for tool in tools)
    if sum(len(schema.encode()) for _, schema in pairs) > most:
        raise BadRequest(f"the parameters of the tools are larger than {most} bytes", "tools", "invalid_value")
    return Guide("tools", tools=pairs, format=format, after_thinking=after_thinking)


def _fields(prefix: str, source: Any, schema: Any, choice: list[str] | None) -> list[tuple[str, Guide]]:
    found = []
    if schema is not None:
        found.append((f"{prefix}json", _schema(schema, f"{prefix}json")))
    if choice is not None:
        found.append((f"{prefix}choice", Guide("grammar", f"start: {' | '.join(map(_terminal, choice))}\n")))
    for kind in ("regex", "grammar"):
        text = getattr(source, prefix + kind)
        if text is not None:
            found.append((prefix + kind, Guide(kind, text)))
    return found


def _schema(schema: dict[str, Any] | str, field: str) -> Guide:
    if isinstance(schema, str):
        try:
            schema = msgspec.json.decode(schema, type=dict[str, Any])
        except (msgspec.MsgspecError, RecursionError):
            raise BadRequest(f"{field} is not the JSON of a schema object", field, "invalid_value") from None
    return Guide("json_schema", _text(schema))


def _text(schema: dict[str, Any]) -> str:
    return msgspec.json.encode(schema).decode()


def _terminal(text: str) -> str:
    """A string of a Lark grammar, which is written as in JSON."""
    return json.dumps(text, ensure_ascii=False)
