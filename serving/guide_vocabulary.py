"""The vocabulary as guided decoding needs it: for llguidance, and what ends a thought."""

import threading
from collections.abc import Collection
from functools import cached_property
from pathlib import Path

import numpy as np
from llguidance import LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from ..core.reply_splitter import ReplySplitter
from ..core.special_tokens import Special
from ..core.tokenizer import Tokenizer
from .guide_trial import write

Mask = NDArray[np.int32]  # [ceil(V / 32)], a bit per token, lowest first: may it come?


class Vocabulary:
    """What a state must know of the tokenizer. Control tokens are never text to llguidance, only names.

    size: V, of the masks; ids beyond the tokenizer's are never let through. words: of a mask.
    end_mask: the tokens of `eos_ids`.
    """

    def __init__(self, tokenizer: Tokenizer, size: int, eos_ids: Collection[int]) -> None:
        self.tokenizer, self.size = tokenizer, size
        self.words = -(-size // 32)
        self.eos_ids = sorted(eos_ids) or [tokenizer.eos_id]
        self.ends_thought = frozenset(number for name, number in tokenizer.specials.items() if ends_thought(name))
        self.end_mask = self._mask(self.eos_ids)
        self._lock = threading.Lock()

    @cached_property
    def breaks(self) -> frozenset[int]:
        """Tokens of one or two line breaks."""
        return frozenset(number for number, text in enumerate(self._form.tokens) if text in (b"\n", b"\n\n"))

    @cached_property
    def break_mask(self) -> Mask:
        return self._mask(self.breaks)

    @property
    def ll(self) -> LLTokenizer:
        """llguidance's form, made when it is first needed: a second, for 129,280 tokens."""
        with self._lock:
            return self._ll

    def write(self, file: Path) -> None:
        """For guide_trial, if it is not there yet."""
        with self._lock:
            if not file.exists():
                write(file, self._form.tokens, self._form.special_token_ids, self.eos_ids)

    @cached_property
    def _form(self) -> "_Form":
        return _Form(self)

    @cached_property
    def _ll(self) -> LLTokenizer:
        return LLTokenizer(TokenizerWrapper(self._form), n_vocab=self.size, eos_token=self.eos_ids)

    def _mask(self, tokens: Collection[int]) -> Mask:
        bits = np.zeros(self.words * 32, np.uint8)
        bits[list(tokens)] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)


class _Form:
    """What TokenizerWrapper reads."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._tokenizer = vocabulary.tokenizer
        self.eos_token_id = vocabulary.eos_ids[0]
        self.tokens = [self._tokenizer.token_bytes(i) for i in range(vocabulary.size)]
        self.special_token_ids = sorted(i for i in self._tokenizer.specials.values() if i < vocabulary.size)

    def __call__(self, text: bytes | str) -> list[int]:
        """Where the grammar leaves no choice of text, the tokens that the model knows it by are asked for."""
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode())


def ends_thought(control: str) -> bool:
    """Does this control token end a thought? The machine that splits replies says so: where it hears the answer begin,
    the guide begins."""
    splitter = ReplySplitter("", reasoning=True)
    splitter.feed(Special(control))
    return not splitter.reasoning
