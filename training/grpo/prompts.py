"""Prompts: rows of data, their order in a run, and how they are put to the model."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from ...core.encoding import encode_chat, stop_token
from ...core.messages import parse_messages
from ...core.special_tokens import EOS
from ...core.tokenizer import Tokenizer
from ...errors import UserError
from ..chat_data import data_files
from ..data.order import permutation, stream_key
from ..data.records import read_records
from .config import PLAIN_TEMPLATE

Row = Mapping[str, Any]

# R1 report, table 1.
PLAIN = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think> <answer> answer here </answer>. User: {prompt}. Assistant:"
)


class PromptSet:
    """Rows in memory. places: where each stands, for errors. fingerprint: sha256 of the files' bytes."""

    def __init__(self, rows: Sequence[Row], fingerprint: str = "", places: Sequence[str] = ()):
        self.rows, self.fingerprint = list(rows), fingerprint
        self.places = list(places) or [f"row {number}" for number in range(1, len(self.rows) + 1)]
        self._order: tuple[int, list[int]] | None = None

    @classmethod
    def load(cls, paths: Sequence[str]) -> "PromptSet":
        """Read JSON lines or parquet, or folders of such files. UserError where a file cannot be read, or a row has no
        prompt, naming file and line."""
        rows: list[Row] = []
        places: list[str] = []
        digest = hashlib.sha256()
        for path in data_files(list(paths)):
            before = len(rows)
            for where, record in read_records(path):
                rows.append(_row(record, where))
                places.append(where)
            if len(rows) == before:
                raise UserError(f"{path} has no prompts: one object with the key 'prompt' per line is wanted")
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return cls(rows, digest.hexdigest(), places)

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, index: int, seed: int) -> int:
        """The row that is number `index` (0, 1, ... without end) in a run: all rows in random order, then again in
        another."""
        epoch, place = divmod(index, len(self.rows))
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, permutation(len(self.rows), stream_key("grpo", seed, epoch)).tolist()
        return self._order[1][place]


def _row(record: Any, where: str) -> Row:
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if isinstance(prompt, list):  # columnar files give every message the keys of all: those without a value go
        prompt = [{k: v for k, v in m.items() if v is not None} if isinstance(m, dict) else m for m in prompt]
    if not isinstance(prompt, str | list):
        raise UserError(f"{where} has no 'prompt', which is text or a list of messages")
    row = {**record, "prompt": prompt}
    try:
        last = parse_messages(messages_of(row))[-1]
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if last.role == "assistant" and not last.prefix:
        raise UserError(f"{where}: the prompt ends with a reply of the assistant: leave that out")
    return row


def messages_of(row: Row) -> list[dict[str, Any]]:
    """The prompt as a conversation."""
    prompt = row["prompt"]
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


class PromptFormat:
    """How conversations are put to a model: a chat format, or R1-Zero's plain template, which knows one question."""

    def __init__(self, tokenizer: Tokenizer, format: str, thinking: bool = False):
        self.tokenizer, self.format, self.thinking = tokenizer, format, thinking
        self.end_id = tokenizer.special_id(EOS if format == PLAIN_TEMPLATE else stop_token(format))

    def encode(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Ids of a prompt, up to where the model begins to write."""
        if self.format != PLAIN_TEMPLATE:
            return self.tokenizer.encode_segments(encode_chat(messages, self.format, tools, self.thinking))
        if tools or len(messages) != 1 or messages[0]["role"] != "user":
            raise UserError(f"the template {PLAIN_TEMPLATE!r} holds one question of a user: use a chat format")
        (message,) = parse_messages(messages)
        return [self.tokenizer.bos_id, *self.tokenizer.encode(PLAIN.replace("{prompt}", message.content))]

    def encode_answer(
        self,
        before: Sequence[Mapping[str, Any]],
        observation: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """Ids of what follows the model's last reply, up to where it writes on: the messages `observation`, in a
        conversation that was `before`, that reply included.

        What the model wrote is not tokenised again: the template writes both conversations, and their difference is
        what is new. It begins behind the reply's end token.
        """
        if self.format == PLAIN_TEMPLATE:
            raise UserError(f"the template {PLAIN_TEMPLATE!r} has one turn: use a chat format")
        old = encode_chat(before, self.format, tools, self.thinking, add_generation_prompt=False)
        new = encode_chat([*before, *observation], self.format, tools, self.thinking)
        if new[: len(old)] != old:
            raise UserError(f"the chat format {self.format!r} rewrites earlier turns when a conversation goes on")
        return self.tokenizer.encode_segments(new[len(old) :])

    def check(self, prompts: PromptSet, context: int, max_tokens: int) -> int:
        """How many prompts leave less room than `max_tokens` in a context of so many tokens: their completions are cut
        earlier. UserError for the first one that leaves none."""
        short = 0
        template = len(self.encode([{"role": "user", "content": "?"}]))
        for row, place in zip(prompts.rows, prompts.places, strict=True):
            messages = messages_of(row)
            # A token is at least a byte: only long prompts need to be tokenised to know.
            size = sum(len(str(message.get("content")).encode()) for message in messages)
            if template + 8 * len(messages) + size + max_tokens > context:
                length = len(self.encode(messages))
                if length >= context:
                    raise UserError(f"{place}: {length} tokens, the model's context is {context}: shorten the prompt")
                short += length + max_tokens > context
        return short
