"""A guide as a grammar in llguidance's language: JSON schemas, regular expressions, Lark, and tool calls in the markup
of the chat format. What cannot be one is told here; whether it compiles, and at what cost, in guide_trial.

Control tokens go by their names, `<｜tool▁sep｜>`: the same grammar then fits any vocabulary that has them.
"""

import json
import re
from collections.abc import Collection
from typing import Any

from ..core.encoding_deepseek import STYLES
from ..core.reply_splitter import MARKUP
from ..core.sampling_params import Guide
from ..errors import UserError

MOST_BYTES = 256 << 10  # of a guide's texts; schemas of that size already take most of a second
DEEPEST = 64  # of JSON in a schema; llguidance's own reader ends at 128
# Blanks between the parts of a JSON text: one space, or a line break and an indent. Without a bound, a model that is
# kept from what it wants to say writes blanks until its tokens run out.
BLANKS = r"( |\n[ \t]{0,64})?"
JSON_STYLE = {"whitespace_pattern": BLANKS, "json_allow_general_unicode_escapes": True}

WHAT = {
    "json_object": "the JSON object",
    "json_schema": "the JSON schema",
    "regex": "the regular expression",
    "grammar": "the grammar",
    "tools": "the parameters of the tools",
}


def grammar_text(guide: Guide, specials: Collection[str]) -> str:
    """The grammar of a guide. specials: names of the tokenizer's control tokens.

    Raises UserError: texts that are too long, too deep or no JSON; a format without tools, or whose control tokens the
    tokenizer lacks; operators of Lark grammars that are left out here (see `_lark`).
    """
    size = len(guide.text.encode(errors="replace")) + sum(len((a + b).encode(errors="replace")) for a, b in guide.tools)
    if size > MOST_BYTES:
        raise UserError(f"{WHAT[guide.kind]} has {size} bytes; {MOST_BYTES} at most")
    match guide.kind:
        case "json_object":
            return _document(json_schema={"type": "object", "x-guidance": JSON_STYLE})
        case "json_schema":
            return _document(json_schema=_schema(guide.text, WHAT["json_schema"]))
        case "regex":
            return _document(lark_grammar=f"start: /{_regex(guide.text)}/")
        case "grammar":
            return _document(lark_grammar=_lark(guide.text))
        case "tools":
            return _document(lark_grammar=_tools(guide, specials))


def _document(**grammar: Any) -> str:
    return json.dumps({"grammars": [grammar]})


def _schema(text: str, what: str) -> dict[str, Any]:
    """A JSON schema with the style of JSON in it. The schema `true` allows all."""
    try:
        schema = json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise UserError(f"{what} is nested deeper than {DEEPEST} levels") from None
    except ValueError as error:
        raise UserError(f"{what} is not JSON ({error})") from None
    schema = {} if schema is True else schema
    if not isinstance(schema, dict):
        raise UserError(f"{what} must be a JSON object")
    level: list[Any] = [schema]
    for _ in range(DEEPEST):
        level = [inner for value in level for inner in _inside(value)]
        if not level:
            return {**schema, "x-guidance": JSON_STYLE}
    raise UserError(f"{what} is nested deeper than {DEEPEST} levels")


def _inside(value: Any) -> Collection[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _regex(pattern: str) -> str:
    """A pattern as it stands between the slashes of Lark."""
    slashes = len(pattern) - len(pattern.rstrip("\\"))
    if slashes % 2:  # it would hide the slash behind it
        raise UserError("the regular expression ends in a backslash that escapes nothing")
    whole = re.compile(r"\\(.)|([/\n])", re.DOTALL)
    return whole.sub(lambda found: {"/": "\\/", "\n": "\\n"}.get(found[1] or found[2], found[0]), pattern)


# Strings, comments and patterns of Lark, which may hold anything.
_QUOTED = re.compile(r'"(?:\\[^\r\n]|[^"\\\r\n])*"|//[^\r\n]*|#[^\r\n]*|/(?:\\[^\r\n]|[^/\\])+/')


def _lark(text: str) -> str:
    """A Lark grammar without the intersection `&` and the complement `~` of terminals: a line of them can keep the
    lexer busy for minutes, in any step of the text. (`~` that counts repetitions, `a ~ 3`, is another operator.)"""
    bare = _QUOTED.sub(" ", text)
    if "&" in bare or re.search(r"~(?!\s*\d)", bare):
        raise UserError("the grammar uses the operators & or ~ on terminals, which this server does not run")
    if not text.strip():
        raise UserError("the grammar is empty")
    return text


def _tools(guide: Guide, specials: Collection[str]) -> str:
    """One or more calls as the chat format writes them (see encoding_deepseek.Style), and nothing else."""
    if guide.format not in MARKUP:
        raise UserError(f"the chat format {guide.format!r} has no tools")
    if not guide.tools:
        raise UserError("tools must be called, and none are given")
    markup = MARKUP[guide.format]
    missing = [name for name in markup.markers if name not in specials]
    if missing:
        raise UserError(f"the tokenizer has no token {missing[0]!r}, so tools cannot be called in its chats")
    between = STYLES[guide.format].between_calls if guide.format in STYLES else ""
    rules = [f"start: {markup.section_begin} call ({_literal(between)} call)* {markup.section_end}"]
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(guide.tools))))
    for i, (name, parameters) in enumerate(guide.tools):
        if not name or "\n" in name:
            raise UserError("a tool must have a name, of one line")
        if markup.names_are_ids:
            head = f"{_literal(f'functions.{name}:')} /[0-9]{{1,4}}/ {markup.separator}"
        elif markup.lead:
            head = f"{_literal(markup.lead)} {markup.separator} {_literal(name)}"
        else:
            head = f"{_literal(name)} {markup.separator}"
        schema = _schema(parameters or "{}", f"the schema of tool {i}'s parameters")
        schema.setdefault("type", "object")  # arguments are an object, whatever else is left open
        opening, closing = _literal(markup.opening), _literal(markup.closing)
        rules.append(
            f"call_{i}: {markup.call_begin} {head} {opening} %json {json.dumps(schema)} {closing} {markup.call_end}"
        )
    return "\n".join(rules)


def _literal(text: str) -> str:
    """A text in a Lark rule; none leaves nothing."""
    return json.dumps(text) if text else ""
