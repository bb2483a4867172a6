r"""In which language a text is written, told from the scripts of its letters.

Words are estimated, so that languages weigh alike: one character of Chinese or Japanese makes about a word, and so do
three letters of an alphabet. What belongs to no language is left out first: code, formulas, URLs, tags, digits, and
single Latin letters (the x of 设 x 为). Languages that share a script are not told apart: to `language_share`, German
is as good as English. Detectors that could were tried and misjudge what counts here, mixed text and formulas.
"""

import re

from ..errors import UserError

_SCRIPTS = {
    "latin": "A-Za-zªºÀ-ÖØ-öø-ɏḀ-ỿ",
    "cyrillic": "Ѐ-ԯ",
    "greek": "Ͱ-Ͽἀ-῿",
    "hebrew": "א-ת",
    "arabic": "ؠ-يٮ-ۓݐ-ݿ",
    "devanagari": "ऀ-ॿ",
    "thai": "ก-๎",
    "hangul": "가-힣ᄀ-ᇿ",
    "kana": "ぁ-ゖァ-ヺー",
    "han": "㐀-䶿一-鿿豈-﫿𠀀-𱍊々〇",
}
_WORD = {"han": 1.0, "kana": 1.0, "hangul": 1.0}  # words per letter; the alphabets have 1/3

_BY_SCRIPT = {
    "latin": "en de fr es it pt nl sv da no fi pl cs sk hu ro tr vi id ms",
    "cyrillic": "ru uk bg sr",
    "greek": "el",
    "hebrew": "he",
    "arabic": "ar fa ur",
    "devanagari": "hi mr ne",
    "thai": "th",
    "hangul": "ko",
    "kana": "ja",
    "han": "zh",
}
_SCRIPT_OF = {language: script for script, languages in _BY_SCRIPT.items() for language in languages.split()}

# No alternative can scan past the start of another of its kind, so the time stays linear in the length of the text.
_NO_LANGUAGE = re.compile(
    r"```(?:(?!```).)*(?:```|\Z)"  # fenced code, finished or not
    r"|`[^`\n]*`"
    r"|\$\$(?:(?!\$\$).)*\$\$"
    r"|\\\[(?:(?!\\\[|\\\]).)*\\\]"
    r"|\\\((?:(?!\\\(|\\\)).)*\\\)"
    r"|\$(?![\s$])[^$\n]*(?<!\s)\$(?!\d)"  # "$5 and $6" are prices
    r"|\\[A-Za-z]+"
    r"|(?:https?://|www\.)[!-~]+"
    r"|</?[A-Za-z][^<>\n]{0,100}>"
    r"|<[|｜][^<>|｜]{1,40}[|｜]>",
    re.DOTALL,
)
_RUNS = re.compile("|".join(f"(?P<{name}>[{of}]{{{2 if name == 'latin' else 1},}})" for name, of in _SCRIPTS.items()))


def script_of(language: str) -> str:
    """The script of a language, by its ISO 639-1 code. UserError where we know none."""
    if not isinstance(language, str) or language not in _SCRIPT_OF:
        raise UserError(f"language {language!r} is unknown; known are {', '.join(sorted(_SCRIPT_OF))}")
    return _SCRIPT_OF[language]


def words_by_script(text: str) -> dict[str, float]:
    """Estimated words of `text` in each script that it uses."""
    counts: dict[str, int] = {}
    for run in _RUNS.finditer(_NO_LANGUAGE.sub(" ", text)):
        script = run.lastgroup or ""
        counts[script] = counts.get(script, 0) + run.end() - run.start()
    return {script: letters * _WORD.get(script, 1 / 3) for script, letters in counts.items()}


def language_share(text: str, language: str, minimum: float = 8.0) -> float | None:
    """The share of the words of `text` in the script of `language` ("en", "zh", ...), in 0..1.

    None where fewer than `minimum` words remain to judge by: a text of formulas has no language.
    Chinese characters count as Japanese where kana stand beside them.
    """
    words = words_by_script(text)
    total = sum(words.values())
    if total < minimum or total == 0:
        return None
    script = script_of(language)
    own = words.get(script, 0.0)
    if script == "kana" and own:
        own += words.get("han", 0.0)
    return min(own / total, 1.0)


def detect_script(text: str, minimum: float = 8.0) -> str | None:
    """The script ("latin", "han", ...) that most words of `text` are written in; None below `minimum` words."""
    words = words_by_script(text)
    return max(words, key=words.__getitem__) if words and sum(words.values()) >= minimum else None
