"""Is a mathematical answer right? Numbers are compared here, exactly; everything else by math-verify in a worker.

A gold answer that is a number wants a number as answer, written down as one: 5, 1,234, -3/4, `\\frac{3}{4}`,
3\\frac{1}{2}, 0.75, 75\\%, 7.5 \\times 10^{-1}, $0.75, 7 apples, `x = 5`. Whoever only restates the question (2+3, an
integral, 5=5) has not answered it, and a policy finds out soon when that pays. Everything that is no number is text
(`\\text{east}`, a letter, a numeral in another base), which must be equal, or an expression, which math-verify and the
rules of `math_worker` decide.
"""

import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

from ..errors import UserError
from .verdict import Verdict
from .worker import Answer, Worker

# Longer answers are no answers, and cost the parsers time that grows faster than their length.
LONGEST = 2000
# A number that is written with at least so many decimals may be the rounding of one that is not (math-verify's rule).
ROUNDED_DECIMALS = 6
BATCH = 32


class MathGrader:
    """Grades answers against gold answers; both are what stands in `\\boxed{}`, with or without `$`.

    timeout: CPU seconds for one comparison. workers: processes that compare, started when they are needed. A context
    manager, usable from any thread. `timeouts` counts the comparisons that took too much time or memory so far: they
    are neither right nor wrong.
    """

    def __init__(self, timeout: float = 5.0, workers: int = 1):
        script = Path(__file__).with_name("math_worker.py")
        self.timeouts = 0
        self._lock = threading.Lock()
        self._workers = [Worker(script, "grade", timeout) for _ in range(max(1, workers))]

    def __enter__(self) -> "MathGrader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for worker in self._workers:
            worker.close()

    def check_gold(self, golds: Sequence[str]) -> list[int]:
        """Indices of the gold answers that cannot be understood (in time): no answer would ever be right."""
        hard = sorted({gold for gold in golds if literal(gold) is None and words(gold) is None})
        calls = [(expression, None) for gold in hard if (expression := _expression(gold)) is not None]
        understood = {gold for (gold, _), answer in zip(calls, self._ask(calls), strict=True) if answer.value is True}
        refused = {gold for gold in hard if _expression(gold) not in understood}
        return [i for i, gold in enumerate(golds) if gold in refused]

    def grade(self, golds: Sequence[str], answers: Sequence[str | None]) -> list[Verdict]:
        """One verdict for each pair. None (or nothing but blanks) as an answer: none was found."""
        pairs = list(zip(golds, answers, strict=True))
        # A group of rollouts gives the same answer many times over.
        judged = {pair: _judge(*pair) for pair in set(pairs)}
        hard = sorted({call for call in judged.values() if not isinstance(call, Verdict)})
        found = dict(zip(hard, self._ask(hard), strict=True))
        verdicts = [_verdict(found[call]) if not isinstance(call := judged[pair], Verdict) else call for pair in pairs]
        with self._lock:
            self.timeouts += verdicts.count(Verdict.TIMEOUT)
        return verdicts

    def _ask(self, calls: Sequence[tuple[str, str | None]]) -> list[Answer]:
        if not calls:
            return []
        if find_spec("math_verify") is None:
            raise UserError("grading mathematics needs math-verify: pip install 'dsv3[train]' or 'dsv3[eval]'")
        batches = [calls[start : start + BATCH] for start in range(0, len(calls), BATCH)]
        if len(self._workers) == 1 or len(batches) == 1:
            return [answer for batch in batches for answer in self._workers[0].map(batch)]
        with ThreadPoolExecutor(len(self._workers)) as pool:
            shares = [batches[i :: len(self._workers)] for i in range(len(self._workers))]
            done = pool.map(lambda worker, share: [worker.map(batch) for batch in share], self._workers, shares)
            results = [iter(share) for share in done]
        return [answer for i in range(len(batches)) for answer in next(results[i % len(results)])]


def _judge(gold: str, answer: str | None) -> Verdict | tuple[str, str]:
    """The verdict on an answer where it needs no worker, else what to ask one: two expressions."""
    if answer is None or not answer.strip():
        return Verdict.MISSING
    if len(answer) > LONGEST:
        return Verdict.WRONG
    number = literal(gold)
    if number is not None:
        value = literal(answer, _SUM_ASSIGNED)
        return Verdict.RIGHT if value is not None and same_number(number, value) else Verdict.WRONG
    text = words(gold)
    if text is not None:
        if words(answer) == text:
            return Verdict.RIGHT
        # `ab` may be a product: `ba` is the same. `east` is not.
        if len(text) == 1 or len(text) > 3 or "_" in text or "\\" in gold:
            return Verdict.WRONG
    wanted, given = _expression(gold), _expression(answer)
    return Verdict.WRONG if wanted is None or given is None else (wanted, given)


def _verdict(answer: Answer) -> Verdict:
    if answer.failure is not None:
        return Verdict.TIMEOUT
    return Verdict.RIGHT if answer.value is True else Verdict.WRONG


# ---- Plain text of LaTeX

_WRAPPERS = re.compile(r"\$+(.*?)\$+|\\\((.*)\\\)|\\\[(.*)\\\]|\\boxed\s*\{(.*)\}|\*\*(.*)\*\*", re.DOTALL)
_INVISIBLE = re.compile(r"(?<!\\)\\(?:left|right|displaystyle|limits|,|;|:|!|quad|qquad|\s)(?![A-Za-z])|~")


def plain(text: str) -> str:
    """`text` without delimiters, spacing commands and other things that have no meaning."""
    text = text.strip()
    while wrapped := _WRAPPERS.fullmatch(text):
        text = next(group for group in wrapped.groups() if group is not None).strip()
    text = text.replace("−", "-").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("{,}", ",")
    text = re.sub(r",\\!\s*", ",", text)
    text = _INVISIBLE.sub(" ", text)
    return re.sub(r"\s+", " ", text).strip().removesuffix(".").strip()


_PROSE = re.compile(r"(?:[A-Za-z]{2,}[,;]? ){3,}[A-Za-z]{2,}")


def _expression(text: str) -> str | None:
    """`text` as LaTeX that a parser may see. None: prose, which it would read as a product of letters, or nothing."""
    text = plain(text)
    if not text or len(text) > LONGEST or _PROSE.search(text) or "\\boxed" in text:
        return None
    text = re.sub(r"(?<![\\A-Za-z])sqrt\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi ", text)
    return text.replace("**", "^")


# ---- Text answers

_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[A-Za-z][A-Za-z'’-]*(?: [A-Za-z][A-Za-z'’-]*)*")
_BASED = re.compile(r"([0-9A-Za-z.]*\d[0-9A-Za-z.]*)_\{?(?:\\text\{)?(\w+)\}{0,2}")


def words(text: str) -> str | None:
    """The canonical form of an answer in words, of a letter, or of a numeral with its base; None for all others.

    Bare words are text up to three of them; in `\\text{}`, up to six. Case counts for single letters alone.
    """
    text = plain(text)
    based = _BASED.fullmatch(text.replace(" ", ""))
    if based:
        return f"{based[1]}_{based[2]}"
    bare = _TEXT.sub(r"\1", text)
    marked = bare != text
    bare = re.sub(r"\s+", " ", bare).strip(" .:*")
    bare = re.sub(r"^\(\s*(.*?)\s*\)$", r"\1", bare).removesuffix(")").strip()
    if not _WORDS.fullmatch(bare) or bare.count(" ") >= (6 if marked else 3):
        return None
    return bare if len(bare) == 1 else bare.lower()


# ---- Numbers


@dataclass(frozen=True)
class Literal:
    """A number as written. values: its readings, several for a percentage (10% may stand for 10 and for 1/10).

    decimals, digits: how many digits stand behind the point, and how many count; 0 for numbers without a point.
    """

    values: tuple[Fraction, ...]
    decimals: int = 0
    digits: int = 0


def same_number(one: Literal, other: Literal) -> bool:
    """Equal, or one the correct rounding of the other to six decimals or more: 1/3 and 0.333333, but not 0.333."""
    if set(one.values) & set(other.values):
        return True
    for short, full in ((one, other), (other, one)):
        if min(short.decimals, short.digits) >= ROUNDED_DECIMALS:
            gap = abs(short.values[0] - full.values[0])
            if gap * 2 <= Fraction(1, 10**short.decimals):
                return True
    return False


_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?: \d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_SIGNED = rf"[+-]?\s?{_DECIMAL}"
_FRAC = rf"\\frac\s?(?:\{{\s?({_SIGNED})\s?\}}|(\d))\s?(?:\{{\s?({_SIGNED})\s?\}}|(\d))"
_FRACTION = re.compile(rf"(?:({_DIGITS})\s?)?{_FRAC}")
_QUOTIENT = re.compile(rf"(?:(\d+) )?({_DECIMAL})\s?/\s?({_DECIMAL})")
_SCIENTIFIC = re.compile(
    rf"(?:({_DECIMAL})\s?(?:\\times|\\cdot|[x×*·])\s?)?10\s?(?:\^|\*\*)\s?\{{?\s?([+-]?\d{{1,3}})\s?\}}?"
)
_FLOAT = re.compile(rf"({_DECIMAL})(?:[eE]([+-]?\d{{1,3}}))?")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\s?\{(\d+)\}")
_NAME = r"(?:[A-Za-z]|\\[a-z]+)(?:_\{?\w+\}?)?(?:\(\w+\))?"
_ASSIGNED = re.compile(rf"{_NAME} ?= ?([^=]+)")
# `m + n = 34` answers "find m + n"; as a gold answer it would be the equation of a line.
_SUM_ASSIGNED = re.compile(rf"{_NAME}(?: ?[+-]? ?{_NAME})* ?= ?([^=]+)")

# What may stand behind a number and does not change it. A lone letter does (7x), and so do the words below.
_UNIT_TEXT = r"\\(?:text|textrm|textbf|mathrm|mbox|operatorname)\s?\{\s*([A-Za-z][A-Za-z ./-]*|)\s*\}"
_UNIT_WORDS = r"(?<= )([A-Za-z]{2,}(?:[ /-][A-Za-z]{1,})*)"
_UNIT_GLUED = r"(?<=\d)(cm|mm|km|kg|mg|ml|mL|ft|lb|lbs|mph|hrs|mins|degrees)"
_POWER = r"(?:\s?(?:\^\s?\{?\s?[23]\s?\}?|[²³]))?"
_UNIT = re.compile(rf"(?:{_UNIT_TEXT}|{_UNIT_WORDS}|{_UNIT_GLUED}){_POWER}\.?$")
_DEGREES = re.compile(r"(?:\^\s?\{?\s?\\circ\s?\}?|°)$")
_PERCENT = re.compile(r"(?:\\?%|\\?\b(?:percent|pct)|\\(?:text|mathrm|mbox)\s?\{\s*(?:\\?%|percent)\s*\})$")
_CHANGING = frozenset(
    [
        "pi",
        "sqrt",
        "root",
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "log",
        "ln",
        "exp",
        "times",
        "plus",
        "minus",
        "divided",
        "over",
        "squared",
        "cubed",
        "factorial",
        "choose",
        "mod",
        "hundred",
        "thousand",
        "million",
        "billion",
        "trillion",
        "dozen",
        "half",
        "third",
        "quarter",
        "or",
        "and",
        "to",
        "power",
        "i",
        "e",
        "percent",
        "pct",
    ]
)


def literal(text: str, assigned: re.Pattern[str] = _ASSIGNED) -> Literal | None:
    """The number that `text` writes down, units and currency aside; None where it writes something else.

    assigned: what may stand before it, with an equals sign.
    """
    if len(text) > 400:
        return None
    text = plain(text)
    if name := assigned.fullmatch(text):
        text = name[1].strip()
    text = re.sub(r"^([+-]?)\s?(?:\\?\$|[€£¥₹])\s?", r"\1", text)
    text, percent = _cut(text, _PERCENT)
    text = _without_unit(text)
    if text.startswith("(") and text.endswith(")") and "," not in text:
        text = text[1:-1].strip()
    sign = -1 if text.startswith("-") else 1
    number = _unsigned(text.lstrip("+-").lstrip() if text[:1] in ("+", "-") else text)
    if number is None:
        return None
    value = sign * number.values[0]
    return Literal((value, value / 100) if percent else (value,), number.decimals, number.digits)


def _cut(text: str, tail: re.Pattern[str]) -> tuple[str, bool]:
    found = tail.search(text)
    return (text[: found.start()].strip(), True) if found else (text, False)


def _without_unit(text: str) -> str:
    unit = _UNIT.search(text)
    if unit:
        said = " ".join(group for group in unit.groups() if group)
        if _CHANGING & set(re.split(r"[^a-z]+", said.lower())):
            return text
        text = text[: unit.start()].strip()
    return _cut(text, _DEGREES)[0]


def _unsigned(text: str) -> Literal | None:
    if found := _FRACTION.fullmatch(text):
        whole, *parts = found.groups()
        top, bottom = (_fraction(part) for part in parts if part is not None)
        return _ratio(whole, top, bottom)
    if found := _QUOTIENT.fullmatch(text):
        return _ratio(found[1], _fraction(found[2]), _fraction(found[3]))
    if found := _SCIENTIFIC.fullmatch(text):
        return _scaled(found[1] or "1", int(found[2]))
    if found := _FLOAT.fullmatch(text):
        return _scaled(found[1], int(found[2] or 0))
    if found := _REPEATING.fullmatch(text):
        whole, fixed, period = found.groups()
        unit = Fraction(1, 10 ** len(fixed))
        value = Fraction(int(whole or 0)) + unit * (int(fixed or 0) + Fraction(int(period), 10 ** len(period) - 1))
        return Literal((value,))
    return None


def _fraction(text: str) -> Fraction:
    return Fraction(re.sub(r"[ ,]", "", text).removesuffix("."))


def _ratio(whole: str | None, top: Fraction, bottom: Fraction) -> Literal | None:
    if bottom == 0 or (whole is not None and top / bottom < 0):
        return None
    return Literal((top / bottom + (_fraction(whole) if whole else 0),))


def _scaled(mantissa: str, exponent: int) -> Literal:
    value = _fraction(mantissa) * Fraction(10) ** exponent
    behind = len(mantissa.partition(".")[2])
    if not behind:
        return Literal((value,))
    return Literal((value,), max(0, behind - exponent), len(re.sub(r"[ ,.]", "", mantissa).lstrip("0")))
