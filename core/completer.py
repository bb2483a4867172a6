"""Conversations in, replies out: what distillation, evaluation and judges ask of a model, wherever it runs.

`LocalCompleter` asks a rollout of this process; `endpoint.Endpoint` asks a server with OpenAI's API.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .encoding import encode_chat, stop_token
from .generate import Completion, Rollout, SamplingParams
from .special_tokens import END_THINK, THINK
from .tokenizer import Tokenizer

Conversation = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Reply:
    """What a model answered.

    text: all of it as written, tags of a thought included. reasoning, content: its parts; a reply that ends inside its
    thought has no content. finish_reason: "stop" or "length". tokens: of the completion.
    """

    text: str
    reasoning: str
    content: str
    finish_reason: str
    tokens: int


class Completer(Protocol):
    """A model that answers conversations. name: for reports."""

    name: str

    def complete(
        self,
        conversations: Sequence[Conversation],
        params: SamplingParams | Sequence[SamplingParams],
        on_reply: Callable[[int, Reply], None] | None = None,
    ) -> list[Reply]:
        """A reply to each conversation, in their order; `on_reply` hears of each as soon as it is there."""


class LocalCompleter:
    """Asks `rollout`, whose model `tokenizer` and the chat format `format` belong to; `batch` conversations at a time.

    thinking: for formats with a switch (see encode_chat).
    """

    def __init__(
        self,
        rollout: Rollout,
        tokenizer: Tokenizer,
        format: str,
        thinking: bool = False,
        name: str = "local",
        batch: int = 64,
    ):
        self.rollout, self.tokenizer, self.format, self.thinking = rollout, tokenizer, format, thinking
        self.name, self.batch = name, batch
        self.end = tokenizer.special_id(stop_token(format))

    def complete(
        self,
        conversations: Sequence[Conversation],
        params: SamplingParams | Sequence[SamplingParams],
        on_reply: Callable[[int, Reply], None] | None = None,
    ) -> list[Reply]:
        chosen = [params] * len(conversations) if isinstance(params, SamplingParams) else list(params)
        prompts = [self.encode(conversation) for conversation in conversations]
        # Neighbours of one length end at about the same time, and need the least padding of everything.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        replies: dict[int, Reply] = {}
        for start in range(0, len(order), self.batch):
            rows = order[start : start + self.batch]
            completions = self.rollout.generate([prompts[i] for i in rows], [chosen[i] for i in rows])
            for i, completion in zip(rows, completions, strict=True):
                replies[i] = self.reply(completion)
                if on_reply is not None:
                    on_reply(i, replies[i])
        return [replies[i] for i in range(len(prompts))]

    def encode(self, conversation: Conversation) -> list[int]:
        """The prompt that asks for the next reply of a conversation."""
        return self.tokenizer.encode_segments(encode_chat(conversation, self.format, thinking=self.thinking))

    def reply(self, completion: Completion) -> Reply:
        """What a completion says. A thought that the prompt opened counts as part of the text."""
        ids = completion.token_ids
        if ids and ids[-1] in (self.end, self.tokenizer.eos_id):
            ids = ids[:-1]
        text = opened_thought(self.tokenizer, completion.prompt_ids) + self.tokenizer.decode(ids, skip_special=True)
        reasoning, content = split_reply(text)
        return Reply(text, reasoning, content, completion.finish_reason or "length", len(completion.token_ids))


def opened_thought(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> str:
    """The end of a prompt that has begun the thought of the reply ("<think>\\n" in R1), or nothing."""
    think = tokenizer.specials.get(THINK)
    tail = list(prompt_ids[-3:])
    return tokenizer.decode(tail[tail.index(think) :]) if think is not None and think in tail else ""


def split_reply(text: str) -> tuple[str, str]:
    """(reasoning, content): what stands in the thought and what behind it. A thought that never ends has no content."""
    before, end, after = text.partition(END_THINK)
    if not end:
        return (before.removeprefix(THINK).strip("\n"), "") if text.startswith(THINK) else ("", text)
    return before.removeprefix(THINK).strip("\n"), after.lstrip("\n")
