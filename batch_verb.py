"""`dsv3 batch`: a file of requests in OpenAI's batch format, answered as `dsv3 serve` would.

The engine runs in a process of its own, and this one puts the lines of the file through the server's application. Under
torchrun every process holds a part of the model, as in `dsv3 serve`.
"""

import argparse
import asyncio
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .engine_args import add_engine, add_format, chat_format, engine_options, names, need_libraries
from .errors import UserError

if TYPE_CHECKING:
    from .cli import Verbs
    from .engine_process import EngineOptions
    from .serving.api.settings import Settings
    from .serving.batch_file import Line, Results
    from .serving.batch_run import Spent
    from .talk import Source

STEP_MS = 5000.0  # nobody waits for a steady stream: a step takes the prompts that it can
NO_LIMIT = 2**62


def add_batch(verbs: "Verbs") -> None:
    from .cli import add_json, add_pretrained

    parser = verbs.add("batch", "batch_verb:run", "Answer a file of requests in OpenAI's batch format.")
    add_pretrained(parser)
    help = 'a JSON object a line: custom_id, method "POST", url (/v1/chat/completions or /v1/completions), body'
    parser.add_argument("file", metavar="FILE", help=help)
    help = "file of the results (default: FILE with .out.jsonl); a run that was interrupted goes on from its .part"
    parser.add_argument("--out", metavar="FILE", help=help)
    add_engine(parser)
    add_format(parser.add_argument_group("chats"))
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    need_libraries("dsv3 batch")
    from .engine_process import follow
    from .serving.batch_file import Results, read_lines
    from .talk import open_source

    file = Path(args.file)
    lines = read_lines(file)
    source = open_source(args.model, args.revision)
    options = engine_options(args, source, STEP_MS)
    if int(os.environ.get("RANK", "0")):
        return follow(options)
    settings = _settings(args, source)
    _check_models(lines, settings.models, file)
    out = Path(args.out) if args.out else file.with_name(file.name.removesuffix(".jsonl") + ".out.jsonl")
    made_of = [options.directory, options.dtype, options.fp8, options.cache, settings.format, settings.thinking]
    with Results(out, lines, json.dumps(made_of)) as results:
        before = len(results.answered)
        spent: dict[str, Any] = {}
        if before < len(lines):
            spent = asdict(asyncio.run(_answer(options, source, settings, lines, results)))
        results.finish()
    failed = {str(status): count for status, count in sorted(results.statuses.items()) if status != 200}
    report = {"requests": len(lines), "answered_before": before, "failed": failed, **spent, "out": str(out)}
    print(json.dumps(report, indent=2) if args.json else "\n".join(_told(report)))


def _settings(args: argparse.Namespace, source: "Source") -> "Settings":
    """The server's, without the limits that guard it from crowds."""
    from .serving.api.settings import Settings

    return Settings(
        models=names(args, source),
        format=chat_format(args, source),
        thinking=args.thinking,
        max_body=NO_LIMIT,
        max_prompts=NO_LIMIT,
        max_queued=NO_LIMIT,
        max_queued_tokens=NO_LIMIT,
        timeout=None,
    )


def _check_models(lines: "Sequence[Line]", known: Sequence[str], file: Path) -> None:
    """A file that asks for another model throughout would be answered with nothing but errors."""
    if all(line.model is not None and line.model not in known for line in lines):
        asked = lines[0].model
        raise UserError(f"{file}: no request is for {known[0]}; to answer as {asked}, give --served-model-name {asked}")


async def _answer(
    options: "EngineOptions", source: "Source", settings: "Settings", lines: "Sequence[Line]", results: "Results"
) -> "Spent":
    from .engine_process import start
    from .serving.api.app import create_app
    from .serving.batch_run import BatchRun
    from .serving.client import SocketClient
    from .training.progress import Progress

    with Progress() as progress:
        progress.show(f"loading {options.name}")
        client = SocketClient(*start(options))
        try:
            await client.start()
            app = create_app(client, source.tokenizer, settings)
            batch = BatchRun(app, client, lines, results, 2 * options.requests, progress.show)
            await batch.run()
        finally:
            await client.close()
    return batch.spent


def _told(report: dict[str, Any]) -> Iterator[str]:
    before = report["answered_before"]
    failed = ", ".join(f"{count:,} with status {status}" for status, count in report["failed"].items())
    yield f"{report['requests']:,} requests, {before:,} of them answered before; failed: {failed or 'none'}"
    if "seconds" in report:
        written, seconds = report["completion_tokens"], report["seconds"]
        yield (
            f"{written:,} tokens written, {report['prompt_tokens']:,} read, {report['cached_tokens']:,} of these from "
            f"the cache; {seconds:.1f} s, {written / seconds:,.0f} tokens/s"
        )
    yield f"results: {report['out']}"
