"""A reply as it comes, told apart: `ReplyStream` reads token ids, `TextReplyStream` text in which markers are spelled.

Both are fronts of `ReplySplitter`, which knows the formats; the events are in reply_events.py.
"""

import re
from collections.abc import Collection, Sequence

from .encoding import stop_token
from .reply_events import Event
from .reply_splitter import ReplySplitter
from .special_tokens import THINK, Special
from .text_stream import TextStream, overlap
from .tokenizer import Tokenizer


class ReplyStream:
    """Token ids of a reply in, events out.

    stop, end_tokens: as of TextStream; a stop string ends the reply for good, and is looked for in the text between two
        markers. The format's own end token leaves nothing, either.
    reasoning_tokens: so many tokens so far were part of the thought, its markers not counted.
    The rest is as of ReplySplitter.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        format: str,
        reasoning: bool = False,
        tools: bool = False,
        stop: Sequence[str] = (),
        end_tokens: Collection[int] = (),
    ) -> None:
        self._splitter = ReplySplitter(format, reasoning, tools)
        specials = tokenizer.specials
        self._markers = {specials[name]: Special(name) for name in self._splitter.markers if name in specials}
        self._ends = {*end_tokens, specials.get(stop_token(format), -1)}
        self._text = TextStream(tokenizer, stop, self._ends)
        self.reasoning_tokens = 0

    @property
    def reasoning(self) -> bool:
        """Does the next token belong to the thought, or end it?"""
        return self._splitter.reasoning

    def push(self, token_id: int) -> list[Event]:
        """What this token settles."""
        if self._text.ended:
            return []
        marker = self._markers.get(token_id)
        if marker is not None and token_id not in self._ends:
            return self._flush() + ([] if self._text.ended else self._splitter.feed(marker))
        if self._splitter.reasoning and token_id not in self._ends:
            self.reasoning_tokens += 1
        text = self._text.push(token_id)
        return self._splitter.feed(text) if text else []

    def finish(self) -> list[Event]:
        """What is left at the end."""
        return self._flush() + self._splitter.finish()

    def _flush(self) -> list[Event]:
        text = self._text.finish()
        return self._splitter.feed(text) if text else []


class TextReplyStream:
    """Text of a reply in, in pieces of any size, events out: of a server that shows markers as text. As ReplySplitter
    otherwise."""

    def __init__(self, format: str, reasoning: bool = False, tools: bool = False) -> None:
        self._splitter = ReplySplitter(format, reasoning, tools)
        self._pattern = re.compile("|".join(map(re.escape, self._splitter.markers)))
        self._longest = max(map(len, self._splitter.markers))
        self._held = ""

    @property
    def reasoning(self) -> bool:
        """Does what comes next belong to the thought?"""
        return self._splitter.reasoning

    def push(self, text: str) -> list[Event]:
        """What this piece settles."""
        text, events, end = self._held + text, list[Event](), 0
        for found in self._pattern.finditer(text):
            events += self._splitter.feed(text[end : found.start()])
            events += self._splitter.feed(Special(found.group()))
            end = found.end()
        sure = len(text)
        if "<" in text[max(end, sure - self._longest) :]:  # every marker begins with it
            sure -= max(overlap(text[end:], marker) for marker in self._splitter.markers)
        self._held = text[sure:]
        return events + self._splitter.feed(text[end:sure])

    def finish(self) -> list[Event]:
        """What is left at the end."""
        rest, self._held = self._held, ""
        return self._splitter.feed(rest) + self._splitter.finish()


def opens_reasoning(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    """Whether a prompt of `encode_chat` leaves the thought open, so that the reply goes on with it: R1 does, and V3.1
    that is asked to think, but neither right behind results of tools."""
    controls = set(tokenizer.specials.values())
    last = next((token for token in reversed(prompt) if token in controls), None)
    return last is not None and last == tokenizer.specials.get(THINK)
