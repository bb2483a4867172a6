"""`dsv3 serve`: the engine in a process of its own, and the HTTP server in this one.

Under torchrun every process holds a part of the model: the first one serves, its engine drives the others.
"""

import argparse
import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from .cli import Parser, Verbs
    from .engine_process import EngineOptions
    from .talk import Source


def add_serve(verbs: "Verbs") -> None:
    from .cli import add_pretrained

    parser = verbs.add("serve", "serve_verb:run", "Serve a model behind OpenAI's and DeepSeek's API.")
    add_pretrained(parser)
    _add_network(parser)
    _add_engine(parser)
    _add_chats(parser)


def _add_network(parser: "Parser") -> None:
    group = parser.add_argument_group("network")
    group.add_argument("--host", default="127.0.0.1", metavar="HOST", help="address to listen on (default %(default)s)")
    group.add_argument(
        "--port", type=int, default=8000, metavar="PORT", help="0 takes a free one (default %(default)s)"
    )
    help = "a key that clients must send, may be given several times; each has a prefix cache of its own"
    group.add_argument("--api-key", action="append", default=[], metavar="KEY", help=help)
    help = "file with a key a line; DSV3_API_KEY in the environment is one more"
    group.add_argument("--api-keys", metavar="FILE", help=help)
    help = "let /metrics be read without a key"
    group.add_argument("--open-metrics", action="store_true", help=help)
    help = "let pages of this origin call from a browser; may be given several times"
    group.add_argument("--cors-origin", action="append", default=[], metavar="ORIGIN", help=help)
    help = "seconds that running texts may take to finish after SIGTERM (default %(default)s)"
    group.add_argument("--drain", type=float, default=30.0, metavar="S", help=help)
    help = "seconds that a request may take, waiting included (default %(default)s)"
    group.add_argument("--timeout", type=float, default=1800.0, metavar="S", help=help)
    help = "requests that may wait; further ones are refused with 503 (default %(default)s)"
    group.add_argument("--max-queued", type=int, default=256, metavar="N", help=help)


def _add_engine(parser: "Parser") -> None:
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--context", type=int, default=0, metavar="N", help="tokens of the longest text (default: the model's)"
    )
    help = "type of the latent cache: auto (the weights'), bfloat16, float32, fp8 (656 bytes a token and layer in V3)"
    group.add_argument(
        "--cache", choices=("auto", "bfloat16", "float32", "fp8"), default="auto", metavar="TYPE", help=help
    )
    help = "size of the cache (default: a quarter of the free memory of a CPU, 0.9 of a GPU's)"
    group.add_argument("--cache-gib", type=float, default=0.0, metavar="GIB", help=help)
    help = "requests that run at a time (default %(default)s)"
    group.add_argument("--max-running", type=int, default=256, metavar="N", help=help)
    help = "milliseconds that a step may take while texts are written: bounds the pause that a long prompt causes"
    group.add_argument("--step-ms", type=float, default=50.0, metavar="MS", help=f"{help} (default %(default)s)")
    help = "tokens that the MTP module drafts per step; the text stays the same (default %(default)s: off)"
    group.add_argument("--speculative-tokens", type=int, default=0, metavar="N", help=help)
    group.add_argument("--no-prefix-caching", action="store_true", help="do not share computed beginnings of texts")
    help = "the same seed gives the same text whatever else runs: slower kernels (cpu only)"
    group.add_argument("--batch-invariant", action="store_true", help=help)
    help = "under torchrun: groups of processes with requests of their own (data-parallel attention); default 1"
    group.add_argument("--dp", type=int, default=1, metavar="N", help=help)
    group.add_argument(
        "--threads", type=int, default=0, metavar="N", help="of the CPU for the engine (default: torch's)"
    )


def _add_chats(parser: "Parser") -> None:
    group = parser.add_argument_group("chats")
    help = "name that clients ask for, may be given several times (default: the directory's)"
    group.add_argument("--served-model-name", action="append", default=[], metavar="NAME", help=help)
    formats = ("auto", "v3", "r1", "v3.1", "kimi-k2", "moonlight", "none")
    help = "chat format: %(choices)s; auto goes by the tokenizer, none serves plain completions only"
    group.add_argument("--format", choices=formats, default="auto", metavar="FORMAT", help=help)
    help = "reason first where the format leaves that open and a request does not say"
    group.add_argument("--thinking", action="store_true", help=help)
    help = "write reasoning under `reasoning` too, besides reasoning_content"
    group.add_argument("--also-reasoning", action="store_true", help=help)


def run(args: argparse.Namespace) -> int:
    from .engine_process import follow
    from .talk import open_source

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    source = open_source(args.model, args.revision)
    options = _engine_options(args, source)
    if int(os.environ.get("RANK", "0")):
        follow(options)
        return 0
    return asyncio.run(_serve(args, source, options))


def _engine_options(args: argparse.Namespace, source: "Source") -> "EngineOptions":
    """What the options say. Raises UserError for what cannot be, before anything is loaded."""
    from .engine_process import EngineOptions

    positive = {
        "--max-running": args.max_running,
        "--step-ms": args.step_ms,
        "--dp": args.dp,
        "--drain": args.drain + 1,
    }
    for name, value in positive.items():
        if value <= 0:
            raise UserError(f"{name} must be above 0")
    if args.speculative_tokens < 0 or args.speculative_tokens > 8:
        raise UserError("--speculative-tokens must be between 0 and 8")
    if args.speculative_tokens and not source.config.num_nextn_predict_layers:
        raise UserError("--speculative-tokens drafts with the MTP module, and this model has none; leave it out")
    if args.context < 0 or args.cache_gib < 0 or args.threads < 0:
        raise UserError("--context, --cache-gib and --threads must not be negative")
    return EngineOptions(
        directory=str(source.directory),
        name=_names(args, source)[0],
        backend=args.backend,
        dtype=args.dtype,
        fp8=args.fp8,
        context=args.context,
        cache=args.cache,
        cache_gib=args.cache_gib,
        requests=args.max_running,
        step_ms=args.step_ms,
        speculative_tokens=args.speculative_tokens,
        prefix_caching=not args.no_prefix_caching,
        batch_invariant=args.batch_invariant,
        ends=tuple(sorted(source.end_tokens())),
        threads=args.threads,
        dp=args.dp,
    )


def _names(args: argparse.Namespace, source: "Source") -> tuple[str, ...]:
    return tuple(args.served_model_name) or (source.directory.name,)


def _settings(args: argparse.Namespace, source: "Source") -> Any:
    from .conversation import choose_format
    from .serving.api.settings import Settings

    format = None
    if args.format != "none":
        try:
            format = choose_format(source.tokenizer, source.config, args.format, args.thinking)
        except UserError:
            if args.format != "auto" or args.thinking:
                raise
            logging.getLogger(__name__).info("the tokenizer has no chat tokens: plain completions only")
    return Settings(
        models=_names(args, source),
        format=format,
        thinking=args.thinking,
        also_reasoning=args.also_reasoning,
        api_keys=_keys(args),
        open_metrics=args.open_metrics,
        cors_origins=tuple(args.cors_origin),
        max_queued=args.max_queued,
        timeout=args.timeout,
    )


def _keys(args: argparse.Namespace) -> tuple[str, ...]:
    keys = [*args.api_key, *filter(None, [os.environ.get("DSV3_API_KEY")])]
    if args.api_keys:
        try:
            lines = Path(args.api_keys).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise UserError(f"--api-keys {args.api_keys}: cannot be read ({error.strerror})") from None
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise UserError(f"--api-keys {args.api_keys}: holds no key; a server without one is open to everybody")
        keys += found
    return tuple(dict.fromkeys(keys))


async def _serve(args: argparse.Namespace, source: "Source", options: "EngineOptions") -> int:
    from .engine_process import start
    from .serving.api.app import create_app
    from .serving.api.server import Server, listen
    from .serving.client import SocketClient

    settings = _settings(args, source)
    listener = listen(args.host, args.port)  # a port that is taken is told before a model is loaded
    link, process = start(options)
    client = SocketClient(link, process)
    try:
        info = await client.start()
        server = Server(create_app(client, source.tokenizer, settings), args.drain)
        name, port = listener.getsockname()[:2]
        logging.getLogger(__name__).info(
            "%s on %s: context of %d tokens, a cache of %d", info.model, info.backend, info.context, info.capacity
        )
        print(f"serving on http://{f'[{name}]' if ':' in name else name}:{port}/v1", flush=True)
        await server.serve([listener])
    finally:
        listener.close()
        await client.close()
    return 1 if server.engine_died else 0
