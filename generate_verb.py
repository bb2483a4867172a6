"""`dsv3 generate`: a model goes on with a text, behind its beginning-of-sentence token. No chat, no template.

Tokens appear as they come. Several samples are computed together and shown one after the other: the first as it comes,
the next ones from what they have become meanwhile. Their seeds are S, S + 1, ..., so each can be had again alone, but
for rounding, which depends on how many are computed together.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from . import talk
from .core.generate import Completion, Rollout, SamplingParams
from .core.text_stream import TextStream
from .errors import UserError


def run(args: argparse.Namespace) -> None:
    talk.forgive_encodings()
    if args.samples < 1:
        raise UserError("-n must be 1 or more")
    source = talk.open_source(args.model, args.revision)
    ends = source.end_tokens()
    params = talk.sampling(args, source, ends)
    first = talk.draw_seed() if params.seed is None else params.seed
    each = [replace(params, seed=first + i) for i in range(args.samples)]
    prompt = [source.tokenizer.bos_id, *source.tokenizer.encode(_prompt(args))]
    rollout = source.load(args, args.cache, args.speculative_tokens)
    texts = [TextStream(source.tokenizer, params.stop, ends) for _ in each]
    completions: list[Completion] = []
    pieces = _pieces(rollout, prompt, each, texts, completions)
    if args.json:
        for _ in pieces:
            pass
        for text, completion in zip(texts, completions, strict=True):
            print(json.dumps(_record(text.text, completion), ensure_ascii=False))
    else:
        _show(pieces, [params.seed for params in each])


def _prompt(args: argparse.Namespace) -> str:
    """The text of --prompt or --prompt-file ("-": standard input), to the byte."""
    if args.prompt is not None:
        return args.prompt
    if args.prompt_file == "-":
        return sys.stdin.read()
    try:
        return Path(args.prompt_file).read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"--prompt-file {args.prompt_file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompt-file {args.prompt_file}: byte {error.start} is not UTF-8; convert it first"
        ) from None


def _pieces(
    rollout: Rollout,
    prompt: list[int],
    each: list[SamplingParams],
    texts: list[TextStream],
    completions: list[Completion],
) -> Iterator[tuple[int, str, bool]]:
    """(sample, text, whether that was its last), interleaved."""
    with closing(rollout.stream([prompt] * len(each), each, completions)) as tokens:
        for token in tokens:
            piece = texts[token.index].push(token.token_id)
            if token.finish_reason is not None:
                piece += texts[token.index].finish()
            yield token.index, piece, token.finish_reason is not None


def _show(pieces: Iterator[tuple[int, str, bool]], seeds: list[int | None]) -> None:
    shown = talk.harmless if sys.stdout.isatty() else str
    waiting, finished, current = [""] * len(seeds), [False] * len(seeds), 0
    try:
        _head(0, seeds)
        for index, piece, last in pieces:
            waiting[index] += piece
            finished[index] = last
            while current < len(seeds):
                sys.stdout.write(shown(waiting[current]))
                waiting[current] = ""
                if not finished[current]:
                    break
                sys.stdout.write("\n")
                current += 1
                _head(current, seeds)
            sys.stdout.flush()
    except KeyboardInterrupt:
        print()
        raise


def _head(index: int, seeds: list[int | None]) -> None:
    if len(seeds) > 1 and index < len(seeds):
        print(f"--- {index + 1} of {len(seeds)}, seed {seeds[index]} ---", flush=True)


def _record(text: str, completion: Completion) -> dict[str, object]:
    """What --json prints of a completion; token_ids and logprobs include the end token, if there is one."""
    return {
        "text": text,
        "token_ids": completion.token_ids,
        "logprobs": completion.logprobs,
        "finish_reason": completion.finish_reason,
        "seed": completion.seed,
    }
