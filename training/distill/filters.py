"""Which samples are fit to learn from: one question per rule, about one sample or about the samples of one prompt.

A rule that rejects gives its reason; the first one counts.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...core.completer import split_reply
from ...grading.formats import r1_format, r1_zero_format
from ...grading.language import detect_script, language_share, script_of
from ...grading.ngrams import NgramIndex
from .config import FilterSection
from .prompts import Prompt

ACCURACY = "accuracy"  # rewards whose name begins so say whether an answer is right
JUDGE = "judge"  # and this one where they cannot
SHINGLE = 5  # tokens of the n-grams that near duplicates share
_CJK = "぀-ヿ㐀-䶿一-鿿豈-﫿가-힣"
_TOKENS = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+|[^\w\s]")
# A language of each script, to measure the share of a script where the row names no language.
_LANGUAGES = ("ar", "el", "en", "he", "hi", "ja", "ko", "ru", "th", "zh")
_OF_SCRIPT = {script_of(language): language for language in _LANGUAGES}


@dataclass(frozen=True)
class Sample:
    """A reply to `prompt` and what the rewards said about it (None: they were not asked)."""

    prompt: Prompt
    seed: int
    text: str
    finish_reason: str
    tokens: int
    total: float | None = None
    rewards: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def thought(self) -> str:
        return split_reply(self.text)[0]

    @property
    def answer(self) -> str:
        return split_reply(self.text)[1]


def is_right(
    finish_reason: str, rewards: Mapping[str, float | None], names: Sequence[str], minimum: Mapping[str, float]
) -> bool | None:
    """Is a sample right: do all accuracy rewards among `names` that could judge it say so? Where none could, the judge
    decides if `minimum` says what it must give. None where nobody could tell. A sample that was cut off has no answer,
    so it is not right.
    """
    accuracy = [name for name in names if name.startswith(ACCURACY)]
    by_judge = [JUDGE] if JUDGE in names and JUDGE in minimum else []
    if not accuracy and not by_judge:
        return None
    if finish_reason != "stop":
        return False
    for group in (accuracy, by_judge):
        judged = {name: value for name in group if (value := rewards.get(name)) is not None}
        if judged:
            return all(value >= minimum.get(name, 1.0) for name, value in judged.items())
    return None


class Filter:
    """The rules of `section`. names: of the rewards. benchmarks: what must not be learnt."""

    def __init__(self, section: FilterSection, names: Sequence[str], benchmarks: NgramIndex | None = None) -> None:
        self.section, self.names, self.benchmarks = section, list(names), benchmarks
        self._seen: set[bytes] = set()

    def choose(self, samples: Iterable[Sample]) -> tuple[list[Sample], Counter[str]]:
        """The samples of one prompt that stay, and how many were rejected for which reason."""
        kept: list[Sample] = []
        shingles: list[frozenset[int]] = []
        rejected: Counter[str] = Counter()
        for sample in samples:
            reason = self.reason(sample) or self._repeats(sample, shingles)
            if reason is None and self.section.per_prompt and len(kept) >= self.section.per_prompt:
                reason = "over_cap"
            if reason is None:
                kept.append(sample)
                self._remember(sample, shingles)
            else:
                rejected[reason] += 1
        return kept, rejected

    def reason(self, sample: Sample) -> str | None:
        """Why a sample alone is rejected."""
        section = self.section
        if sample.finish_reason != "stop":
            return "refused" if sample.finish_reason == "refused" else "truncated"
        right = is_right(sample.finish_reason, sample.rewards, self.names, section.minimum)
        if right is False:
            return "wrong"
        verifying = any(name.startswith(ACCURACY) for name in self.names)
        if right is None and section.unverified == "reject" and verifying:
            return "unverified"
        for name, least in section.minimum.items():
            value = sample.rewards.get(name)
            if not name.startswith(ACCURACY) and value is not None and value < least:
                return f"low_{name}"
        return self._form(sample) or self._content(sample)

    def _form(self, sample: Sample) -> str | None:
        section = self.section
        if section.style == "r1" and not r1_format(sample.text):
            return "malformed"
        if section.style == "r1-zero" and not r1_zero_format(sample.text):
            return "malformed"
        if section.max_tokens and sample.tokens > section.max_tokens:
            return "overlong"
        if section.max_paragraph and longest_paragraph(sample.thought) > section.max_paragraph:
            return "long_paragraph"
        return "code_block" if not section.code_blocks and "```" in sample.thought else None

    def _content(self, sample: Sample) -> str | None:
        section = self.section
        if section.language:
            language = language_of(sample.prompt)
            share = language_share(sample.thought, language, section.language_words) if language else None
            if share is not None and share < section.language:
                return "mixed_language"
        if section.repeat_limit and repetitions(sample.text, section.repeat_ngram) > section.repeat_limit:
            return "repeated"
        if self.benchmarks is not None and self.benchmarks.overlap(sample.text) is not None:
            return "contaminated"
        return None

    def _repeats(self, sample: Sample, shingles: list[frozenset[int]]) -> str | None:
        if fingerprint(sample) in self._seen:
            return "duplicate"
        if self.section.near_duplicate:
            own = shingles_of(sample.text)
            if any(jaccard(own, other) >= self.section.near_duplicate for other in shingles):
                return "near_duplicate"
        return None

    def _remember(self, sample: Sample, shingles: list[frozenset[int]]) -> None:
        self._seen.add(fingerprint(sample))
        if self.section.near_duplicate:
            shingles.append(shingles_of(sample.text))


def tokens_of(text: str) -> list[str]:
    """Words, Chinese characters, and signs: 3-8 and 3+8 differ."""
    return _TOKENS.findall(text.casefold())


def fingerprint(sample: Sample) -> bytes:
    """Equal for the same reply to the same prompt, up to case and white space."""
    parts = (" ".join(text.casefold().split()) for text in (sample.prompt.text, sample.text))
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).digest()


def shingles_of(text: str) -> frozenset[int]:
    """The 5-grams of a text, hashed; of a shorter one, all of it."""
    words = tokens_of(text)
    return frozenset(hash(tuple(words[i : i + SHINGLE])) for i in range(max(1, len(words) - SHINGLE + 1)))


def jaccard(a: frozenset[int], b: frozenset[int]) -> float:
    return len(a & b) / len(a | b)


def repetitions(text: str, n: int) -> int:
    """How often the most frequent run of n tokens occurs: a loop of any length repeats some run again and again."""
    words = tokens_of(text)
    counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    return max(counts.values(), default=0)


def longest_paragraph(text: str) -> int:
    """Characters between two blank lines, at most."""
    return max(len(paragraph.strip()) for paragraph in re.split(r"\n\s*\n", text))


def language_of(prompt: Prompt) -> str | None:
    """The row's `language`, or one of the script that the prompt is written in."""
    named: Any = prompt.columns.get("language")
    if isinstance(named, str) and named:
        return named
    script = detect_script(prompt.text, 1.0)
    return _OF_SCRIPT.get(script) if script else None
