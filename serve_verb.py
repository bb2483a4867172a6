"""`dsv3 serve`: the engine in a process of its own, and the HTTP server in this one.

Under torchrun every process holds a part of the model: the first one serves, its engine drives the others.
"""

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .engine_args import add_engine, add_format, chat_format, engine_options, names, need_libraries
from .errors import UserError

if TYPE_CHECKING:
    from .cli import Parser, Verbs
    from .engine_process import EngineOptions
    from .talk import Source

T = TypeVar("T")


def add_serve(verbs: "Verbs") -> None:
    from .cli import add_pretrained

    parser = verbs.add("serve", "serve_verb:run", "Serve a model behind OpenAI's and DeepSeek's API.")
    add_pretrained(parser)
    _add_network(parser)
    help = "milliseconds that a step may take while texts are written: bounds the pause that a long prompt causes"
    add_engine(parser).add_argument(
        "--step-ms", type=float, default=50.0, metavar="MS", help=f"{help} (default %(default)s)"
    )
    chats = parser.add_argument_group("chats")
    add_format(chats)
    help = "write reasoning under `reasoning` too, besides reasoning_content"
    chats.add_argument("--also-reasoning", action="store_true", help=help)


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


def run(args: argparse.Namespace) -> int:
    from .engine_process import follow
    from .talk import open_source

    need_libraries("dsv3 serve")
    # Texts are encoded one by one: for those, the library's pool of threads is only a detour.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    source = open_source(args.model, args.revision)
    options = engine_options(args, source, args.step_ms)
    if args.drain < 0:
        raise UserError("--drain must not be negative")
    if int(os.environ.get("RANK", "0")):
        follow(options)
        return 0
    return asyncio.run(_serve(args, source, options))


def _settings(args: argparse.Namespace, source: "Source") -> Any:
    from .serving.api.settings import Settings

    format = chat_format(args, source)
    if format is None and args.format == "auto":
        logging.getLogger(__name__).info("the tokenizer has no chat tokens: plain completions only")
    return Settings(
        models=names(args, source),
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

    settings, logger = _settings(args, source), logging.getLogger(__name__)
    listener = listen(args.host, args.port)  # a port that is taken is told before a model is loaded
    early = EarlyEnd()
    link, process = start(options)
    client = SocketClient(link, process)
    try:
        info = await early.unless(client.start())
        if info is not None:
            server = Server(create_app(client, source.tokenizer, settings), args.drain)
        if early.over() or info is None:
            logger.info("ended before the model was loaded")
            return 0
        name, port = listener.getsockname()[:2]
        logger.info(
            "%s on %s: context of %d tokens, a cache of %d", info.model, info.backend, info.context, info.capacity
        )
        print(f"serving on http://{f'[{name}]' if ':' in name else name}:{port}/v1", flush=True)
        await server.serve([listener])
    finally:
        listener.close()
        await client.close()
    return 1 if server.engine_died else 0


class EarlyEnd:
    """SIGTERM while there is no server yet that would take it: what is waited for is given up, and all is closed."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: asyncio.Future[Any] | None = None
        self._came = False
        signal.signal(signal.SIGTERM, self._take)

    def _take(self, *_: object) -> None:
        self._came = True
        self._loop.call_soon_threadsafe(self._give_up)

    def _give_up(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()

    async def unless(self, work: Coroutine[Any, Any, T]) -> T | None:
        """What `work` gives; None if the signal comes first."""
        self._waiting = asyncio.ensure_future(work)
        try:
            await asyncio.wait([self._waiting])
        finally:
            self._give_up()
        return None if self._waiting.cancelled() else self._waiting.result()

    def over(self) -> bool:
        """From here on others take the signal. Has it come?"""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return self._came
