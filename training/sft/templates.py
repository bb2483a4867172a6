"""Conversations in the words of a tokenizer's own chat template, for students that run through transformers.

A template is a program that writes text, and says neither where a reply begins nor whether it shows thoughts. Both are
found by comparison: a reply is what stands behind the prompt that the template itself makes for it.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from ...core.special_tokens import END_THINK, THINK
from ...errors import UserError
from ..chat_data import ChatRow, Example, Message, add_turn, apart, learnable

PROBE = f"{THINK}\nx + 1\n{END_THINK}\n\n**y**"
OPENED = re.compile(rf"{THINK}\s*$")


class Template:
    """A tokenizer of transformers, with its template. UserError where it has none, or one without an end of turns.

    end: id of the token that ends a reply.
    """

    def __init__(self, tokenizer: Any, name: str):
        self.tokenizer, self.name = tokenizer, name
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(f"{name}: its tokenizer has no chat template; add a chat_template.jinja to the directory")
        if not tokenizer.is_fast:
            raise UserError(f"{name}: its tokenizer has no tokenizer.json, which dsv3 needs")
        decoder = tokenizer.added_tokens_decoder
        self._controls = {number for number, token in decoder.items() if token.special}
        asked = [{"role": "user", "content": "a"}]
        _, reply = self._reply(asked, {"role": "assistant", "content": "b"}, None)
        ends = [token for token in self._ids(reply)[0] if token in self._controls]
        if not ends:
            raise UserError(f"{name}: its chat template ends a reply ({reply!r}) with no control token to stop at")
        self.end: int = ends[-1]
        self._keeps_thoughts = self.tokenizer.decode(self._ids(PROBE)[0]) == PROBE

    def encode(self, row: ChatRow, thinking_in_loss: bool) -> list[Example]:
        """As `chat_data.encode_example`, in this template."""
        try:
            return self._encode(row, thinking_in_loss)
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from None

    def _encode(self, row: ChatRow, thinking_in_loss: bool) -> list[Example]:
        messages = [_plain(message) for message in row.messages]
        examples: list[Example] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or index == 0:
                continue
            if message.get("reasoning_content") and not self._keeps_thoughts:
                raise UserError(
                    f"message {index} has a thought, but the tokenizer of {self.name} does not keep {PROBE!r} as it is "
                    f"(it reads {self.tokenizer.decode(self._ids(PROBE)[0])!r}): choose another student"
                )
            prompt, reply = self._reply(messages[:index], message, row.tools or None)
            ids, starts = self._ids(reply)
            last = max((place for place, token in enumerate(ids) if token in self._controls), default=None)
            if last is None:
                raise UserError(f"the chat template ends message {index} with no control token: {reply[-20:]!r}")
            ids = ids[: last + 1]  # what a template writes behind the end of a turn is not the model's
            thought = reply.find(END_THINK) + len(END_THINK) if END_THINK in reply else 0
            within = sum(start < thought for start in starts[: len(ids)]) if not thinking_in_loss else 0
            parts = [(ids[:within], False), (ids[within:], True)]
            add_turn(examples, self._ids(prompt)[0], parts, learnt=message.get("weight") != 0)
        return learnable(examples)

    def _reply(self, before: list[Message], message: Message, tools: Any) -> tuple[str, str]:
        """(prompt, what the assistant writes behind it): thought, content, calls, end of the turn."""
        prompt = self._write(before, tools, generate=True)
        whole = self._write([*before, message], tools, generate=False)
        thought, opened = message.get("reasoning_content", ""), OPENED.search(prompt)
        if whole.startswith(prompt) and not opened:
            reply = whole[len(prompt) :]
            if not thought or (THINK in reply and thought in reply.partition(END_THINK)[0]):
                return prompt, reply
        # The template opens a thought in its prompts, or shows replies without theirs: it is put where it belongs.
        head, opening = (prompt[: opened.start()], opened.group()) if opened else (prompt, "")
        if not whole.startswith(head):
            raise UserError("the chat template writes a reply elsewhere than behind its own prompt for it")
        body = whole[len(head) :]
        if opening and body.startswith(opening):
            return prompt, body[len(opening) :]
        written = f"{THINK}\n{thought}\n{END_THINK}\n\n"
        if opening and not written.startswith(opening):
            raise UserError(
                f"the chat template opens a thought with {opening!r}, which is not how thoughts are written"
            )
        return prompt, (written[len(opening) :] if opening or thought else "") + body

    def _write(self, messages: Sequence[Message], tools: Any, generate: bool) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages), tools=tools, tokenize=False, add_generation_prompt=generate
            )
        except Exception as error:  # a template is a program: it may fail in any way, and raise errors of its own
            raise UserError(f"the chat template of {self.name} refuses this conversation ({error})") from None
        return text

    def _ids(self, text: str) -> tuple[list[int], list[int]]:
        """(ids, the character that each begins at)."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["input_ids"], [start for start, _ in encoded["offset_mapping"]]


def _plain(message: Message) -> Message:
    """As templates want it: thoughts apart, the arguments of calls as objects."""
    plain = apart(message) if message["role"] == "assistant" else dict(message)
    if plain.get("tool_calls"):
        plain["tool_calls"] = [_call(call) for call in plain["tool_calls"]]
    return {"content": None} | plain  # as OpenAI's form has it beside calls


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(function["arguments"])
        except ValueError:
            raise UserError(f"the arguments of a call to {function['name']} are not JSON") from None
    return {**call, "type": "function", "function": function}
