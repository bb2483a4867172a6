"""The prompts of a distillation: rows of data, each under an id of its own."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import UserError
from ..chat_data import ChatRow, load_rows

SEEDS = 2**31  # what every server takes


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends with the user. id: the row's own `id`, or else the head of the sha256 of its messages.
    columns: what else the row holds; where: its file and line."""

    id: str
    messages: list[dict[str, Any]]
    columns: Mapping[str, Any]
    where: str = ""

    @property
    def text(self) -> str:
        """What the messages say, for rules about text."""
        return "\n\n".join(message.get("content") or "" for message in self.messages)

    def row(self) -> dict[str, Any]:
        """As a line of data for reinforcement."""
        return {**self.columns, "prompt": self.messages, "id": self.id}


def load_prompts(paths: Sequence[str], limit: int = 0) -> list[Prompt]:
    """The first `limit` (0: all) prompts of files and folders as chat data has them; the same prompt twice counts once.

    A conversation that has replies is asked again from its last user message on. UserError where a file cannot be
    read, a row is no conversation, or two different prompts have one id.
    """
    if not paths:
        raise UserError("data.prompts is empty: name files of JSON lines with a 'prompt' in each row")
    return unique(load_rows(paths), limit)


def unique(rows: Iterable[ChatRow], limit: int = 0) -> list[Prompt]:
    found: dict[str, Prompt] = {}
    for row in rows:
        if row.tools:
            raise UserError(f"{row.where}: has tools, and samples are single replies; leave such rows out")
        messages = [dict(message) for message in row.messages]
        while messages and messages[-1]["role"] != "user":
            messages.pop()
        if not messages:
            raise UserError(f"{row.where}: has no message of a user to answer")
        own = row.columns.get("id")
        id = str(own) if own is not None else hashlib.sha256(canonical(messages)).hexdigest()[:16]
        if id in found and found[id].messages != messages:
            raise UserError(f"{row.where}: its id {id!r} is that of another prompt; ids must differ, or be left out")
        if id not in found:
            if limit and len(found) == limit:
                break
            found[id] = Prompt(id, messages, row.columns, row.where)
    return list(found.values())


def seeds(prompt_id: str, seed: int, count: int) -> list[int]:
    """The seeds of a prompt's samples: a matter of the run's seed and the prompt alone, all different."""
    first = int.from_bytes(hashlib.sha256(json.dumps([seed, prompt_id]).encode()).digest()[:8], "little")
    return [(first + i) % SEEDS for i in range(count)]


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
