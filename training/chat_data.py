"""Conversations as training data: read from files, and turned into tokens of which some are to be learnt.

Rows come in three forms:
- OpenAI: `messages` of role and content, with `reasoning_content`, `tool_calls` and `tool_call_id` where they apply;
- ShareGPT: `conversations` of `from` and `value`, and perhaps `system`;
- `prompt` and `completion`, each a text (one message of the user, one of the assistant) or a list of messages. A row
  may do without `completion`: it is a prompt alone.
`tools`, in the OpenAI form or as its JSON text, belongs to the conversation; every other column is kept as it is.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..core.completer import split_reply
from ..core.encoding import encode_chat
from ..core.messages import parse_messages, parse_tools
from ..core.special_tokens import END_THINK, THINK, Prompt, Segment, Special
from ..core.tokenizer import Tokenizer
from ..errors import UserError
from .data.records import RECORDS, read_records
from .data.sources import files_below

Message = dict[str, Any]

SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",  # its value is the call, or a list of calls
    "observation": "tool",
    "tool": "tool",
}
CONVERSATION = ("messages", "conversations", "prompt", "completion", "tools")


@dataclass(frozen=True)
class ChatRow:
    """A conversation in the OpenAI form. columns: what else the row holds; where: its file and line, for errors."""

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    columns: dict[str, Any] = field(default_factory=dict)
    where: str = "row"


class Example(NamedTuple):
    """Tokens of a conversation from its first on; loss_mask says which of them are to be learnt."""

    token_ids: list[int]
    loss_mask: list[bool]


def data_files(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files behind `paths`: themselves, or all .jsonl(.gz, .zst) and .parquet files below a folder, sorted."""
    found = []
    for place in [paths] if isinstance(paths, str | Path) else paths:
        path = Path(place).expanduser()
        if not path.exists():
            raise UserError(f"{path} does not exist; give a file of conversations or a folder of such files")
        files = [file for file in files_below(path) if file.name.lower().endswith(RECORDS)] if path.is_dir() else [path]
        if not files:
            raise UserError(f"{path} has no files of conversations in it ({', '.join(RECORDS)})")
        found += files
    return found


def load_rows(paths: str | Path | Sequence[str | Path]) -> Iterator[ChatRow]:
    """The rows of files and folders (`data_files`), one after the other.

    UserError, with file and line, for what is no conversation: unknown roles, missing content, malformed calls, ...
    """
    for path in data_files(paths):
        for where, record in read_records(path):
            try:
                yield _row(record, where)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None


def _row(record: Any, where: str) -> ChatRow:
    if not isinstance(record, Mapping):
        raise UserError(f"is no object with columns but {type(record).__name__}")
    if record.get("messages") is not None:
        messages = _messages(record["messages"])
    elif record.get("conversations") is not None:
        messages = _conversation(record)
    elif record.get("prompt") is not None:
        messages = _part(record["prompt"], "user")
        if record.get("completion") is not None:
            messages += _part(record["completion"], "assistant")
    else:
        found = ", ".join(map(str, record)) or "nothing"
        raise UserError(f"no column 'messages', 'conversations' or 'prompt' (found: {found})")
    tools = _tools(record.get("tools"))
    parse_tools(tools)
    for message, parsed in zip(messages, parse_messages(messages), strict=True):
        if "content" in message:  # which may be a list of parts
            message["content"] = parsed.content
        message.pop("reasoning", None)
        if parsed.reasoning:
            message["reasoning_content"] = parsed.reasoning
    return ChatRow(messages, tools, {key: record[key] for key in record if key not in CONVERSATION}, where)


def _messages(messages: Any) -> list[Message]:
    """Columnar files give every message the keys of all: those without a value go."""
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise UserError("messages must be a list of {'role': ..., 'content': ...}")
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _part(value: Any, role: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list):
        return _messages(value)
    name = "prompt" if role == "user" else "completion"
    raise UserError(f"{name} must be text or a list of messages, not {type(value).__name__}")


def _conversation(record: Mapping[str, Any]) -> list[Message]:
    turns = record["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise UserError("conversations must be a list of {'from': ..., 'value': ...}")
    if all("role" in turn for turn in turns):  # some files use this name for messages in the OpenAI form
        return _messages(turns)
    messages = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    for index, turn in enumerate(turns):
        who, value = turn.get("from"), turn.get("value")
        if who not in SHAREGPT:
            known = ", ".join(SHAREGPT)
            raise UserError(f"turn {index} comes from {who!r}, which is unknown; known are {known}")
        if not isinstance(value, str):
            raise UserError(f"turn {index} has no value; give a string (it may be empty)")
        if who == "function_call":
            messages.append({"role": "assistant", "tool_calls": _calls(value, index)})
        else:
            messages.append({"role": SHAREGPT[who], "content": value})
    return messages


def _calls(value: str, index: int) -> list[dict[str, Any]]:
    try:
        calls = json.loads(value)
    except ValueError:
        raise UserError(f"turn {index} is a function_call, but its value is not JSON") from None
    return [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]


def _tools(tools: Any) -> list[dict[str, Any]]:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            raise UserError("tools is text, but not JSON") from None
    if tools is not None and not isinstance(tools, list):
        raise UserError(f"tools must be a list of functions, not {type(tools).__name__}")
    return tools or []


def apart(message: Mapping[str, Any]) -> Message:
    """A reply with its thought in `reasoning_content`, without the line breaks around it, and not in `content`.

    UserError for a thought in `content` that never ends, and for two of them.
    """
    plain = {key: value for key, value in message.items() if key not in ("reasoning_content", "prefix")}
    reasoning, content = message.get("reasoning_content", "").strip("\n"), message.get("content", "")
    if END_THINK in content:
        inline, plain["content"] = split_reply(content)
        if END_THINK in plain["content"] or (reasoning and inline and inline != reasoning):
            raise UserError(f"it has more than one thought: leave one {END_THINK}, or none beside reasoning_content")
        reasoning = reasoning or inline
    elif content.startswith(THINK):
        raise UserError(f"its thought begins with {THINK} and never ends; complete it or remove the row")
    return plain | ({"reasoning_content": reasoning} if reasoning else {})


def encode_example(row: ChatRow, tokenizer: Tokenizer, format: str, thinking_in_loss: bool = True) -> list[Example]:
    """The samples that a conversation makes in a chat format (`encode_chat`); only what the assistant writes is learnt.

    Each reply is written behind the very prompt that a model gets when it is asked for it, with its thought and its end
    token. Where that is how the template shows the reply in later turns, these go on in the same sample. Where it is
    not, a new one begins: R1 does not show earlier thoughts, so a conversation of three replies is three samples.
    A reply with `"weight": 0`, and one that nothing asks for, because it comes first, is shown but not learnt.

    thinking_in_loss: whether thoughts, with the tag that ends them, are learnt.
    UserError, with the row's place, for thoughts and tools in formats that cannot hold them.
    """
    try:
        return _encode(row, tokenizer, format, thinking_in_loss)
    except UserError as error:
        raise UserError(f"{row.where}: {error}") from None


def _encode(row: ChatRow, tokenizer: Tokenizer, format: str, thinking_in_loss: bool) -> list[Example]:
    messages = [_apart(index, message) for index, message in enumerate(row.messages)]
    examples: list[Example] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index == 0:
            continue
        reasoning = message.get("reasoning_content", "")
        _check_thought(f"message {index}", reasoning, format)
        opening = encode_chat(messages[:index], format, row.tools, thinking=bool(reasoning) and format == "v3.1")
        thought = _thought(f"message {index}", reasoning, format, opening)
        lead = "\n\n" if thought and format == "r1" else ""
        prompt = tokenizer.encode_segments(opening)
        parts = [
            (tokenizer.encode_segments(thought), thinking_in_loss),
            (tokenizer.encode_segments(_joined(lead, *_body(message, format))), True),
        ]
        add_turn(examples, prompt, parts, learnt=message.get("weight") != 0)
    return learnable(examples)


def learnable(examples: Sequence[Example]) -> list[Example]:
    """Those that have something to learn, each up to its last token that is."""
    kept = []
    for ids, mask in examples:
        end = len(mask) - mask[::-1].index(True) if True in mask else 0
        if end:
            kept.append(Example(ids[:end], mask[:end]))
    return kept


def add_turn(
    examples: list[Example], prompt: list[int], reply: Sequence[tuple[list[int], bool]], learnt: bool = True
) -> None:
    """Add a reply, in parts that are to be learnt or not: to the last example if the prompt goes on from its very
    tokens, else as an example of its own."""
    ids = prompt + [token for part, _ in reply for token in part]
    wanted = [wanted and learnt for part, wanted in reply for _ in part]
    known: list[bool] = []
    if examples and prompt[: len(examples[-1].token_ids)] == examples[-1].token_ids:
        known = examples.pop().loss_mask
    examples.append(Example(ids, known + [False] * (len(prompt) - len(known)) + wanted))


def _apart(index: int, message: Message) -> Message:
    try:
        return apart(message) if message["role"] == "assistant" else message
    except UserError as error:
        raise UserError(f"message {index}: {error}") from None


def _check_thought(where: str, reasoning: str, format: str) -> None:
    if reasoning and format not in ("r1", "v3.1"):
        raise UserError(
            f"{where} has a thought (reasoning_content, or {THINK} in its content), which the chat format {format!r} "
            'cannot hold; use data.format = "r1" or "v3.1", or remove the thoughts'
        )


def _thought(where: str, reasoning: str, format: str, opening: list[Segment]) -> list[Segment]:
    """What the assistant writes of its thought, up to the tag that ends it, behind a prompt that may have begun it."""
    if format == "r1":
        if opening[-2:] == [Special(THINK), "\n"]:  # an empty thought is closed, too
            return _joined(reasoning, "\n", Special(END_THINK))
        return _joined(Special(THINK), "\n", reasoning, "\n", Special(END_THINK)) if reasoning else []
    if reasoning and opening[-1] != Special(THINK):
        raise UserError(f"{where} has a thought in a place where the chat format {format!r} has none: it only thinks "
                        "in answer to a user")  # fmt: skip
    return [reasoning, Special(END_THINK)] if reasoning else []


def _body(message: Message, format: str) -> list[Segment]:
    """What the assistant writes behind its thought: content, calls, and the end of its turn.

    Taken from a conversation in which it is the first reply: for later calls, the templates of V3 and R1 leave out the
    marks that a model must write.
    """
    plain = {key: value for key, value in message.items() if key not in ("reasoning_content", "name")}
    asked = [{"role": "user", "content": ""}]
    prompt = encode_chat(asked, format)
    whole = encode_chat([*asked, plain], format, add_generation_prompt=False)
    common = next((i for i, pair in enumerate(zip(prompt, whole, strict=False)) if pair[0] != pair[1]), len(prompt))
    return whole[common:]


def _joined(*segments: Segment) -> list[Segment]:
    prompt = Prompt()
    prompt.add(*segments)
    return prompt.segments
