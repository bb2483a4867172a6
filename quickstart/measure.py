"""What a model of the quickstart can do with problems that nobody was trained on."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..core.completer import LocalCompleter, Reply
from ..core.generate import SamplingParams, make_rollout
from ..core.model import DeepseekV3
from ..core.tokenizer import Tokenizer
from ..grading.answers import exact
from ..grading.formats import r1_format
from ..grading.language import language_share
from ..grading.reflection import Reflection
from ..grading.statistics import wilson
from .arithmetic import Problem

MAX_TOKENS = 48  # more than the longest legal reply has; a test holds it against all traces
SHOWN = 12  # problems whose replies the report shows


def measure(directory: Path, problems: Sequence[Problem], seed: int) -> dict[str, Any]:
    """Greedy and at temperature 1: accuracy with its 95 % interval, form, language of the Chinese questions' thoughts,
    tokens of a reply, and some replies."""
    model, tokenizer = DeepseekV3.from_pretrained(directory, backend="auto").eval(), Tokenizer.load(directory)
    completer = LocalCompleter(make_rollout(model), tokenizer, "r1", batch=len(problems))
    conversations = [[{"role": "user", "content": problem.question}] for problem in problems]
    greedy = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, seed=seed)
    warm = [replace(greedy, temperature=1.0, seed=seed + i) for i in range(len(problems))]
    replies = completer.complete(conversations, greedy)
    sampled = completer.complete(conversations, warm)
    return {
        "greedy": scores(problems, replies),
        "temperature 1": scores(problems, sampled),
        "reflection": {"greedy": reflection(problems, replies), "temperature 1": reflection(problems, sampled)},
        "right": [float(is_right(problem, reply)) for problem, reply in zip(problems, replies, strict=True)],
        "samples": [
            {"question": problem.question, "answer": problem.chain.answer, "text": reply.text, "right": right}
            for problem, reply in list(zip(problems, replies, strict=True))[:SHOWN]
            for right in [is_right(problem, reply)]
        ],
    }


def is_right(problem: Problem, reply: Reply) -> bool:
    return reply.finish_reason == "stop" and exact(reply.content.strip(), problem.chain.answer)


def reflection(problems: Sequence[Problem], replies: Sequence[Reply]) -> dict[str, Any]:
    """First answers of the thoughts against final ones, and what share of the thoughts goes step by step."""
    found = Reflection()
    for problem, reply in zip(problems, replies, strict=True):
        found.add(reply.text, partial(exact, gold=problem.chain.answer))
    stepwise = sum("=" in reply.reasoning for reply in replies)
    return found.report() | {"step_by_step": stepwise / len(replies)}


def scores(problems: Sequence[Problem], replies: Sequence[Reply]) -> dict[str, Any]:
    count = len(problems)
    right = sum(map(is_right, problems, replies))
    chinese = [
        share
        for problem, reply in zip(problems, replies, strict=True)
        if problem.language == "zh" and (share := language_share(reply.reasoning, "zh", minimum=0.5)) is not None
    ]
    low, high = wilson(right, count)
    return {
        "accuracy": right / count,
        "interval": [low, high],
        "problems": count,
        "well_formed": sum(r1_format(reply.text) for reply in replies) / count,
        "chinese_thoughts": sum(chinese) / len(chinese) if chinese else None,
        "tokens": sum(reply.tokens for reply in replies) / count,
        "truncated": sum(reply.finish_reason == "length" for reply in replies) / count,
    }
