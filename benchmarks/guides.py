"""What guided decoding costs with a vocabulary of V3's size; beside xgrammar, where it is installed.

    python benchmarks/guides.py TOKENIZER      # a directory with a tokenizer.json

The text of each guide is walked token by token. compile: the matcher alone, without the trial in another process, which
is measured once. mask: of one position; apply: to a row of logits. One thread; medians, and the most.
"""

import argparse
import json
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from dsv3.core.sampling_params import Guide
from dsv3.core.tokenizer import Tokenizer
from dsv3.serving.guides import Grammar, Guides
from dsv3.serving.sampler import forbid

SIZE = 129_280
RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "city": {"type": "string"}, "code": {"type": "string"}},
            "required": ["street", "city", "code"],
            "additionalProperties": False,
        },
        "scores": {"type": "array", "items": {"type": "integer"}},
        "kind": {"enum": ["new", "old", "other"]},
    },
    "required": ["name", "address", "scores", "kind"],
    "additionalProperties": False,
}
ONE = {
    "name": "Zoë 深度求索 of the long name",
    "address": {"street": "rue de la Paix 12, at the back", "city": "Paris", "code": "75002"},
    "scores": [*range(90, 130)],
    "kind": "other",
}
GUIDES = {
    "any object": (Guide("json_object"), json.dumps(ONE, ensure_ascii=False)),
    "a schema": (Guide("json_schema", json.dumps(RECORD)), json.dumps(ONE, ensure_ascii=False)),
    "a pattern": (Guide("regex", r"([0-9]{4}-[0-9]{2}-[0-9]{2}, [A-Z][a-z]+\n){1,100}"), "2024-02-29, Paris\n" * 20),
}


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came."""
    begin = time.perf_counter()
    result = call()
    return time.perf_counter() - begin, result


def ours(tokenizer: Tokenizer) -> None:
    compiler = Guides(tokenizer, SIZE, [tokenizer.eos_id])
    seconds, _ = timed(lambda: compiler.compile(Guide("regex", "a")).result())
    print(f"llguidance: first guide, with all preparations: {seconds:.2f} s")
    logits, row = torch.randn(1, SIZE), np.zeros((1, -(-SIZE // 32)), np.int32)
    for name, (guide, text) in GUIDES.items():
        whole, grammar = timed(lambda guide=guide: compiler.compile(guide).result())
        alone, _ = timed(lambda grammar=grammar: Grammar(grammar.vocabulary, grammar.text, False))
        state, masks, steps, applied = grammar.start(), [], [], []
        for token in tokenizer.encode(text):
            masks.append(timed(lambda state=state: state.fill(row[0]))[0])
            assert row[0, token // 32] >> token % 32 & 1
            steps.append(timed(lambda state=state, token=token: state.accept(token))[0])
            applied.append(timed(lambda: forbid(logits, torch.zeros(1, dtype=torch.int64), torch.from_numpy(row)))[0])
        report(name, alone, masks)
        print(f"    with the trial {whole * 1e3:.0f} ms; accept {np.median(steps) * 1e6:.0f} us; ", end="")
        print(f"apply {np.median(applied) * 1e6:.0f} us; {len(masks)} tokens")
    compiler.close()


def theirs(tokenizer: Tokenizer) -> None:
    import xgrammar

    tokens = [tokenizer.token_bytes(i) for i in range(SIZE)]
    info = xgrammar.TokenizerInfo(tokens, vocab_size=SIZE, stop_token_ids=[tokenizer.eos_id])
    make = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    calls = {
        "any object": lambda: make.compile_builtin_json_grammar(),
        "a schema": lambda: make.compile_json_schema(json.dumps(RECORD)),
        "a pattern": lambda: make.compile_regex(GUIDES["a pattern"][0].text),
    }
    print("xgrammar:")
    mask = xgrammar.allocate_token_bitmask(1, SIZE)
    for name, call in calls.items():
        seconds, grammar = timed(call)
        matcher, masks = xgrammar.GrammarMatcher(grammar), []
        for token in tokenizer.encode(GUIDES[name][1]):
            masks.append(timed(lambda matcher=matcher: matcher.fill_next_token_bitmask(mask))[0])
            assert matcher.accept_token(token)
        report(name, seconds, masks)


def report(name: str, compiled: float, masks: list[float]) -> None:
    micro = np.array(masks) * 1e6
    print(
        f"  {name:12} compile {compiled * 1e3:6.1f} ms; mask {np.median(micro):.0f} us, at the most {max(micro):.0f} us"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer")
    tokenizer = Tokenizer.load(parser.parse_args().tokenizer)
    torch.set_num_threads(1)
    ours(tokenizer)
    if find_spec("xgrammar"):
        theirs(tokenizer)


if __name__ == "__main__":
    main()
