"""Rewards for how a reply is written: form, language, length, rules that it was told to keep."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...errors import UserError
from ...grading.answers import reply_of, split_thought
from ...grading.constraints import check_rule, satisfied
from ...grading.formats import r1_format, r1_zero_format
from ...grading.language import language_share, script_of
from ..settings import Count, NonNegative, Section
from .reward import Batch, Reward, Score


@dataclass(frozen=True)
class FormatOptions(Section):
    """style: "r1" (`<think>`, then an answer) or "r1-zero" (`<think>`, then `<answer>`); see `grading.formats`."""

    style: Literal["r1", "r1-zero"] = "r1"


class Format(Reward):
    """1 where the whole completion has the form and ended by itself, else 0."""

    def __init__(self, options: FormatOptions) -> None:
        super().__init__()
        self.fits = {"r1": r1_format, "r1-zero": r1_zero_format}[options.style]

    def score(self, batch: Batch) -> list[Score]:
        return [float(done and self.fits(text)) for text, done in zip(batch.texts, batch.finished, strict=True)]


@dataclass(frozen=True)
class LanguageOptions(Section):
    """column: of the language ("en", "zh", ...) that is wanted. language: wanted in all rows, instead of a column.

    part: what is judged; R1's reward is on the thought. minimum: estimated words below which there is no score
    (`grading.language`).
    """

    column: str = "language"
    language: str = ""
    part: Literal["thought", "reply", "all"] = "thought"
    minimum: NonNegative = 8.0

    def check(self) -> None:
        if self.language:
            script_of(self.language)


class Language(Reward):
    """The share of words in the wanted language (R1 report, 2.3.2); None where there are too few to tell."""

    def __init__(self, options: LanguageOptions) -> None:
        super().__init__(None if options.language else options.column)
        self.options = options

    def score(self, batch: Batch) -> list[Score]:
        options = self.options
        return [
            language_share(self.part(text), options.language or wanted, options.minimum)
            for text, wanted in zip(batch.texts, batch.given, strict=True)
        ]

    def part(self, text: str) -> str:
        thought, reply = split_thought(text)
        return {"thought": thought or "", "reply": reply, "all": f"{thought or ''}\n{reply}"}[self.options.part]

    def useless(self, given: Sequence[Any]) -> tuple[int, str] | None:
        return first_error(given, script_of)


@dataclass(frozen=True)
class LengthOptions(Section):
    """max_tokens: longest completion. soft_tokens: so many before it, the punishment begins; 0: only beyond it."""

    max_tokens: Count = 0
    soft_tokens: Count = 0

    def check(self) -> None:
        if not self.max_tokens:
            raise UserError("max_tokens must be set: the number of tokens that a completion may have")
        if self.soft_tokens > self.max_tokens:
            raise UserError(f"soft_tokens must be at most max_tokens ({self.max_tokens}), not {self.soft_tokens}")


class Length(Reward):
    """Soft punishment of overlong completions (DAPO, equation 13): 0 up to max_tokens - soft_tokens, then linear down
    to -1 at max_tokens. A completion that was cut off there is overlong."""

    def __init__(self, options: LengthOptions) -> None:
        super().__init__()
        self.most, self.soft = options.max_tokens, options.soft_tokens

    def score(self, batch: Batch) -> list[Score]:
        completions = zip(batch.columns["completion_ids"], batch.finished, strict=True)
        return [self.punishment(len(ids), done) for ids, done in completions]

    def punishment(self, length: int, finished: bool) -> float:
        if length > self.most or (length == self.most and not finished):
            return -1.0
        return -max(0.0, (length - (self.most - self.soft)) / self.soft) if self.soft else 0.0


@dataclass(frozen=True)
class ConstraintsOptions(Section):
    """column: of the rules, a list of tables (`grading.constraints`). score: 1 for keeping all, or the share kept."""

    column: str = "rules"
    score: Literal["all", "share"] = "all"


class Constraints(Reward):
    """Does the reply behind the thought keep its row's rules? A completion that was cut off keeps none."""

    judges = True

    def __init__(self, options: ConstraintsOptions) -> None:
        super().__init__(options.column)
        self.share = options.score == "share"

    def score(self, batch: Batch) -> list[Score]:
        scores: list[Score] = []
        for text, rules, done in zip(batch.texts, batch.given, batch.finished, strict=True):
            kept = [done and satisfied(rule, reply_of(text)) for rule in rules]
            scores.append(sum(kept) / len(kept) if self.share else float(all(kept)))
        return scores

    def useless(self, given: Sequence[Any]) -> tuple[int, str] | None:
        return first_error(given, check_rules)


def check_rules(rules: Any) -> None:
    """UserError where `rules` is no list of rules."""
    if not isinstance(rules, list) or not rules:
        raise UserError(f'it must be a list of rules, like [{{"rule": "no_commas"}}], not {rules!r}')
    for rule in rules:
        check_rule(rule)


def first_error(given: Sequence[Any], check: Callable[[Any], object]) -> tuple[int, str] | None:
    """The first value that `check` refuses, and its words."""
    for i, value in enumerate(given):
        try:
            check(value)
        except (UserError, TypeError) as error:
            return i, str(error)
    return None
