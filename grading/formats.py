"""Does a completion have the form that R1 and R1-Zero are trained to write?

The whole text must fit, with exactly one of each tag. Anything looser is soon exploited: an empty thought, a thought
within a thought, a second answer behind the first, text behind the end.
"""

import re

from .answers import ANSWER, CONTROL, END_ANSWER, END_THINK, THINK

_R1 = re.compile(rf"{THINK}(?P<thought>.*){END_THINK}(?P<answer>.*)", re.DOTALL)
_R1_ZERO = re.compile(
    rf"\s*{THINK}(?P<thought>.*){END_THINK}\s*{ANSWER}(?P<answer>.*){END_ANSWER}\s*",
    re.DOTALL,
)


def r1_format(text: str) -> bool:
    """`<think>a thought</think>` and then an answer, and nothing else."""
    return _fits(_R1, (THINK, END_THINK), text)


def r1_zero_format(text: str) -> bool:
    """`<think>a thought</think> <answer>an answer</answer>` and nothing else: the template of R1-Zero, behind whose
    "Assistant:" a base model writes a space first."""
    return _fits(_R1_ZERO, (THINK, END_THINK, ANSWER, END_ANSWER), text)


def _fits(form: re.Pattern[str], tags: tuple[str, ...], text: str) -> bool:
    if any(text.count(tag) != 1 for tag in tags) or CONTROL.search(text):
        return False
    found = form.fullmatch(text)
    # Dots, dashes or invisible characters are no thought: some letter or digit must be there.
    return found is not None and all(re.search(r"[^\W_]", part) for part in found.groupdict().values())
