"""One choice of a chat, from the engine's outputs: deltas as they come, and the message that they add up to."""

import secrets

from msgspec import UNSET

from ...core.reply_events import CallArguments, CallBegin, CallEnd, Content, Event, Reasoning, ReplyParts
from ...core.reply_stream import ReplyStream
from ..messages import Output
from .conversation import ChatPrompt
from .counting import text_tokens, token_logprobs
from .generation import FINISHES
from .responses import (
    CalledFunction,
    ChatChoice,
    ChatLogprobs,
    ChunkChoice,
    Delta,
    FinishReason,
    Message,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
)
from .service import Service


class ChatReply:
    """tools: were any offered? one_call: the model may make one call only; further ones are dropped.

    logprobs: how many of the likeliest tokens to report with each; None reports no log-probabilities at all.
    """

    def __init__(
        self,
        service: Service,
        prompt: ChatPrompt,
        index: int,
        stop: tuple[str, ...],
        tools: bool,
        one_call: bool,
        logprobs: int | None,
    ) -> None:
        settings = service.settings
        assert settings.format is not None
        self._tokenizer, self._chat_end, self._also = service.tokenizer, service.chat_end, settings.also_reasoning
        self._stream = ReplyStream(service.tokenizer, settings.format, prompt.reasoning, tools, stop)
        self._index, self._one_call, self._asked = index, one_call, logprobs
        self._logprobs: list[TokenLogprob] = []
        self._ids: list[str] = []
        self._last = Output(0)
        self.parts = ReplyParts()
        self.tokens = self.cached = 0

    @property
    def reasoning_tokens(self) -> int:
        return self._stream.reasoning_tokens

    def opening(self) -> ChunkChoice:
        """What a stream says first."""
        return ChunkChoice(self._index, Delta(role="assistant", content=""))

    def push(self, output: Output) -> list[ChunkChoice]:
        """What an output adds; with its finish, the last one says how the text ended."""
        events: list[Event] = []
        for token in text_tokens(output):
            events += self._stream.push(token)
        if output.finish is not None:
            events += self._stream.finish()
        if self._one_call:
            events = [event for event in events if getattr(event, "index", 0) == 0]
        self.parts.add(events)
        self._last = output
        self.tokens += len(output.tokens)
        self.cached = max(self.cached, output.cached)
        choices = [ChunkChoice(self._index, delta) for delta in self._deltas(events)]
        if self._asked is not None and output.tokens:
            fresh = token_logprobs(self._tokenizer, output, self._asked)
            self._logprobs += fresh
            choices = choices or [ChunkChoice(self._index, Delta(content=""))]
            choices[0].logprobs = ChatLogprobs(fresh)
        if output.finish is not None:
            end = ChunkChoice(self._index, Delta(), finish_reason=self._finish_reason())
            end.stop_reason, end.seed = self._stop_reason(), output.seed
            choices.append(end)
        return choices

    def choice(self) -> ChatChoice:
        """The whole of it, once it has ended."""
        parts = self.parts
        message = Message("assistant", parts.content or (None if parts.calls or parts.reasoning else ""))
        if parts.reasoning:
            message.reasoning_content = parts.reasoning
            if self._also:
                message.reasoning = parts.reasoning
        if parts.calls:
            message.tool_calls = [
                ToolCall(id, "function", CalledFunction(call.arguments, call.name))
                for id, call in zip(self._ids, parts.calls, strict=True)
            ]
            for shown, call in zip(message.tool_calls, parts.calls, strict=True):
                if not call.complete:
                    shown.complete = False
        logprobs = ChatLogprobs(self._logprobs) if self._asked is not None else None
        return ChatChoice(self._index, message, logprobs, self._finish_reason(), self._stop_reason(), self._last.seed)

    def _deltas(self, events: list[Event]) -> list[Delta]:
        deltas = []
        for event in _merged(events):
            match event:
                case Reasoning(text):
                    deltas.append(Delta(reasoning_content=text, reasoning=text if self._also else UNSET))
                case Content(text):
                    deltas.append(Delta(content=text))
                case CallBegin(index, name, id):
                    self._ids.append(id or f"call_{secrets.token_hex(12)}")
                    function = CalledFunction("", name)
                    deltas.append(Delta(tool_calls=[ToolCallDelta(index, function, self._ids[-1], "function")]))
                case CallArguments(index, text):
                    deltas.append(Delta(tool_calls=[ToolCallDelta(index, CalledFunction(text))]))
                case CallEnd(index, complete):
                    if not complete:
                        deltas.append(Delta(tool_calls=[ToolCallDelta(index, CalledFunction(""), complete=False)]))
        return deltas

    def _finish_reason(self) -> FinishReason:
        reason = FINISHES[self._last.finish or "stop"]
        return "tool_calls" if reason == "stop" and self.parts.calls else reason

    def _stop_reason(self) -> str | int | None:
        """The end of the assistant's turn is no reason worth telling."""
        reason = self._last.stop_reason
        return None if reason == self._chat_end else reason


def _merged(events: list[Event]) -> list[Event]:
    """Neighbouring texts of one kind become one."""
    merged: list[Event] = []
    for event in events:
        match merged[-1] if merged else None, event:
            case (Reasoning(before), Reasoning(text)):
                merged[-1] = Reasoning(before + text)
            case (Content(before), Content(text)):
                merged[-1] = Content(before + text)
            case (CallArguments(index, before), CallArguments(_, text)):
                merged[-1] = CallArguments(index, before + text)
            case _:
                merged.append(event)
    return merged
