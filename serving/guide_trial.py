"""A grammar on trial, in a process that may be killed: grading's `Worker` runs this file, without the package.

llguidance bounds its work by many limits, yet a few thousand rules overflow its stack, a few patterns keep it busy for
minutes, and some that compile at once take seconds over their first mask. What comes through here has compiled, with
the engine's own vocabulary, and led a random text some way, in the time that the worker gives.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

STEPS = 40  # tokens of the random text
SLOW, SLOWEST = 0.02, 0.2  # seconds of CPU over a mask: on the average, and over any


def limits() -> LLParserLimits:
    """Of every matcher. A state of the lexer takes 1 to 2 kB."""
    return LLParserLimits(max_lexer_states=50_000, max_grammar_size=200_000, verbose_errors=False)


class Bytes:
    """The vocabulary as TokenizerWrapper wants it; where the tokens of a text are asked for, those of its bytes."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], special_token_ids: list[int], eos_token_id: int) -> None:
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, special_token_ids, eos_token_id
        self._ids = {token: number for number, token in enumerate(tokens) if len(token) == 1}

    def __call__(self, text: bytes | str) -> list[int]:
        data = text.encode() if isinstance(text, str) else text
        return [self._ids[data[i : i + 1]] for i in range(len(data))]


def write(file: Path, tokens: list[bytes], specials: list[int], eos_ids: list[int]) -> None:
    """Writes what `trial` reads."""
    file.write_text(json.dumps([[token.decode("latin-1") for token in tokens], specials, eos_ids]))


def trial(file: str) -> Callable[[str], str | None]:
    """A function that says what is wrong with a grammar, or None. file: the vocabulary."""
    texts, specials, eos_ids = json.loads(Path(file).read_text())
    tokens = [text.encode("latin-1") for text in texts]
    vocabulary: Any = LLTokenizer(TokenizerWrapper(Bytes(tokens, specials, eos_ids[0])), eos_token=eos_ids)
    return lambda grammar: prove(LLMatcher(vocabulary, grammar, log_level=0, limits=limits()))


def prove(matcher: LLMatcher) -> str | None:
    rng = np.random.default_rng(0)
    spent: list[float] = []
    while len(spent) < STEPS and not matcher.is_error():
        begin = time.thread_time()
        mask = matcher.compute_bitmask()
        spent.append(time.thread_time() - begin)
        if spent[-1] > SLOWEST:
            return "it takes too long over a token"
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little"))
        if not matcher.consume_token(int(rng.choice(allowed))) or matcher.is_stopped():
            break
    if matcher.is_error():
        return matcher.get_error()
    return "it takes too long over each token" if sum(spent) > SLOW * len(spent) else None
