"""From the bytes of a body to a request, or a 400 that names the field at fault and repeats nothing of the body."""

import re
from typing import TypeVar

import msgspec

from .errors import BadRequest
from .protocol import AnyRequest

T = TypeVar("T", bound=AnyRequest)

_NOTHING = (b"null", b"false")
UNSUPPORTED: dict[str, tuple[bytes, ...]] = {
    "functions": (b"null", b"[]"),
    "function_call": (b"null",),
    "audio": (b"null",),
    "modalities": (b"null", b'["text"]'),
    "prediction": (b"null",),
    "web_search_options": (b"null",),
    "logits_processors": (b"null", b"[]"),
    "best_of": (b"null", b"1"),
    "use_beam_search": _NOTHING,
    "length_penalty": (b"null", b"1", b"1.0"),
    "min_tokens": (b"null", b"0"),
    "bad_words": (b"null", b"[]"),
    "allowed_token_ids": (b"null",),
    "prompt_logprobs": _NOTHING,
    "prompt_embeds": (b"null",),
    "truncate_prompt_tokens": (b"null",),
    "include_stop_str_in_output": _NOTHING,
    "return_tokens_as_token_ids": _NOTHING,
    "chat_template": (b"null",),
    "documents": (b"null", b"[]"),
    "structural_tag": (b"null",),
    "images": (b"null", b"[]"),
}
"""Fields that would change the answer, and the values under which they would not."""

_NUL_SPELT = rb"\u0000"
_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")
_PLACE = re.compile(r" - at `(?:(?:key|value)` in `)?\$\.?([^`]*)`$")


def decode(body: bytes, kind: type[T]) -> T:
    """The request in a body. Raises BadRequest."""
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        request = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _misfit(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise BadRequest("the body is not valid JSON in UTF-8", code="invalid_json") from None
    except RecursionError:
        raise BadRequest("the body is nested too deeply", code="invalid_json") from None
    if _NUL_SPELT in body and _NUL.search(body):
        raise BadRequest("the body holds the character U+0000, which is no text", code="invalid_value")
    for name, harmless in UNSUPPORTED.items():
        if name in fields and bytes(fields[name]).replace(b" ", b"") not in harmless:
            raise BadRequest(f"{name} is not supported here; leave it out", name, "unsupported_parameter")
    return request


def _misfit(text: str) -> BadRequest:
    """msgspec's complaint without the values that it quotes."""
    place = _PLACE.search(text)
    param = place[1] if place else ""
    what = text[: place.start()] if place else text
    if missing := re.fullmatch(r"Object missing required field `(\w+)`", what):
        param = f"{param}.{missing[1]}" if param else missing[1]
        return BadRequest(f"{param} is required", param, "missing_required_parameter")
    if what.startswith(("Invalid enum value", "Invalid value")):
        what = "not one of the values that are known here"
    what = what.replace("`", "")
    what = what[0].lower() + what[1:]
    return BadRequest(f"{param or 'the body'}: {what}", param or None, "invalid_value")
