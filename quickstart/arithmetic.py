"""The task that the quickstart reasons about: chains of three digits with + and -, in English and Chinese.

A demonstration has to be learnt in a minute by two million parameters, so the task is small and everything about it is
known: every problem, its answer, and which quarter of all chains nobody is trained on. The cold-start traces have two
styles: step by step, or straight to an answer that a model of this size mostly gets wrong; and half of the Chinese
questions are thought about in English. What reinforcement can then improve is which style and which language the model
chooses.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

from ..training.data.sources import Document, MemorySource

HELD_OUT = 4  # one chain in so many
SALT = "held out of the quickstart, second split"
STEP_BY_STEP = 0.45  # of the cold-start traces; with all of them so, there is nothing left to choose by reinforcement
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
    operations = [(sign, digit) for sign in (1, -1) for digit in range(1, 10)]
    every = (Chain(first, (one, two)) for first, one, two in product(range(1, 10), operations, operations))
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

    def thought(self, step_by_step: bool, language: str) -> str:
        if language == "zh":
            steps = self.chain.steps() if step_by_step else []
            return "".join(f"{'再' if i else '先'}算{step}，" for i, step in enumerate(steps)) + (
                f"所以是{self.chain.answer}"
            )
        steps = self.chain.steps() if step_by_step else []
        return "".join(f"{'then' if i else 'first'} {step}, " for i, step in enumerate(steps)) + (
            f"so {self.chain.answer}"
        )

    def trace(self, step_by_step: bool, language: str) -> dict[str, Any]:
        """As a line of chat data."""
        reply = {
            "role": "assistant",
            "reasoning_content": self.thought(step_by_step, language),
            "content": self.chain.answer,
        }
        return {"messages": [{"role": "user", "content": self.question}, reply]}


def problems(count: int, held_out: bool, seed: int) -> list[Problem]:
    """So many problems on chains of one side of the split, drawn with `seed`; held-out chains once each at most."""
    draw = random.Random(f"problems {held_out} {seed}")
    pool = [chain for chain in chains() if chain.held_out == held_out]
    chosen = draw.sample(pool, count) if held_out else draw.choices(pool, k=count)
    return [_ask(chain, draw) for chain in chosen]


def cold_start(count: int, seed: int) -> list[dict[str, Any]]:
    """Correct traces of both styles, as rows of chat data."""
    draw = random.Random(f"cold start {seed}")
    rows = []
    for problem in problems(count, False, seed + 1_000_000):
        step_by_step = draw.random() < STEP_BY_STEP
        mixed = problem.language == "zh" and draw.random() < ENGLISH_THOUGHT
        rows.append(problem.trace(step_by_step, "en" if mixed else problem.language))
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
        yield problem.question + "\n" + problem.thought(draw.random() < 0.5, problem.language)


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
