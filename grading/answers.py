"""What a reply answers: the text behind the thought, the final answer in it, a letter, a number.

All of it reads one answer or none. A reply that names several, or leaves its last one unfinished, has given none: a
grader that picked the fitting one would pay for guessing.
"""

import re
from fractions import Fraction
from typing import NamedTuple

THINK, END_THINK = "<think>", "</think>"
ANSWER, END_ANSWER = "<answer>", "</answer>"

CONTROL = re.compile(r"<[|｜][^<>|｜]{1,40}[|｜]>")
"""Control tokens of chat formats, spelt out: `<｜User｜>`, `<|im_end|>`."""

WHOLE = 100
"""Characters up to which a whole reply may count as its answer."""


def split_thought(text: str) -> tuple[str | None, str]:
    """(thought, what stands behind the last `</think>`). No tags: (None, text). An unfinished thought: (thought, "").

    A `<think>` behind the last `</think>` opens a thought that did not end, so nothing stands behind it.
    """
    head, end, tail = text.rpartition(END_THINK)
    if THINK in tail:
        return text.lstrip().removeprefix(THINK), ""
    if not end:
        return None, text
    return head.lstrip().removeprefix(THINK), tail


def reply_of(text: str) -> str:
    """The text behind the thought, up to the first control token: what follows one is no longer this reply."""
    return CONTROL.split(split_thought(text)[1], maxsplit=1)[0]


def final_answer(text: str, whole: bool = False) -> str | None:
    r"""The answer that a reply gives behind its thought, or None.

    The last `<answer>..</answer>`; where there is none, the last `\boxed{..}`. What stands in the tags may itself be
    boxed. An answer that was begun and not finished, or is empty, is none, whatever stands before it. whole: where
    there is neither tag nor box, the stripped reply is the answer if it is at most `WHOLE` characters long.
    """
    reply = reply_of(text)
    if ANSWER in reply:
        tagged, end, _ = reply[reply.rindex(ANSWER) + len(ANSWER) :].partition(END_ANSWER)
        if not end:
            return None
        boxes = boxed(tagged)
        answer = boxes[-1].inner if boxes else tagged
    elif boxes := boxed(reply):
        answer = boxes[-1].inner
    else:
        answer = reply.strip() if whole and len(reply.strip()) <= WHOLE else None
    return (answer.strip() or None) if answer else None


_BOX = re.compile(r"\\f?box(?:ed)?\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


class Box(NamedTuple):
    """A box at text[start:end]. inner: what stands in it; None where it is not closed."""

    start: int
    end: int
    inner: str | None


def boxed(text: str) -> list[Box]:
    r"""Each outermost `\boxed{..}` or `\fbox{..}`, braces balanced (`\{` is none). A box in a box is unpacked."""
    found: list[Box] = []
    while box := _BOX.search(text, found[-1].end if found else 0):
        depth = 1
        for brace in _BRACE.finditer(text, box.end()):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                inner = text[box.end() : brace.start()].strip()
                if (again := _BOX.match(inner)) and inner.endswith("}"):
                    inner = inner[again.end() : -1].strip()
                found.append(Box(box.start(), brace.end(), inner))
                break
        else:
            return [*found, Box(box.start(), len(text), None)]
    return found


# A statement of the answer. The letter must follow at once: "the answer is either A or B" and "is not B" state none.
_STATED = (
    r"(?:\b(?:answer|choice|option|choose)\b|答案|选[项择]?)"
    r"[\s*_\"“”]*(?:(?:is|are|would be|must be)\b|应该?[是选为]|[是选为:：=])?"
    r"[\s*_:：\"“”($（\[]*(?:(?:option|choice)\s+)?[(（]?({letter})(?![A-Za-z0-9])"
)
_AND = re.compile(r"\W*(?:(?:or|and|maybe|perhaps)\b|[或和&/+]|还是|以及)", re.IGNORECASE)
_PROSE_AFTER = re.compile(r" (?!(?:or|and|is|because|since|as|but|not)\b)[a-z]")


def choice(text: str, letters: str = "ABCD") -> str | None:
    """The one letter of a multiple-choice question that the reply in `text` chooses, or None.

    Looked for in the final answer where one is marked, else in the last statement of an answer ("the answer is (B)",
    "答案是B"), else at the start of the reply ("B", "**B**", "B. Paris"). The sentence that names it must name no
    other, and a reply that begins with a list of the options has chosen none.
    """
    letter = f"[{re.escape(letters)}]"
    reply = reply_of(text)
    if ANSWER in reply or _BOX.search(reply):
        return _only(final_answer(text) or "", letter)
    stated = [
        match
        for match in re.finditer(_STATED.replace("{letter}", letter), reply, re.IGNORECASE)
        if match[1].isupper() and not _is_word(reply, match.end(1))
    ]
    if stated:
        return _only(reply[stated[-1].start(1) :], letter)
    options = set(re.findall(rf"^[^\w\n]{{0,9}}({letter})(?![A-Za-z0-9'’])", reply, re.MULTILINE))
    return None if len(options) > 1 else _only(reply, letter)


def _only(answer: str, letter: str) -> str | None:
    """The letter that `answer` begins with, or None where its first sentence names another one as well."""
    answer = answer.strip()
    if re.fullmatch(rf"[(（]?{letter}[)）.]?", answer, re.IGNORECASE):
        return answer.strip("()（）.").upper()
    first = re.match(rf"(?:[\W_]|\\[a-z]+\{{)*({letter})(?![A-Za-z0-9])", answer)
    if first is None or _is_word(answer, first.end(1)):
        return None
    # The full stop that belongs to the letter ("B. Paris") does not end the sentence.
    sentence, rest = answer[first.end(1) :].lstrip("). 、）*_"), ""
    if end := re.search(r"\n|[.!?;](?=\s)|[。！？；]", sentence):
        sentence, rest = sentence[: end.start()], sentence[end.end() :]
    heard = sentence + (rest if _AND.match(rest) else "")
    named = re.finditer(rf"(?<![A-Za-z0-9]){letter}(?![A-Za-z0-9'’])", heard)
    others = {match[0] for match in named if not _is_word(heard, match.end())}
    return first[1] if others <= {first[1]} else None


def _is_word(text: str, end: int) -> bool:
    """Is the letter before `end` the article A or the pronoun I: does prose go on right behind it?"""
    return text[end - 1] in "AI" and _PROSE_AFTER.match(text, end) is not None


def exact(answer: str | None, gold: str) -> bool:
    """Are both the same number, or the same text up to case, white space, math delimiters and a full stop?"""
    if answer is None:
        return False
    value = number(answer)
    return value == number(gold) if value is not None else _plain(answer) == _plain(gold) != ""


# Full-width forms of ASCII. Not NFKC, which would read 3² as 32.
_NARROW = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " ", 0x2212: "-"}


def _plain(text: str) -> str:
    text = text.translate(_NARROW).strip()
    for left, right in (("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(left) and text.endswith(right) and len(text) > len(left + right):
            text = text[len(left) : -len(right)]
    return " ".join(text.rstrip(".。 ").casefold().split())


_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_SIGNED = rf"[+-]?(?:{_DIGITS})"
_NUMBER = re.compile(
    rf"(?P<fraction>(?P<sign>[+-]?)\\[dt]?frac\{{(?P<over>{_SIGNED})\}}\{{(?P<under>{_SIGNED})\}})"
    rf"|(?P<top>{_SIGNED})(?:/(?P<bottom>{_DIGITS}))?"
    r"(?:(?:e|(?:\\times|\\cdot|\*|×)10\^)(?P<power>\{?[+-]?\d{1,3}\}?))?"
)
_LONGEST = 400  # characters of a number: reading one costs more than linear time


def number(text: str) -> Fraction | None:
    r"""The value of a numeric literal: integer, decimal, "1,234", "3/4", `\frac{3}{4}`, "5e-3", "50%"; else None.

    Only a literal: "2+3" is None. So is what stands beside a unit or a word, or has more than 400 characters.
    """
    if len(text) > _LONGEST:
        return None
    text = _plain(text).replace("{,}", ",").lstrip("$")
    text = re.sub(r"\\[,!;: ]|\s*\\(?=%)|(?<=[\d}])\s+(?=[\\*×/%])|(?<=[a-z*×/])\s+(?=[\d{])|(?<=^[+-])\s+", "", text)
    percent = text.endswith("%")
    found = _NUMBER.fullmatch(text.removesuffix("%").rstrip())
    if found is None:
        return None
    if found["fraction"]:
        over, under = _literal(found["over"]), _literal(found["under"])
        over = -over if found["sign"] == "-" else over
    else:
        over = _literal(found["top"]) * Fraction(10) ** int((found["power"] or "0").strip("{}"))
        under = _literal(found["bottom"] or "1")
    return over / under / (100 if percent else 1) if under else None


def _literal(digits: str) -> Fraction:
    return Fraction(digits.replace(",", ""))
