"""A reply told apart: what the model thinks, what it says, and the tools it calls. The inverse of `encode_chat`.

Markup is read only where tools are offered, and as the chat format writes it. What is out of order loses no text:
markers that make no sense where they stand show as text, and a call whose end is missing is handed out as incomplete.
"""

import re
from dataclasses import dataclass

from . import encoding_kimi as kimi
from .encoding_deepseek import STYLES
from .reply_events import CallArguments, CallBegin, CallEnd, Content, Event, Reasoning
from .special_tokens import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, END_THINK, THINK, TOOL_SEP, Segment
from .text_stream import overlap


@dataclass(frozen=True)
class Markup:
    """How a format writes calls: control tokens by name, and the text between them (see encoding_deepseek.Style)."""

    section_begin: str
    section_end: str
    call_begin: str
    call_end: str
    separator: str
    lead: str = ""  # stands before the separator, and the name behind it; where empty, the name stands before
    opening: str = ""  # between name and arguments
    closing: str = ""
    names_are_ids: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        names = (self.section_begin, self.section_end, self.call_begin, self.call_end, self.separator)
        return tuple(name for name in names if name)


_DEEPSEEK = (CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, TOOL_SEP)
MARKUP = {
    **{name: Markup(*_DEEPSEEK, style.call_lead, style.call_open, style.call_close) for name, style in STYLES.items()},
    "kimi-k2": Markup(
        kimi.SECTION_BEGIN.name,
        kimi.SECTION_END.name,
        kimi.KIMI_CALL_BEGIN.name,
        kimi.KIMI_CALL_END.name,
        kimi.ARGUMENT_BEGIN.name,
        names_are_ids=True,
    ),
}
NO_CALLS = Markup("", "", "", "", "")  # of Moonlight, and where no tools are offered


class ReplySplitter:
    """Segments of a reply in, events out. Text that merely spells a marker is text, and however the text is cut into
    pieces, the events joined are the same.

    format: of encode_chat. reasoning: the prompt has opened the thought (see `opens_reasoning`); a reply may also open
        one itself, as the first thing it does. tools: were any offered?

    Line breaks at the beginning of the thought, and those behind its end, belong to neither text.
    """

    def __init__(self, format: str, reasoning: bool = False, tools: bool = False) -> None:
        self.markup = MARKUP.get(format, NO_CALLS) if tools else NO_CALLS
        self.markers = (THINK, END_THINK, *self.markup.markers)
        self._place = "reasoning" if reasoning else "content"
        self._at_start = True  # nothing but white space yet
        self._drop_breaks = reasoning
        self._held = ""  # text whose meaning depends on what follows
        self._kind = ""
        self._calls = 0
        self._events: list[Event] = []

    @property
    def reasoning(self) -> bool:
        """Does what comes next belong to the thought?"""
        return self._place == "reasoning"

    def feed(self, segment: Segment) -> list[Event]:
        """What this segment settles."""
        if isinstance(segment, str):
            self._read(segment)
        else:
            self._mark(segment.name)
        events, self._events = self._events, []
        return events

    def finish(self) -> list[Event]:
        """What is left at the end."""
        if self._place in ("reasoning", "content"):
            self._settle_start()
        else:
            self._end_call(whole=False)
        events, self._events = self._events, []
        return events

    # --- text ---

    def _read(self, text: str) -> None:
        match self._place:
            case "reasoning" | "content":
                if self._at_start:
                    text, self._held = self._held + text, ""
                    if not text or text.isspace():  # `<think>` or a call may follow, whose lead it then is
                        self._held = text
                        return
                    self._at_start = False
                self._say(text)
            case "between calls":
                text = self._held + text
                sure = len(text.rstrip())
                self._held = text[sure:]
                self._say(text[:sure])
            case "head":
                self._held += text
            case "name":
                self._held += text
                self._find_opening()
            case "arguments":
                self._argue(text)

    def _say(self, text: str) -> None:
        if self._drop_breaks:
            text = text.lstrip("\n")
        if text:
            self._drop_breaks = False
            self._events.append(Reasoning(text) if self._place == "reasoning" else Content(text))

    def _settle_start(self) -> None:
        text, self._held, self._at_start = self._held, "", False
        self._say(text)

    def _find_opening(self) -> None:
        """The name ends where the arguments open, or, malformed, at a line break that opens nothing."""
        name, line_break, rest = self._held.partition("\n")
        opening = self.markup.opening
        after = len(opening) - 1
        if not line_break:
            return
        if not opening.startswith(line_break + rest[:after]):
            if name.strip() and self._kind == self.markup.lead:
                self._begin_call(name, line_break + rest)
        elif len(rest) >= after:
            self._begin_call(name.strip() or self._kind, rest[after:])

    def _begin_call(self, written: str, arguments: str) -> None:
        name, id = written.strip(), None
        if self.markup.names_are_ids:
            id, name = name, re.sub(r":\d+$", "", name.removeprefix("functions."))
        self._place, self._held = "arguments", ""
        self._events.append(CallBegin(self._calls, name, id))
        self._calls += 1
        self._argue(arguments)

    def _argue(self, text: str) -> None:
        """Arguments as they come, but for what may be the closing."""
        closing = self.markup.closing
        text = self._held + text
        kept = len(closing) if text.endswith(closing) else overlap(text, closing)
        self._held = text[len(text) - kept :]
        if kept < len(text):
            self._events.append(CallArguments(self._calls - 1, text[: len(text) - kept]))

    # --- markers ---

    def _mark(self, marker: str) -> None:
        markup = self.markup
        if marker == THINK and self._at_start and self._place in ("reasoning", "content"):
            self._place, self._held = "reasoning", ""
            self._at_start, self._drop_breaks = False, True
        elif marker == END_THINK and self._place == "reasoning":
            self._settle_start()
            self._place, self._drop_breaks = "content", True
        elif self._place == "reasoning":
            self._read(marker)
        elif marker == markup.call_begin:  # the format V3 opens one section per conversation, so it may be missing
            if self._place not in ("content", "between calls"):
                self._end_call(whole=False)
            self._place, self._held = "head", ""
            self._at_start = self._drop_breaks = False
        elif marker == markup.section_begin and self._place in ("content", "between calls"):
            if self._place == "content":
                self._settle_start()
            self._place, self._held, self._drop_breaks = "between calls", "", False
        elif marker == markup.section_end and self._place != "content":
            self._end_call(whole=False)
        elif marker == markup.separator and self._place == "head":
            if markup.lead:
                self._place, self._kind, self._held = "name", self._held.strip(), ""
            else:
                self._begin_call(self._held, "")
        elif marker == markup.call_end and self._place not in ("content", "between calls"):
            self._end_call(whole=True)
        else:
            self._read(marker)

    def _end_call(self, whole: bool) -> None:
        """End what call is open. whole: it ends as it should, if its arguments have begun."""
        if self._place in ("head", "name"):
            whole = False
            self._begin_malformed()
        if self._place == "arguments":
            index = self._calls - 1
            if whole and self._held and self._held != self.markup.closing:
                self._events.append(CallArguments(index, self._held))
            self._events.append(CallEnd(index, whole))
        self._place, self._held = "between calls", ""

    def _begin_malformed(self) -> None:
        """A call without its separator, or whose arguments never open: the best that can be made of its text."""
        if self._place == "name" and self._kind != self.markup.lead:
            name, rest = self._kind, self._held
        else:
            name, line_break, rest = self._held.lstrip().partition("\n")
            rest = line_break + rest
        if self.markup.opening.startswith(rest):  # it broke off in there
            rest = ""
        if name.strip() or rest.strip():
            self._begin_call(name, rest)
