"""Guided decoding: which tokens may come next, so that the text is what a `Guide` asks for.

llguidance walks the grammar over the bytes of the tokens and marks those that keep to it, in tens of microseconds for a
vocabulary of 129,280. `Guides` compiles, in threads of its own and only what has survived a trial in another process;
`Grammar` is the result, shared by all requests with that guide; `GuideState` is where one text stands in it.
"""

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from ..core.sampling_params import Guide
from ..core.tokenizer import Tokenizer
from ..errors import UserError
from ..grading.worker import Worker
from . import guide_trial
from .guide_text import WHAT, grammar_text
from .guide_vocabulary import Mask, Vocabulary

COMPILE_SECONDS = 0.5  # of CPU, in the trial; what passes takes as much again in here
TOO_LONG = f"it takes longer than {COMPILE_SECONDS} s to compile"
TOO_LARGE = "it is nested too deeply, or takes too much memory"
SLOWEST = 0.5  # seconds of CPU over one mask, in the engine's own thread; then the guide is given up
KEPT = 64  # grammars that stay compiled
BREAKS = 2  # tokens of line breaks that may stand between the thought and the guided text


class Guides:
    """Of one engine. vocab_size: columns of its logits; ids beyond the tokenizer's are never let through.

    eos_ids: tokens that end a text; they are let through where the guide is fulfilled. workers: compiling threads.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Collection[int], workers: int = 1) -> None:
        self._vocabulary = Vocabulary(tokenizer, vocab_size, eos_ids)
        self._specials = tokenizer.specials
        self._cache: OrderedDict[Guide, Future[Grammar]] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="guides")
        self._folder = TemporaryDirectory(prefix="dsv3-guides-")
        self._file = Path(self._folder.name, "vocabulary.json")
        self._trial = Worker(Path(guide_trial.__file__), "trial", COMPILE_SECONDS, argument=str(self._file))

    def compile(self, guide: Guide) -> "Future[Grammar]":
        """The grammar of a guide, from the cache or soon. UserError in the future: it is malformed, asks for what
        llguidance has not, or takes too much time or memory."""
        with self._lock:
            future = self._cache.pop(guide, None)
            if future is None or future.cancelled():
                future = self._pool.submit(self._compile, guide)
            self._cache[guide] = future
            if len(self._cache) > KEPT:
                self._cache.popitem(last=False)
        return future

    def close(self) -> None:
        """Ends threads and processes."""
        self._pool.shutdown(cancel_futures=True)
        self._trial.close()
        self._folder.cleanup()

    def _compile(self, guide: Guide) -> "Grammar":
        if guide.after_thinking and not self._vocabulary.ends_thought:
            raise UserError("the tokenizer has no token that ends a thought, so no guide can begin after one")
        text = grammar_text(guide, self._specials)
        problem = self._prove(text)
        if problem is not None:
            # Alone, each takes less than all together; where those took too long, nobody waits for each.
            for i in range(len(guide.tools) if problem not in (TOO_LONG, TOO_LARGE) else 0):
                alone = grammar_text(replace(guide, tools=guide.tools[i : i + 1]), self._specials)
                if (cause := self._prove(alone)) is not None:
                    raise UserError(f"the parameters of tool {i} cannot guide a text: {cause}")
            raise UserError(f"{WHAT[guide.kind]} cannot guide a text: {problem}")
        grammar = Grammar(self._vocabulary, text, guide.after_thinking)
        if (problem := grammar.first_mask()) is not None:
            raise UserError(f"{WHAT[guide.kind]} cannot guide a text: {problem}")
        return grammar

    def _prove(self, text: str) -> str | None:
        """What is wrong with a grammar, in a line, or None."""
        self._vocabulary.write(self._file)
        answer = self._trial.map([[text]])[0]
        if answer.failure == "timeout":
            return TOO_LONG
        if answer.failure == "crash":
            return TOO_LARGE
        return None if answer.value is None else one_line(answer.value)


class Grammar:
    """A compiled guide. Its matchers share one lexer, which learns as they go, and which any of them can wear out."""

    def __init__(self, vocabulary: Vocabulary, text: str, after_thinking: bool) -> None:
        self.vocabulary, self.text, self._after_thinking = vocabulary, text, after_thinking
        self.renew()

    def start(self) -> "GuideState":
        """At the beginning of a text."""
        if self.worn:
            self.renew()
        return GuideState(self, self._after_thinking)

    def renew(self) -> None:
        """Puts a new lexer in the place of a worn one."""
        self.worn = False
        self._first = LLMatcher(self.vocabulary.ll, self.text, log_level=0, limits=guide_trial.limits())

    def matcher(self) -> LLMatcher:
        return self._first.deep_copy()

    def first_mask(self) -> str | None:
        """Computes the first mask, which is often the most expensive one; what went wrong, in a line, or None."""
        state = GuideState(self, thinking=False)
        state.fill(np.empty(self.vocabulary.words, np.int32))
        return state.error


class GuideState:
    """Where one text stands.

    done: nothing but the end of the sentence may follow.
    error: why the text cannot go on, in a line. Then no token is accepted any more, and the mask lets everything
        through but the end of the sentence, so that no broken text ends as if it were whole.
    """

    def __init__(self, grammar: Grammar, thinking: bool) -> None:
        self._grammar, self._vocabulary = grammar, grammar.vocabulary
        self._matcher = grammar.matcher()
        self._taken: list[int] = []  # by the matcher
        self._thinking = thinking
        self._breaks = 0  # tokens of line breaks that may still come before the matcher's first
        self._renewed = False
        self.error: str | None = None
        self.done = not thinking and self._stopped

    def fill(self, mask: Mask) -> None:
        """Sets the bits of the tokens that may come next in mask [ceil(V / 32)]; all, while the model still reasons."""
        if self._thinking:
            mask.fill(-1)
        elif self.done:
            mask[:] = self._vocabulary.end_mask
        elif self.error is None and (self._ask(mask) or (self._renew() and self._ask(mask))):
            if self._breaks:
                mask |= self._vocabulary.break_mask
        else:
            np.invert(self._vocabulary.end_mask, out=mask)

    def accept(self, token: int) -> bool:
        """Goes on by one token. False: it breaks the guide, or the lexer gave up; `error` then says which."""
        if self.error is None:
            self.error = self._go_on(token)
            self.done = not self._thinking and self.error is None and self._stopped
        return self.error is None

    def allowed_prefix(self, tokens: Sequence[int]) -> int:
        """How many of these tokens the masks would let through, each behind those before it."""
        return self._walk(tokens, np.empty((len(tokens) + 1, self._vocabulary.words), np.int32))

    def fill_along(self, tokens: Sequence[int], masks: NDArray[np.int32]) -> None:
        """masks [len(tokens) + 1, ceil(V / 32)]: row i as `fill` would set it behind tokens[:i], up to the first token
        that is refused; the rows behind that one stay as they are."""
        self._walk(tokens, masks)

    def copy(self) -> "GuideState":
        other = object.__new__(GuideState)
        other.__dict__.update(self.__dict__, _matcher=self._matcher.deep_copy(), _taken=self._taken.copy())
        return other

    def _walk(self, tokens: Sequence[int], masks: NDArray[np.int32]) -> int:
        """Along the tokens as far as they are allowed, and back."""
        before, taken = (self._thinking, self._breaks, self.error, self.done), len(self._taken)
        matcher, count = self._matcher, 0
        self.fill(masks[0])
        while count < len(tokens) and is_set(masks[count], tokens[count]) and self.accept(tokens[count]):
            count += 1
            self.fill(masks[count])
        steps = len(self._taken) - taken
        del self._taken[taken:]
        if matcher is not self._matcher or matcher.is_error() or not matcher.rollback(steps):
            self._replay()
        self._thinking, self._breaks, error, self.done = before
        self.error = self.error if count == 0 else error  # what went wrong at once went wrong here
        return count

    def _go_on(self, token: int) -> str | None:
        if self._thinking:
            if token in self._vocabulary.ends_thought:
                self._thinking, self._breaks = False, BREAKS
            return None
        if self._is_break(token):
            self._breaks -= 1
            return None
        if self._stopped:
            return None if token in self._vocabulary.eos_ids else "the text goes on where its guide ends"
        if not 0 <= token < self._vocabulary.size:
            return f"there is no token {token}"
        if not self._matcher.consume_token(token) and not (self._renew() and self._matcher.consume_token(token)):
            return one_line(self._matcher.get_error())
        self._taken.append(token)
        self._breaks = 0
        return None

    def _is_break(self, token: int) -> bool:
        """Is it a line break of the model's own, between the thought and a guided text that begins otherwise?"""
        own = bool(self._breaks) and token in self._vocabulary.breaks
        return own and not self._matcher.validate_tokens([token])

    @property
    def _stopped(self) -> bool:
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def _ask(self, mask: Mask) -> bool:
        """Has the matcher fill the mask. False: its lexer or its parser gave up, or took too long."""
        begin = time.thread_time()
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_error():
            self.error = one_line(self._matcher.get_error())
        elif time.thread_time() - begin > SLOWEST:
            self.error = "the guide takes too long over a token"
        return self.error is None

    def _renew(self) -> bool:
        """Goes on with a new lexer where the old one, which all texts of the grammar share, is worn out. Only once: who
        wears out a second one did it alone."""
        if "lexer error" not in self._matcher.get_error():
            return False
        self._grammar.worn = True
        if self._renewed:
            return False
        self._renewed = True
        self._grammar.renew()
        self._replay()
        self.error = None
        return True

    def _replay(self) -> None:
        self._matcher = self._grammar.matcher()
        self._matcher.consume_tokens(self._taken)


def is_set(mask: Mask, token: int) -> bool:
    return 0 <= token < 32 * len(mask) and bool(mask[token // 32] >> token % 32 & 1)


def one_line(error: str) -> str:
    """llguidance's error without the input that it quotes."""
    inner = re.search(r"^error: (.*)$", error, re.MULTILINE)  # of a regular expression
    line = inner[1] if inner else error.strip().partition("\n")[0].partition("; following special tokens")[0]
    return line if len(line) <= 200 else line[:200] + "..."
