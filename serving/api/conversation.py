"""From a chat request to its prompt: roles, tools, thinking switches and open last messages in every spelling."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from ...core.encoding import encode_chat
from ...core.reply_splitter import MARKUP
from ...core.reply_stream import opens_reasoning
from ...core.special_tokens import Segment
from ...errors import UserError
from .auth import Tenant
from .errors import BadRequest
from .protocol import ChatMessage, ChatRequest, ChatTool, TokenizeRequest
from .service import Service

TURN = 64  # characters that a message costs besides its text


@dataclass(frozen=True)
class ChatPrompt:
    """ids: of the prompt. reasoning: it leaves the thought open, so the reply goes on with it."""

    ids: list[int]
    reasoning: bool


def offered_tools(request: ChatRequest, format: str) -> list[ChatTool]:
    """The functions that the model may call: all, the one chosen, or none. Raises BadRequest."""
    tools, choice = request.tools or [], request.tool_choice
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise BadRequest("two tools have the same name", "tools", "invalid_value")
    if choice == "none":
        return []
    if choice is not None and choice != "auto" and not tools:
        raise BadRequest("tool_choice asks for a call, but there are no tools", "tool_choice", "invalid_value")
    if tools and format not in MARKUP:
        raise BadRequest(f"the chat format {format} of this model has no tools", "tools", "unsupported_parameter")
    if not isinstance(choice, str) and choice is not None and choice.function.name not in names:
        raise BadRequest("tool_choice names a function that is not among the tools", "tool_choice", "invalid_value")
    return tools


def chosen_tools(request: ChatRequest, tools: Sequence[ChatTool]) -> list[ChatTool]:
    """Those of which one or more must be called; none where the model decides."""
    choice = request.tool_choice
    if choice == "required":
        return list(tools)
    if choice is None or isinstance(choice, str):
        return []
    return [tool for tool in tools if tool.function.name == choice.function.name]


async def chat_prompt(
    service: Service, tenant: Tenant, request: ChatRequest | TokenizeRequest, tools: Sequence[ChatTool]
) -> ChatPrompt:
    """Raises BadRequest, naming the message, for conversations that cannot be put to this model."""
    format = service.settings.format
    if format is None:
        raise BadRequest(
            "this model has no chat format; ask for plain completions", "messages", "unsupported_parameter"
        )
    messages = request.messages or []
    generate, goes_on = request.add_generation_prompt, bool(request.continue_final_message)
    if goes_on and generate:
        text = "continue_final_message leaves no place for add_generation_prompt; set one of them to false"
        raise BadRequest(text, "add_generation_prompt", "invalid_value")
    if any(message.prefix for message in messages[:-1]) or (messages[-1].prefix and messages[-1].role != "assistant"):
        raise BadRequest("only a last message of the assistant can be a prefix", "messages", "invalid_value")
    turns = [_message(index, message) for index, message in enumerate(messages)]
    thinking = _thinking(service, request, format)
    declared = [msgspec.to_builtins(tool) for tool in tools] or None

    def segments() -> list[Segment]:
        return encode_chat(turns, format, declared, thinking, generate is not False, goes_on)

    try:
        if sum(len(turn["content"]) + TURN for turn in turns) <= service.settings.long_text:
            ids = service.encode_now(tenant, segments())
        else:
            ids = await service.aside(lambda: service.encode_now(tenant, segments()))
    except UserError as error:
        raise BadRequest(str(error), "messages", "invalid_value") from None
    return ChatPrompt(ids, opens_reasoning(service.tokenizer, ids))


def _thinking(service: Service, request: ChatRequest | TokenizeRequest, format: str) -> bool:
    """Whether to ask for a thought, for encode_chat. DeepSeek's field must be obeyed; the hints that clients send to
    any model are for those with a switch."""
    if request.thinking is not None:
        wanted = request.thinking.type == "enabled"
        if format != "v3.1" and wanted != (format == "r1"):
            text = "this model always thinks" if format == "r1" else "this model cannot think"
            raise BadRequest(text, "thinking", "unsupported_parameter")
    else:
        kwargs, effort = request.chat_template_kwargs, request.reasoning_effort
        said = [kwargs.thinking, kwargs.enable_thinking] if kwargs is not None else []
        said += [effort != "none"] if effort is not None else []
        wanted = next((value for value in said if value is not None), service.settings.thinking)
    return wanted and format == "v3.1"


def _message(index: int, message: ChatMessage) -> dict[str, Any]:
    """As encode_chat takes it. Raises BadRequest for what is not text, and content that is missing."""
    where = f"messages[{index}]"
    content = message.content
    if isinstance(content, list):
        for place, part in enumerate(content):
            if part.type != "text" or part.text is None:
                param = f"{where}.content[{place}]"
                raise BadRequest(f"{param} is no text, and this model reads only text", param, "unsupported_parameter")
        content = "".join(part.text or "" for part in content)
    calls = message.tool_calls or []
    if calls and message.role != "assistant":
        raise BadRequest(
            f"{where} has tool_calls, which only the assistant makes", f"{where}.tool_calls", "invalid_value"
        )
    thought = message.reasoning_content or message.reasoning or ""
    if content is None and not calls and not (message.role == "assistant" and thought):
        raise BadRequest(f"{where}.content is required", f"{where}.content", "missing_required_parameter")
    return {
        "role": "system" if message.role == "developer" else message.role,
        "content": content or "",
        "name": message.name,
        "tool_calls": [_call(call) for call in calls],
        "tool_call_id": message.tool_call_id,
        "reasoning_content": thought,
        "prefix": bool(message.prefix),
    }


def _call(call: Any) -> dict[str, Any]:
    arguments = call.function.arguments
    if not isinstance(arguments, str):
        arguments = msgspec.json.encode(arguments or {}).decode()
    return {"id": call.id, "type": call.type, "function": {"name": call.function.name, "arguments": arguments}}
