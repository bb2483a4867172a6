"""A conversation with a model: what was said, and the next reply, which comes piece by piece.

Every turn reads the whole conversation again from its beginning. What the model thought in earlier turns is not
repeated to it, as its chat format wants.
"""

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace

from .core.config import ModelConfig
from .core.encoding import detect_format, encode_chat, stop_token
from .core.generate import Rollout, SamplingParams
from .core.reply_events import Content, Event, Reasoning, ReplyParts
from .core.reply_stream import ReplyStream, opens_reasoning
from .core.special_tokens import Special
from .core.tokenizer import Tokenizer
from .errors import UserError
from .serving.verify import Verification, decide
from .talk import draw_seed


def choose_format(tokenizer: Tokenizer, config: ModelConfig, wanted: str, thinking: bool) -> str:
    """The chat format: `wanted`, or with "auto" the one that the tokenizer's control tokens and chat template tell,
    and config.json's model_type where a Kimi tokenizer came without its template.

    Raises UserError for a tokenizer that lacks the format's tokens, and for `thinking` where the format has none.
    """
    try:
        chosen = detect_format(tokenizer) if wanted == "auto" else wanted
        if wanted == "auto" and chosen == "moonlight" and config.model_type == "kimi_k2":
            chosen = "kimi-k2"
        opening = encode_chat([{"role": "user", "content": ""}], chosen)
        tokenizer.encode_segments([*opening, Special(stop_token(chosen))])
    except UserError as error:
        raise UserError(f"{error}; for plain text there is `dsv3 generate`") from None
    if thinking:
        tokenizer.encode_segments(encode_chat([{"role": "user", "content": ""}], chosen, thinking=True))
    return chosen


@dataclass(frozen=True)
class Piece:
    """Some characters of a reply; reasoning: of what the model thinks before it answers."""

    text: str
    reasoning: bool


class Conversation:
    """system, messages: what was said so far; both may be changed between turns.

    params: of every reply; without a seed each reply draws one.
    verify: replies that are drawn to each message, with seeds that follow each other; the one whose final answer most
        of them give becomes the reply. Its pieces come when all are drawn, and `verdict` says how many agreed.
    finish_reason: of the last reply ("stop" or "length"), None if it was not let finish.
    """

    def __init__(
        self,
        rollout: Rollout,
        tokenizer: Tokenizer,
        format: str,
        params: SamplingParams,
        thinking: bool = False,
        system: str | None = None,
        verify: int = 1,
    ) -> None:
        self.rollout, self.tokenizer, self.format, self.params = rollout, tokenizer, format, params
        self.thinking, self.system, self.verify = thinking, system, verify
        self.messages: list[dict[str, str]] = []
        self.finish_reason: str | None = None
        self.verdict: Verification | None = None

    @property
    def context(self) -> int:
        """Tokens that a conversation may have, replies included."""
        return self.rollout.model.config.max_position_embeddings

    def prompt(self, text: str) -> list[int]:
        """Token ids of the conversation with `text` as the user's next message.

        Raises UserError if they leave no room for a reply.
        """
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages = [*system, *self.messages, {"role": "user", "content": text}]
        ids = self.tokenizer.encode_segments(encode_chat(messages, self.format, thinking=self.thinking))
        if len(ids) >= self.context:
            raise UserError(
                f"the conversation would take {len(ids)} tokens, and the model's context has {self.context}; "
                "shorten the message or begin a new conversation"
            )
        return ids

    def ask(self, text: str) -> Generator[Piece, None, None]:
        """Send a message; the pieces of the reply. Closed early, the conversation keeps what came until then; if
        nothing had come, the message is as good as never sent."""
        ids = self.prompt(text)
        params = replace(self.params, seed=draw_seed()) if self.params.seed is None else self.params
        self.finish_reason = self.verdict = None
        parts, began = ReplyParts(), False
        try:
            with closing(self._majority(ids, params) if self.verify > 1 else self._events(ids, params)) as reply:
                for events in reply:
                    began = True
                    yield from _pieces(events, parts)
        finally:
            if began:
                self.messages += [{"role": "user", "content": text}, _message(parts)]

    def _reader(self, ids: list[int]) -> ReplyStream:
        thinks, params = opens_reasoning(self.tokenizer, ids), self.params
        return ReplyStream(self.tokenizer, self.format, thinks, stop=params.stop, end_tokens=params.stop_token_ids)

    def _events(self, ids: list[int], params: SamplingParams) -> Generator[list[Event], None, None]:
        """A reply, token by token."""
        reply = self._reader(ids)
        with closing(self.rollout.stream([ids], params)) as tokens:
            for token in tokens:
                yield reply.push(token.token_id)
                self.finish_reason = token.finish_reason
        yield reply.finish()

    def _majority(self, ids: list[int], params: SamplingParams) -> Generator[list[Event], None, None]:
        """The reply of several that is chosen, at once."""
        assert params.seed is not None
        each = [replace(params, seed=params.seed + number) for number in range(self.verify)]
        replies, finishes = [(self._reader(ids), list[Event]()) for _ in each], [""] * len(each)
        with closing(self.rollout.stream([ids] * len(each), each)) as tokens:
            for token in tokens:
                reply, events = replies[token.index]
                events += reply.push(token.token_id)
                finishes[token.index] = token.finish_reason or ""
        whole = [events + reply.finish() for reply, events in replies]
        contents = ["".join(event.text for event in events if isinstance(event, Content)) for events in whole]
        winner, self.verdict = decide(contents)
        self.finish_reason = finishes[winner]
        yield whole[winner]


def agreement(verdict: Verification) -> str:
    """How a reply was decided, for people."""
    if not verdict.votes:
        return f"no answer to compare in any of {verdict.samples} replies; this is the first"
    return f"agreement {round(verdict.agreement * verdict.samples)} of {verdict.samples}"


def _pieces(events: Iterable[Event], parts: ReplyParts) -> Iterator[Piece]:
    """The pieces of a reply without tools, each noted in `parts` as it is handed out."""
    for event in events:
        if isinstance(event, Reasoning | Content):
            parts.add([event])
            yield Piece(event.text, isinstance(event, Reasoning))


def _message(parts: ReplyParts) -> dict[str, str]:
    """A reply as a message of the conversation."""
    message = {"role": "assistant", "content": parts.content}
    return message | ({"reasoning_content": parts.reasoning} if parts.reasoning else {})
