"""The task that the quickstart reasons about: chains of three digits with + and -, in English and Chinese.

A demonstration has to be learnt in a minute by two million parameters, so the task is small and everything about it is
known: every problem, its answer, and which third of all chains nobody is trained on. The cold-start traces have
three styles: straight to an answer, which a model of this size mostly gets wrong; step by step; and an attempt that is
checked step by step and corrected. Half of the Chinese questions are thought about in English. What reinforcement can
then improve is which style and which language the model chooses.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

from ..training.data.sources import Document, MemorySource

DIGITS = range(1, 8)
HELD_OUT = 3  # one chain in so many
SALT = "held out of the quickstart, final split"
STYLES = {"direct": 0.4, "steps": 0.42, "checked": 0.18}  # see `Problem.thought`
RIGHT_ATTEMPT = 0.25  # of the attempts that are checked; about as often as a direct answer of the model is right
CHINESE = 0.4  # of the questions
ENGLISH_THOUGHT = 0.5  # of the Chinese questions in the cold-start traces
TRANSCRIPTS = 4000

_ENGLISH_NAMES = ("Tom", "Ann", "Max", "Eva", "Sam", "Lea")
_CHINESE_NAMES = ("小明", "小红", "小华", "小丽")
_THINGS = (("apples", "苹果"), ("books", "书"), ("coins", "硬币"), ("cards", "卡片"))


@dataclass(frozen=True)
class Chain:
    """first, then (sign, digit) pairs: 3 + 8 - 5 is (3, ((1, 8), (-1, 5)))."""

    first: int
    rest: tuple[tuple[int, int], ...]

    @property
    def text(self) -> str:
        return str(self.first) + "".join(f"{'+' if sign > 0 else '-'}{digit}" for sign, digit in self.rest)

    @property
    def answer(self) -> str:
        return str(self.first + sum(sign * digit for sign, digit in self.rest))

    @property
    def held_out(self) -> bool:
        """By the hash of the chain alone, so that no seed and no wording brings it into training."""
        return hashlib.sha256(f"{SALT} {self.text}".encode()).digest()[0] % HELD_OUT == 0

    def steps(self) -> list[str]:
        """Each operation with its result: 3+8=11, 11-5=6."""
        value, lines = self.first, []
        for sign, digit in self.rest:
            after = value + sign * digit
            lines.append(f"{value}{'+' if sign > 0 else '-'}{digit}={after}")
            value = after
        return lines


@cache
def chains() -> tuple[Chain, ...]:
    """All of them that never fall below zero on the way."""
    operations = [(sign, digit) for sign in (1, -1) for digit in DIGITS]
    every = (Chain(first, (one, two)) for first, one, two in product(DIGITS, operations, operations))
    return tuple(chain for chain in every if all("=-" not in step for step in chain.steps()))


@dataclass(frozen=True)
class Problem:
    """A question about a chain. language: "en" or "zh", of the question."""

    chain: Chain
    language: str
    question: str

    def row(self) -> dict[str, Any]:
        """As a line of the prompts' file: what GRPO, distillation and `dsv3 eval` read."""
        return {
            "prompt": self.question,
            "answer": self.chain.answer,
            "language": self.language,
            "group": {"en": "English", "zh": "Chinese"}[self.language],
            "chain": self.chain.text,
        }

    def thought(self, language: str, steps: bool, attempt: str | None = None) -> str:
        """`so 4? first 3+8=11, then 11-5=6, so 6`, without the attempt or the steps where they are not wanted."""
        chinese = language == "zh"
        operations = self.chain.steps() if steps else []
        if chinese:
            return (
                (f"所以是{attempt}？" if attempt else "")
                + "".join(f"{'再' if i else '先'}算{operation}，" for i, operation in enumerate(operations))
                + f"所以是{self.chain.answer}"
            )
        return (
            (f"so {attempt}? " if attempt else "")
            + "".join(f"{'then' if i else 'first'} {operation}, " for i, operation in enumerate(operations))
            + f"so {self.chain.answer}"
        )

    def trace(self, language: str, steps: bool, attempt: str | None = None) -> dict[str, Any]:
        """As a line of chat data."""
        thought = self.thought(language, steps, attempt)
        reply = {"role": "assistant", "reasoning_content": thought, "content": self.chain.answer}
        return {"messages": [{"role": "user", "content": self.question}, reply]}


def problems(count: int, held_out: bool, seed: int) -> list[Problem]:
    """So many problems on chains of one side of the split, drawn with `seed`; held-out chains once each at most."""
    draw = random.Random(f"problems {held_out} {seed}")
    pool = [chain for chain in chains() if chain.held_out == held_out]
    chosen = draw.sample(pool, count) if held_out else draw.choices(pool, k=count)
    return [_ask(chain, draw) for chain in chosen]


def cold_start(count: int, seed: int) -> list[dict[str, Any]]:
    """Traces of all styles, as rows of chat data; every one ends with the right answer."""
    draw = random.Random(f"cold start {seed}")
    rows = []
    for problem in problems(count, False, seed + 1_000_000):
        (style,) = draw.choices(list(STYLES), list(STYLES.values()))
        mixed = problem.language == "zh" and draw.random() < ENGLISH_THOUGHT
        attempt = _attempt(problem.chain, draw) if style == "checked" else None
        rows.append(problem.trace("en" if mixed else problem.language, style != "direct", attempt))
    return rows


def transcripts(seed: int) -> MemorySource:
    """Sessions with Python's prompt that add and subtract: arithmetic as it occurs in code, a single operation at a
    time. What is held out, whole chains, does not occur."""
    draw = random.Random(f"transcripts {seed}")
    operations = sorted({step for chain in chains() for step in chain.steps()})
    documents = []
    for number in range(TRANSCRIPTS):
        lines = []
        for operation in draw.sample(operations, 5):
            asked, value = operation.split("=")
            sign = "+" if "+" in asked else "-"
            left, right = asked.split(sign)
            if draw.random() < 0.3:
                name = draw.choice("abcnxyk")
                lines += [f">>> {name} = {left}", f">>> {name} {sign} {right}", value]
            else:
                lines += [f">>> {asked}" if draw.random() < 0.7 else f">>> {left} {sign} {right}", value]
        documents.append(Document(f"session {number}", "\n".join(lines) + "\n"))
    return MemorySource("sessions", documents)


def texts_for_tokenizer(count: int, seed: int) -> Iterator[str]:
    """Questions and thoughts, so that the tokenizer learns their words, the Chinese ones above all."""
    draw = random.Random(f"tokenizer {seed}")
    for problem in problems(count, False, seed):
        attempt = _attempt(problem.chain, draw) if draw.random() < 0.2 else None
        yield problem.question + "\n" + problem.thought(problem.language, True, attempt)


def _attempt(chain: Chain, draw: random.Random) -> str:
    """A first answer, off by a few where it is wrong."""
    right = int(chain.answer)
    if draw.random() < RIGHT_ATTEMPT:
        return str(right)
    return str(draw.choice([right + off for off in (-3, -2, -1, 1, 2, 3) if right + off >= 0]))


def _ask(chain: Chain, draw: random.Random) -> Problem:
    language = "zh" if draw.random() < CHINESE else "en"
    if draw.random() < 0.5:
        if language == "zh":
            question = draw.choice((f"计算{chain.text}", f"{chain.text}等于多少？"))
        else:
            question = draw.choice((f"What is {chain.text}?", f"Compute {chain.text}."))
        return Problem(chain, language, question)
    english, chinese = draw.choice(_THINGS)
    if language == "zh":
        events = "".join(f"，{'又得到' if sign > 0 else '送出'}{digit}个" for sign, digit in chain.rest)
        return Problem(chain, "zh", f"{draw.choice(_CHINESE_NAMES)}有{chain.first}个{chinese}{events}，现在有几个？")
    events = "".join(f", {'gets' if sign > 0 else 'gives away'} {digit}" for sign, digit in chain.rest)
    things = english if chain.first > 1 else english.removesuffix("s")
    return Problem(chain, "en", f"{draw.choice(_ENGLISH_NAMES)} has {chain.first} {things}{events}. How many now?")
