"""Does thinking on correct an answer? From the first answer that a thought arrives at to the final one.

Reflection that is counted by words ("wait", "however") says little: most of it confirms what stands already
(arXiv 2510.08308), and shifts are rare and seldom for the better (arXiv 2601.00514). So a trace is judged twice, at its
first candidate answer and at its end, and what counts are the cells of that matrix. Two controls go with it:
`until_first` cuts the thought at its first candidate, so that a caller can end it there and see what thinking on was
worth; `with_wrong_first` puts a known wrong candidate in its place, so that a caller can see how often it is noticed.
"""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .answers import END_THINK, boxed, exact, final_answer, split_thought
from .statistics import Interval, mean_interval, wilson

_LITERAL = r"[-+−]?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?"
# Otherwise a formula or a name, up to the end of the clause; not prose ("the answer is in the form").
_FORMULA = r"(?-i:[A-Z\\(\[{√一-鿿]|[a-z](?![A-Za-z]|\s+[a-z]))(?:[^.。,，;；!！?？\n<]|[.,](?=\d)){0,39}"
# White space is bounded, so that a run of it costs no more than linear time.
_STATED = re.compile(
    r"<answer>(?P<tagged>[^<]+)</answer>"
    r"|(?:\banswer|答案)\s{0,3}(?:(?:is|are|would be|must be|should be)\b|应该?[是为]|[是为:：=])"
    rf"[\s:：=*$]{{0,9}}(?P<stated>{_LITERAL}(?!\s?[\d+/^=(-]|\s?\*(?!\*))|{_FORMULA})"
    r"|(?:\b(?:so|thus|hence|therefore)\b|所以|因此|故)[\s,，]{0,3}"
    r"(?:(?:it|that|this|the (?:result|total|value))(?:['’]s| is| equals)|we (?:get|have)"
    r"|(?:它|结果|总数)?[是为]|得到?|[a-z]\s?=)?"
    # A conclusion must end there: "so 3+8=11" is a step on the way.
    rf"[\s:：=$]{{0,9}}(?P<concluded>{_LITERAL})(?=\$?\s{{0,3}}(?:[.。,，;；!！?？)\n<]|$)(?!\.\d))",
    re.IGNORECASE,
)


class _Candidate(NamedTuple):
    """An answer that text[start:end] proposes."""

    start: int
    end: int
    answer: str


def _find(text: str) -> Iterator[_Candidate]:
    boxes = [box for box in boxed(text) if box.inner]
    starts = [box.start for box in boxes]
    found = [_Candidate(box.start, box.end, box.inner or "") for box in boxes]
    for match in _STATED.finditer(text):
        name = match.lastgroup or ""
        before = bisect_right(starts, match.start(name)) - 1
        within = before >= 0 and match.start(name) < boxes[before].end
        if not within and "\\box" not in match[name]:  # what is stated as a box is found as one
            found.append(_Candidate(match.start(name), match.end(name), match[name].strip()))
    yield from sorted(found)


def _thought(trace: str) -> str:
    """All of a trace up to the end of its thought, opening tag included; a trace without a thought as a whole."""
    head, end, _ = trace.rpartition(END_THINK)
    return head if end else trace


def candidates(text: str) -> list[str]:
    r"""The answers that the thought of a trace proposes, in order; a text without a thought is searched as a whole.

    Boxes, answer tags, "the answer is ..", "答案是..", and a number that concludes ("so 6.", "所以 6"). Steps on the
    way ("so 3+8=11") are none.
    """
    return [candidate.answer for candidate in _find(_thought(text))]


def until_first(trace: str) -> str | None:
    """The trace up to and with its first candidate, `</think>` not included; None where there is no candidate."""
    first = next(_find(_thought(trace)), None)
    return trace[: first.end] if first else None


def with_wrong_first(trace: str, wrong: str) -> str | None:
    """The trace up to its first candidate, `wrong` in the place of the answer: a known wrong start to go on from."""
    first = next(_find(_thought(trace)), None)
    if first is None:
        return None
    place = trace[first.start : first.end]
    return trace[: first.start] + (f"\\boxed{{{wrong}}}" if place.startswith("\\") else wrong)


REFLECTIVE = re.compile(
    r"\b(?:wait|mistake|however|but|retry|error|verify|wrong|evaluate|check)\b|等等|不对|错误|但是|然而|检查|验证|重新",
    re.IGNORECASE,
)
"""The words that R1's paper counts, and Chinese ones: a footnote."""


@dataclass
class Reflection:
    """First answers against final ones, over all traces that were added.

    A trace that names no candidate in its thought, or never ends it, is in none of the cells.
    """

    right_right: int = 0
    wrong_right: int = 0
    right_wrong: int = 0
    wrong_same: int = 0
    wrong_changed: int = 0
    no_candidate: int = 0
    unfinished: int = 0
    words: Counter[str] = field(default_factory=Counter)

    def add(self, trace: str, judge: Callable[[str], bool]) -> None:
        """Judge one trace. judge: is this answer to the trace's question right? Asked once or twice.

        The final answer is the marked one, else the reply itself where it is short; where there is neither, the trace
        ends wrong.
        """
        thought, reply = split_thought(trace)
        self.words.update(word.casefold() for word in REFLECTIVE.findall(thought or ""))
        if thought is None or not (proposed := candidates(trace)):
            self.no_candidate += 1
        elif not reply.strip():
            self.unfinished += 1
        else:
            self._compare(proposed[0], final_answer(trace, whole=True), judge)

    def _compare(self, first: str, final: str | None, judge: Callable[[str], bool]) -> None:
        same = exact(final, first)
        first_right = judge(first)
        final_right = first_right if same else final is not None and judge(final)
        if first_right:
            self.right_right += final_right
            self.right_wrong += not final_right
        elif final_right:
            self.wrong_right += 1
        else:
            self.wrong_same += same
            self.wrong_changed += not same

    @property
    def judged(self) -> int:
        """Traces in the matrix."""
        return self.right_right + self.wrong_right + self.right_wrong + self.wrong_same + self.wrong_changed

    @property
    def correction_precision(self) -> float | None:
        """Of the changes that mattered, the share that corrected: WR / (WR + RW). None without any."""
        mattered = self.wrong_right + self.right_wrong
        return self.wrong_right / mattered if mattered else None

    @property
    def recovery(self) -> float | None:
        """Of the wrong first answers, the share that ended right: WR / (WR + WW). None without any.

        Over traces that began with an injected wrong answer, this is how often the error was noticed and mended.
        """
        wrong = self.wrong_right + self.wrong_same + self.wrong_changed
        return self.wrong_right / wrong if wrong else None

    @property
    def net_gain(self) -> float | None:
        """What thinking on added to the share of right answers: (WR - RW) / judged."""
        return (self.wrong_right - self.right_wrong) / self.judged if self.judged else None

    @property
    def net_gain_interval(self) -> Interval:
        """Of 95% confidence, each trace being worth +1, -1 or 0."""
        unchanged = self.judged - self.wrong_right - self.right_wrong
        return mean_interval([1.0] * self.wrong_right + [-1.0] * self.right_wrong + [0.0] * unchanged)

    def report(self) -> dict[str, Any]:
        """All of it as plain data; intervals as [low, high], null where nothing is known."""
        mattered = self.wrong_right + self.right_wrong
        return {
            "right_right": self.right_right,
            "wrong_right": self.wrong_right,
            "right_wrong": self.right_wrong,
            "wrong_wrong_same": self.wrong_same,
            "wrong_wrong_changed": self.wrong_changed,
            "no_candidate": self.no_candidate,
            "unfinished": self.unfinished,
            "correction_precision": self.correction_precision,
            "correction_precision_interval": list(wilson(self.wrong_right, mattered)) if mattered else None,
            "net_gain": self.net_gain,
            "net_gain_interval": list(self.net_gain_interval) if self.judged > 1 else None,
            "recovery": self.recovery,
            "reflective_words": dict(self.words.most_common()),
        }
