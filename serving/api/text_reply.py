"""One choice of a plain completion, from the engine's outputs."""

from ...core.text_stream import TextStream
from ..messages import Output, TopLogprobs
from .counting import finite, spelt, text_tokens, top_by_text
from .generation import FINISHES
from .responses import FinishReason, TextChoice, TextLogprobs
from .service import Service


class TextReply:
    """prompt: token ids. echo: the text begins with the prompt's. logprobs: how many of the likeliest tokens to report
    with each; None reports no log-probabilities at all."""

    def __init__(
        self, service: Service, prompt: list[int], index: int, stop: tuple[str, ...], echo: bool, logprobs: int | None
    ) -> None:
        self._tokenizer = service.tokenizer
        self._stream = TextStream(service.tokenizer, stop)
        self._prompt, self._index, self._echo, self._asked = prompt, index, echo, logprobs
        self._places = service.tokenizer.stream(skip_special=True)
        self._prompt_logprobs: list[float | None] = [None]
        self._prompt_tops: list[TopLogprobs] = [[]]
        self._length = 0  # characters that the tokens so far make
        self._text = ""
        self._logprobs = TextLogprobs([], [], [], [])
        self._last = Output(0)
        self.tokens = self.cached = 0

    def push(self, output: Output) -> list[TextChoice]:
        """What an output adds; with its finish, the last one says how the text ended."""
        text, logprobs = "", TextLogprobs([], [], [], [])
        if self._echo and self._prompt_told(output):
            text, self._echo = self._tokenizer.decode(self._prompt, skip_special=True), False
            if self._asked is not None:
                self._count(logprobs, self._prompt, self._prompt_logprobs, self._prompt_tops)
        for token in text_tokens(output):
            text += self._stream.push(token)
        if output.finish is not None:
            text += self._stream.finish()
        if self._asked is not None:
            self._count(logprobs, output.tokens, list(output.logprobs), output.top or [[] for _ in output.tokens])
        self._text += text
        self._last = output
        self.tokens += len(output.tokens)
        self.cached = max(self.cached, output.cached)
        choices = []
        if text or logprobs.tokens:
            choices.append(TextChoice(self._index, text, logprobs if self._asked is not None else None))
        if output.finish is not None:
            choices.append(TextChoice(self._index, "", None, *self._end()))
        return choices

    def _prompt_told(self, output: Output) -> bool:
        """Is all known that is to be said of the prompt? Its log-probabilities come piece by piece."""
        if self._asked is None:
            return True
        self._prompt_logprobs += output.prompt_logprobs
        self._prompt_tops += output.prompt_top or [[] for _ in output.prompt_logprobs]
        return len(self._prompt_logprobs) == len(self._prompt)

    def choice(self) -> TextChoice:
        """The whole of it, once it has ended."""
        return TextChoice(self._index, self._text, self._logprobs if self._asked is not None else None, *self._end())

    def _end(self) -> tuple[FinishReason, str | int | None, int]:
        """finish_reason, stop_reason, seed"""
        return FINISHES[self._last.finish or "stop"], self._last.stop_reason, self._last.seed

    def _count(
        self, part: TextLogprobs, tokens: list[int], values: list[float | None], tops: list[TopLogprobs]
    ) -> None:
        """Log-probabilities of `tokens` into `part`, and into those of the whole text."""
        for token, value, top in zip(tokens, values, tops, strict=True):
            table = None
            if value is not None and self._asked is not None:
                table = top_by_text(self._tokenizer, token, value, top, self._asked)
            for logprobs in (part, self._logprobs):
                logprobs.text_offset.append(self._length)
                logprobs.tokens.append(spelt(self._tokenizer, token))
                logprobs.token_logprobs.append(None if value is None else finite(value))
                logprobs.top_logprobs.append(table)
            self._length += len(self._places.push(token))
