"""Replies told apart while they stream: dsv3 beside the parser classes that vLLM and SGLang ship, on the same pieces.

    python benchmarks/parsers.py
    python benchmarks/parsers.py --vllm DIR --sglang DIR --tokenizer DIR

DIR of a peer: its unpacked source archive or wheel (`pip download --no-deps vllm==0.33.0`, `sglang==0.5.23`), with the
folder vllm or sglang in it. What their parser modules import from the rest of the server is replaced by placeholders;
besides, they need orjson, regex, pydantic, openai, transformers and partial-json-parser.

Every reply is cut into pieces of 1 to N tokens, as speculative decoding, asynchronous scheduling and intervals between
chunks cut it; a control token is never torn. A reply counts as wrong if, put together again, thought, content (but for
white space at their ends) or a call (its arguments as JSON) is not what the reply says. What a server adds when the
stream ends, arguments that were read but not yet sent, is added here for the last call.
The classes run by themselves, not the servers around them.
"""

import argparse
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import logging
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from contest import machine
from rich.console import Console
from rich.table import Table

from dsv3.core.encoding import encode_chat, render
from dsv3.core.reply_events import ReplyParts
from dsv3.core.reply_stream import ReplyStream, TextReplyStream
from dsv3.core.special_tokens import ASSISTANT, END_THINK, EOS, THINK
from dsv3.core.tokenizer import Tokenizer

MOST = (1, 2, 4, 8)  # tokens in a piece
Token = tuple[int, str]
Call = tuple[str, Any]


@dataclass
class Answer:
    """What a reply says, as a client has it in the end."""

    reasoning: str = ""
    content: str = ""
    calls: list[list[str]] = field(default_factory=list)  # name, arguments

    def normal(self) -> tuple[str, str, list[Call]]:
        return self.reasoning.strip(), self.content.strip(), [(name, _json(text)) for name, text in self.calls]


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return f"not JSON: {text}"


# --- the cases ---

ARGUMENTS = (
    [('{"city": "Hangzhou", "unit": "celsius"}',)],
    [('{"city": "Paris"}',), ('{"city": "New York", "days": "3"}',)],
    [('{"ids": [1, 2, 3], "deep": {"on": true, "limit": 12.5}}',)],
    [(json.dumps({"code": 'print("你好, {x}")\n# end', "n": 7}, indent=2, ensure_ascii=False),)],
)
CONTENTS = ("", "Let me look that up.", "", "I will run it.\n\n")
ANSWER = "Here it is:\n\n```python\nprint(1 < 2)\n```\n\nRun it with `python x.py`."


def calls_of(format: str) -> list[tuple[str, Answer]]:
    """Replies with calls -> what they say."""
    found = []
    for content, arguments in zip(CONTENTS, ARGUMENTS, strict=True):
        answer = Answer("", content, [[f"tool_{i}", text] for i, (text,) in enumerate(arguments)])
        calls = [{"function": {"name": name, "arguments": text}} for name, text in answer.calls]
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": content, "tool_calls": calls}]
        text = render(encode_chat(messages, format, add_generation_prompt=False)).partition(ASSISTANT)[2]
        found.append((text.removeprefix(END_THINK).removesuffix(EOS), answer))
    return found


def thoughts() -> list[tuple[str, Answer]]:
    thought = "The user wants x < y, so <b> and </b>.\n\nLet me check: 深度 3 > 2."
    return [
        (f"{thought}\n{END_THINK}\n\n{ANSWER}", Answer(thought, ANSWER)),
        (f"{THINK}\n{thought}\n{END_THINK}\n\n{ANSWER}", Answer(thought, ANSWER)),
        (f"{thought}", Answer(thought, "")),
        (f"{THINK}{thought}{END_THINK}4", Answer(thought, "4")),
    ]


def tokens_of(text: str, tokenizer: Tokenizer) -> list[Token]:
    """The ids of a reply and the text that each gives; its end, which has no text, included."""
    stream = tokenizer.stream(skip_special=True)
    return [(number, stream.push(number)) for number in [*tokenizer.encode(text, allow_special=True), tokenizer.eos_id]]


def cuts(tokens: Sequence[Token], most: int, splits: int) -> Iterator[list[list[Token]]]:
    for seed in range(splits):
        chance, pieces, start = random.Random(f"{most} {seed}"), [], 0
        while start < len(tokens):
            size = chance.randint(1, most)
            pieces.append(list(tokens[start : start + size]))
            start += size
        yield pieces


# --- the contenders: pieces in, answer out ---

Contender = Callable[[list[list[Token]]], Answer]


def ours(format: str, reasoning: bool, tools: bool) -> Contender:
    def read(pieces: list[list[Token]]) -> Answer:
        stream, parts = TextReplyStream(format, reasoning, tools), ReplyParts()
        for piece in pieces:
            parts.add(stream.push("".join(text for _, text in piece)))
        parts.add(stream.finish())
        return Answer(parts.reasoning, parts.content, [[call.name, call.arguments] for call in parts.calls])

    return read


class Bag:
    """Stands for whatever class of their servers: holds what it is given, and None otherwise."""

    def __init__(self, *_: Any, **given: Any) -> None:
        self.__dict__.update(given)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None

    def model_dump(self, **_: Any) -> dict[str, Any]:
        return dict(self.__dict__)


class Placeholders(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of `package` that are named in `real` in their files, and makes up the others."""

    def __init__(self, directory: Path, package: str, real: Sequence[str]) -> None:
        self.directory, self.package, self.real = directory, package, real

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != self.package:
            return None
        if name in self.real:
            file = self.directory.joinpath(*name.split(".")).with_suffix(".py")
            return importlib.util.spec_from_file_location(name, file)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return MadeUp(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class MadeUp(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made: Any
        if name == "init_logger":
            made = logging.getLogger
        elif name == "envs":
            made = Bag()
        elif name == "make_tool_call_id":
            made = str
        elif name.isupper():
            made = name  # a constant
        else:
            made = type(name, (Bag,), {})
        setattr(self, name, made)
        return made


def load(directory: Path, package: str, classes: dict[str, str], also: Sequence[str] = ()) -> dict[str, Any]:
    """name -> class, of "module:name"; also: modules that these need as they are."""
    places = {name: f"{package}.{place}".split(":") for name, place in classes.items()}
    real = [*(module for module, _ in places.values()), *(f"{package}.{module}" for module in also)]
    sys.meta_path.insert(0, Placeholders(directory, package, real))
    return {name: getattr(importlib.import_module(module), kind) for name, (module, kind) in places.items()}


class Vocabulary:
    """As much of a tokenizer as a parser asks for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.vocab = tokenizer.specials

    def get_vocab(self) -> dict[str, int]:
        return self.vocab


def with_rest(answer: Answer, called: Sequence[Any], sent: Sequence[str]) -> Answer:
    """The arguments of the last call that were read but not sent, which a server sends when the stream ends."""
    last = len(called) - 1
    if 0 <= last < min(len(sent), len(answer.calls)):
        wanted = called[last].get("arguments") or {}
        text = wanted if isinstance(wanted, str) else json.dumps(wanted, ensure_ascii=False)
        if text.startswith(sent[last]):
            answer.calls[last][1] += text[len(sent[last]) :]
    return answer


def note_call(answer: Answer, index: int, name: str | None, arguments: str | None) -> None:
    while len(answer.calls) <= index:
        answer.calls.append(["", ""])
    answer.calls[index][0] += name or ""
    answer.calls[index][1] += arguments or ""


def of_vllm(parser_class: Any, method: str, tokenizer: Tokenizer) -> Contender:
    def read(pieces: list[list[Token]]) -> Answer:
        parser, answer = parser_class(Vocabulary(tokenizer)), Answer()
        text, ids = "", list[int]()
        for piece in pieces:
            fresh, fresh_ids = "".join(part for _, part in piece), [number for number, _ in piece]
            arguments: list[Any] = [text, text + fresh, fresh, ids, ids + fresh_ids, fresh_ids]
            if method == "extract_tool_calls_streaming":
                arguments.append(Bag())
            delta = getattr(parser, method)(*arguments)
            text, ids = text + fresh, ids + fresh_ids
            if delta is None:
                continue
            answer.reasoning += delta.reasoning or ""
            answer.content += delta.content or ""
            for call in delta.tool_calls or ():
                note_call(answer, call.index, call.function.get("name"), call.function.get("arguments"))
        if method == "extract_tool_calls_streaming":
            return with_rest(answer, parser.prev_tool_call_arr, parser.streamed_args_for_tool)
        return answer

    return read


def of_sglang(parser_class: Any, tools: bool) -> Contender:
    offered = [Bag(function=Bag(name=f"tool_{i}", parameters={})) for i in range(2)]

    def read(pieces: list[list[Token]]) -> Answer:
        parser, answer = parser_class(), Answer()
        more = (offered,) if tools else ()
        results = [parser.parse_streaming_increment("".join(text for _, text in piece), *more) for piece in pieces]
        for result in [*results, parser.finish(*more)]:
            answer.content += result.normal_text or ""
            if not tools:
                answer.reasoning += result.reasoning_text or ""
                continue
            for call in result.calls:
                note_call(answer, call.tool_index, call.name, call.parameters)
        return with_rest(answer, parser.prev_tool_call_arr, parser.streamed_args_for_tool) if tools else answer

    return read


def peers(options: argparse.Namespace, tokenizer: Tokenizer) -> dict[str, dict[str, Contender]]:
    """program -> kind of case -> contender."""
    found: dict[str, dict[str, Contender]] = {}
    if options.vllm:
        classes = {
            "v3": "tool_parsers.deepseekv3_tool_parser:DeepSeekV3ToolParser",
            "v3.1": "tool_parsers.deepseekv31_tool_parser:DeepSeekV31ToolParser",
            "r1": "reasoning.deepseek_r1_reasoning_parser:DeepSeekR1ReasoningParser",
        }
        tools = ("abstract_tool_parser", "tool_strict_level")
        bases = (
            *(f"tool_parsers.{name}" for name in tools),
            "reasoning.abs_reasoning_parsers",
            "reasoning.basic_parsers",
        )
        loaded = load(options.vllm, "vllm", classes, bases)
        found["vLLM"] = {
            **{name: of_vllm(loaded[name], "extract_tool_calls_streaming", tokenizer) for name in ("v3", "v3.1")},
            "r1": of_vllm(loaded["r1"], "extract_reasoning_streaming", tokenizer),
        }
    if options.sglang:
        classes = {
            "v3": "srt.function_call.deepseekv3_detector:DeepSeekV3Detector",
            "v3.1": "srt.function_call.deepseekv31_detector:DeepSeekV31Detector",
            "r1": "srt.parser.reasoning_parser:DeepSeekR1Detector",
        }
        bases = tuple(f"srt.function_call.{name}" for name in ("base_format_detector", "core_types", "utils"))
        loaded = load(options.sglang, "sglang", classes, bases)
        found["SGLang"] = {name: of_sglang(kind, tools=name != "r1") for name, kind in loaded.items()}
    return found


# --- the contest ---


def wrong(contender: Contender, cases: list[tuple[list[Token], Answer]], most: int, splits: int) -> int:
    count = 0
    for tokens, answer in cases:
        for pieces in cuts(tokens, most, splits):
            try:
                right = contender(pieces).normal() == answer.normal()
            except Exception:  # a parser that raises has not told the reply apart
                right = False
            count += not right
    return count


def sample() -> str:
    return Path(__file__).resolve().parents[1].joinpath("docs", "post-training.md").read_text(encoding="utf-8")


def microseconds_per_token(tokenizer: Tokenizer) -> float:
    """What `ReplyStream` costs with plain text, the decoding of token ids included: the best of 5 runs."""
    ids, best = tokenizer.encode(sample()), float("inf")
    for _ in range(5):
        stream, start = ReplyStream(tokenizer, "v3", tools=True), time.perf_counter()
        for token in ids:
            stream.push(token)
        best = min(best, time.perf_counter() - start)
    return best / len(ids) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, metavar="DIR", help="folder that holds vLLM's package")
    parser.add_argument("--sglang", type=Path, metavar="DIR", help="folder that holds SGLang's package")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="of a model; without, a small one is trained")
    parser.add_argument("--splits", type=int, default=100, help="random cuts of every reply")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)  # parsers log what they choke on
    kinds: dict[str, tuple[str, bool, list[tuple[str, Answer]]]] = {
        "tool calls, V3": ("v3", False, calls_of("v3")),
        "tool calls, V3.1": ("v3.1", False, calls_of("v3.1")),
        "code while tools are on, V3": ("v3", False, [(ANSWER, Answer("", ANSWER))]),
        "code while tools are on, V3.1": ("v3.1", False, [(ANSWER, Answer("", ANSWER))]),
        "reasoning, R1": ("r1", True, thoughts()),
    }
    tokenizer = Tokenizer.load(options.tokenizer) if options.tokenizer else Tokenizer.train([sample()], 2000)
    theirs = peers(options, tokenizer)
    rows = []
    for kind, (format, reasoning, cases) in kinds.items():
        cut = [(tokens_of(text, tokenizer), answer) for text, answer in cases]
        contenders = {"dsv3": ours(format, reasoning, tools=True)}
        contenders |= {program: found[format] for program, found in theirs.items()}
        for program, contender in contenders.items():
            counts = {most: wrong(contender, cut, most, options.splits) for most in MOST}
            rows.append({"replies": kind, "program": program, "of": len(cut) * options.splits, "wrong": counts})
    cost = microseconds_per_token(tokenizer)
    if options.json:
        print(json.dumps({"rows": rows, "microseconds_per_token": round(cost, 2), "machine": machine()}, indent=1))
        return
    table = Table(title="Wrong replies, by the most tokens in a piece")
    for name in ("replies", "program", "of", *map(str, MOST)):
        table.add_column(name, justify="left" if name in ("replies", "program") else "right")
    for row in rows:
        table.add_row(row["replies"], row["program"], str(row["of"]), *map(str, row["wrong"].values()))
    console = Console()
    console.print(table)
    console.print(f"dsv3 takes {cost:.1f} us per token of plain text. {machine()}")


if __name__ == "__main__":
    main()
