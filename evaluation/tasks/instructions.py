"""IFEval: instructions that a program can check. The result is the share of prompts all of whose instructions were
kept to the letter ("prompt strict")."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...grading.constraints import check_rule
from ...grading.language import script_of
from ..items import Data, Item, Kind, Task
from ..reading import read_records
from .splits import split_files

FILES = "ifeval_input_data.jsonl (key, prompt, instruction_id_list, kwargs), or its parquet"
Arguments = Mapping[str, Any]
Rules = list[dict[str, Any]]


def _bound(arguments: Arguments, relation: str, count: str) -> dict[str, int]:
    """The data set's "at least N" and "less than N"."""
    wanted = int(arguments[count])
    return {"at_least": wanted} if arguments[relation] == "at least" else {"at_most": wanted - 1}


def _one(name: str, **parameters: str) -> Callable[[Arguments], Rules]:
    """A rule whose parameters are arguments of the data set: ours="theirs"."""
    return lambda arguments: [{"rule": name} | {ours: arguments[theirs] for ours, theirs in parameters.items()}]


def _counted(name: str, relation: str, count: str, **parameters: str) -> Callable[[Arguments], Rules]:
    return lambda arguments: [_one(name, **parameters)(arguments)[0] | _bound(arguments, relation, count)]


def _language(arguments: Arguments) -> Rules:
    """Languages are told by their scripts: English instead of Hindi is noticed, English instead of German is not."""
    language = str(arguments["language"])
    if script_of(language) == "latin" and language != "en":
        raise UserError(f"the script of {language!r} does not tell it from English")
    return [{"rule": "language", "language": language}]


def _nth_paragraph(arguments: Arguments) -> Rules:
    return [
        {"rule": "paragraphs", "exactly": int(arguments["num_paragraphs"])},
        {"rule": "paragraph_starts", "paragraph": int(arguments["nth_paragraph"]), "word": arguments["first_word"]},
    ]


ANSWERS = ["My answer is yes.", "My answer is no.", "My answer is maybe."]
RULES_OF: dict[str, Callable[[Arguments], Rules]] = {
    "keywords:existence": _one("contains", keywords="keywords"),
    "keywords:frequency": _counted("keyword_count", "relation", "frequency", keyword="keyword"),
    "keywords:forbidden_words": _one("excludes", keywords="forbidden_words"),
    "keywords:letter_frequency": _counted("letter_count", "let_relation", "let_frequency", letter="letter"),
    "language:response_language": _language,
    "length_constraints:number_sentences": _counted("sentences", "relation", "num_sentences"),
    "length_constraints:number_paragraphs": _one("paragraphs", exactly="num_paragraphs"),
    "length_constraints:number_words": _counted("words", "relation", "num_words"),
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "detectable_content:number_placeholders": _one("placeholders", at_least="num_placeholders"),
    "detectable_content:postscript": _one("postscript", marker="postscript_marker"),
    "detectable_format:number_bullet_lists": _one("bullets", exactly="num_bullets"),
    "detectable_format:constrained_response": lambda arguments: [{"rule": "one_of", "options": ANSWERS}],
    "detectable_format:number_highlighted_sections": _one("highlights", at_least="num_highlights"),
    "detectable_format:multiple_sections": _one("sections", marker="section_spliter", at_least="num_sections"),
    "detectable_format:json_format": _one("json_only"),
    "detectable_format:title": _one("title"),
    "combination:two_responses": _one("two_responses"),
    "combination:repeat_prompt": _one("repeat_prompt", prompt="prompt_to_repeat"),
    "startend:end_checker": _one("ends_with", phrase="end_phrase"),
    "startend:quotation": _one("quotation"),
    "change_case:capital_word_frequency": _counted("capital_words", "capital_relation", "capital_frequency"),
    "change_case:english_capital": lambda arguments: [{"rule": "case", "case": "upper"}],
    "change_case:english_lowercase": lambda arguments: [{"rule": "case", "case": "lower"}],
    "punctuation:no_comma": _one("no_commas"),
}
"""What each of the data set's instructions is among the rules of grading/constraints."""


def rules_of(instruction: str, arguments: Arguments) -> Rules | None:
    """The rules that an instruction comes to; None where there are none for it (a language without a script of its own,
    an instruction of another data set)."""
    make = RULES_OF.get(instruction)
    if make is None:
        return None
    # Parquet has every argument in every row, null where it means nothing, and counts as floats.
    given = {key: value for key, value in arguments.items() if value is not None}
    whole = {key: int(value) if isinstance(value, float) else value for key, value in given.items()}
    try:
        rules = make(whole)
        for rule in rules:
            check_rule(rule)
    except (UserError, KeyError, TypeError, ValueError):
        return None
    return rules


def read_ifeval(path: Path) -> Data:
    items, total = [], 0
    for file in split_files(path, "ifeval", FILES, (".jsonl", ".json", ".parquet")).get("test", []):
        for record in read_records(file):
            names, arguments = record.texts("instruction_id_list"), record.get("kwargs")
            if not isinstance(arguments, list) or len(arguments) != len(names):
                record.broken("kwargs must be a list with an entry for each instruction")
            total += 1
            found = [rules_of(name, given or {}) for name, given in zip(names, arguments, strict=True)]
            if None not in found:
                extra = {"rules": [rule for rules in found for rule in rules or ()]}
                items.append(Item(record.text("key"), record.text("prompt"), "", extra=extra, where=record.where))
    left_out = total - len(items)
    note = f"{left_out} of {total} prompts hold instructions that no rule covers; they are left out"
    return Data(items, notes=(note,) if left_out else ())


TASKS = (
    Task(
        "ifeval",
        "IFEval",
        Kind.RULES,
        FILES,
        read_ifeval,
        ask=lambda item: item.question,
        tell=lambda item: "",
        chat=lambda item: item.question,
        tokens=1280,
        size=541,
    ),
)
