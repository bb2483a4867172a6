"""Text of tokens that arrive one by one, as people are to see it."""

from collections.abc import Callable, Collection, Sequence

from .tokenizer import Tokenizer


class TextStream:
    """The pieces joined are the text of the tokens up to the first stop string or end token, neither of which shows.

    Control tokens that the tokenizer flags special leave no text (see Tokenizer.decode). No character is torn, and what
    may be the beginning of a stop string is held back until the next token tells.
    ended: a stop string has come.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), end_tokens: Collection[int] = ()) -> None:
        self._decoder = tokenizer.stream(skip_special=True)
        self._stop, self._end_tokens = stop, end_tokens
        self._held = ""
        self._pieces: list[str] = []
        self.ended = False

    @property
    def text(self) -> str:
        """Everything handed out so far."""
        return "".join(self._pieces)

    def push(self, token_id: int) -> str:
        """The text that this token settles, possibly none."""
        if self.ended or token_id in self._end_tokens:
            return ""
        return self._settle(self._decoder.push(token_id))

    def finish(self) -> str:
        """What is left at the end. Tokens may follow: they begin another text, up to the same stop."""
        if self.ended:
            return ""
        piece = self._settle(self._decoder.finish())
        rest, self._held = self._held, ""
        self._pieces.append(rest)
        return piece + rest

    def _settle(self, fresh: str) -> str:
        if not self._stop:
            self._pieces.append(fresh)
            return fresh
        text = self._held + fresh
        places = [place for place in map(text.find, self._stop) if place >= 0]
        if places:
            self.ended, piece, self._held = True, text[: min(places)], ""
        else:
            sure = len(text) - max(overlap(text, stop) for stop in self._stop)
            piece, self._held = text[:sure], text[sure:]
        self._pieces.append(piece)
        return piece


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are a beginning of `stop`, but not all of it."""
    place = text.find(stop[:1], max(0, len(text) - len(stop) + 1)) if stop else -1
    while place >= 0 and not stop.startswith(text[place:]):
        place = text.find(stop[0], place + 1)
    return len(text) - place if place >= 0 else 0


def tail(decode: Callable[[list[int]], str], tokens: list[int], length: int) -> str:
    """The text of the last token behind at least `length` characters: what a stop string of that length may end in.

    Decoding everything at every step would cost the square of the length.
    """
    window = 4 * length + 4  # a character takes up to four tokens of bytes; a control token leaves no text
    while window < len(tokens) and len(decode(tokens[-1 - window : -1])) < length:
        window *= 2
    return decode(tokens[-1 - window :])
