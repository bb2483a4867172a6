"""Ids of texts of which much was seen before: a conversation comes again with every turn, and longer.

The prefix cache saves the model from computing such a beginning anew; this saves the tokenizer from reading it anew,
which takes a microsecond and more per token.
"""

import re
import threading
from array import array
from collections import OrderedDict

from ...core.tokenizer import Tokenizer

PIECE = 256  # characters, at least

_CUT = re.compile(r"[A-Za-z](?= [A-Za-z])")


def cut(text: str, least: int = PIECE) -> list[str]:
    """Pieces of `least` characters or somewhat more, and a rest. Where two texts begin alike, so do their pieces."""
    pieces, begin = list[str](), 0
    while found := _CUT.search(text, begin + least - 1):
        pieces.append(text[begin : found.end()])
        begin = found.end()
    pieces.append(text[begin:])
    return pieces


class KnownTexts:
    """Encodes texts, and remembers the pieces that they are made of, `most` characters in all; may be called from any
    thread.

    What one owner has sent is not looked up for another: the time that it takes would tell who has sent what.
    """

    def __init__(self, tokenizer: Tokenizer, most: int) -> None:
        self._tokenizer, self._most = tokenizer, most if tokenizer.words_apart else 0
        self._pieces: OrderedDict[tuple[int, str], array[int]] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def encode(self, text: str, owner: int) -> list[int]:
        """As Tokenizer.encode."""
        *known, rest = cut(text) if self._most else [text]
        found = self._find(known, owner)
        fresh = [piece for piece, ids in zip(known, found, strict=True) if ids is None]
        # In batches, as then the tokenizer counts no offsets, which are of no use here, and lets other threads run.
        *encoded, last = self._tokenizer.encode_batch([*fresh, rest])
        self._keep(dict(zip(fresh, encoded, strict=True)), owner)
        ids, new = list[int](), iter(encoded)
        for piece in found:
            ids += next(new) if piece is None else piece
        return ids + last

    def _find(self, pieces: list[str], owner: int) -> "list[array[int] | None]":
        with self._lock:
            found = [self._pieces.get((owner, piece)) for piece in pieces]
            for piece, ids in zip(pieces, found, strict=True):
                if ids is not None:
                    self._pieces.move_to_end((owner, piece))
        return found

    def _keep(self, pieces: dict[str, list[int]], owner: int) -> None:
        with self._lock:
            for piece, ids in pieces.items():
                if (owner, piece) not in self._pieces:
                    self._pieces[owner, piece] = array("i", ids)
                    self._size += len(piece)
            while self._size > self._most:
                (_, piece), _ = self._pieces.popitem(last=False)
                self._size -= len(piece)
