"""Options that say what kind of engine a verb runs, and what they mean. Nothing here needs torch until it is asked."""

import argparse
from typing import TYPE_CHECKING

from .errors import UserError

if TYPE_CHECKING:
    from .cli import Parser
    from .core.config import ModelConfig
    from .engine_process import EngineOptions
    from .talk import Source

CACHES = ("auto", "bfloat16", "float32", "fp8")
SERVE = ("starlette", "uvicorn", "prometheus_client", "llguidance")
MOST_DRAFTED = 8  # tokens per step: behind so many, a draft is hardly ever right


def add_engine(parser: "Parser") -> "argparse._ArgumentGroup":
    """For verbs that run the engine in a process of its own; the group, to which they may add."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--context", type=int, default=0, metavar="N", help="tokens of the longest text (default: the model's)"
    )
    add_decoding(group)
    help = "size of the cache (default: a quarter of the free memory of a CPU, 0.9 of a GPU's)"
    group.add_argument("--cache-gib", type=float, default=0.0, metavar="GIB", help=help)
    help = "requests that run at a time (default %(default)s)"
    group.add_argument("--max-running", type=int, default=256, metavar="N", help=help)
    group.add_argument("--no-prefix-caching", action="store_true", help="do not share computed beginnings of texts")
    help = "the same seed gives the same text whatever else runs: slower kernels (cpu only)"
    group.add_argument("--batch-invariant", action="store_true", help=help)
    help = "under torchrun: groups of processes with requests of their own (data-parallel attention); default 1"
    group.add_argument("--dp", type=int, default=1, metavar="N", help=help)
    group.add_argument(
        "--threads", type=int, default=0, metavar="N", help="of the CPU for the engine (default: torch's)"
    )
    return group


def add_decoding(group: "argparse._ArgumentGroup") -> None:
    """For every verb that generates on the engine."""
    help = "type of the latent cache: auto (the weights'), bfloat16, float32, fp8 (656 bytes a token and layer in V3)"
    group.add_argument("--cache", choices=CACHES, default="auto", metavar="TYPE", help=help)
    help = "tokens that the MTP module drafts per step; the text stays the same (default %(default)s: off)"
    group.add_argument("--speculative-tokens", type=int, default=0, metavar="N", help=help)


def add_format(group: "argparse._ArgumentGroup") -> None:
    """For verbs that answer chats as a server does."""
    help = "name that requests ask for, may be given several times (default: the directory's)"
    group.add_argument("--served-model-name", action="append", default=[], metavar="NAME", help=help)
    formats = ("auto", "v3", "r1", "v3.1", "kimi-k2", "moonlight", "none")
    help = "chat format: %(choices)s; auto goes by the tokenizer, none is for plain completions only"
    group.add_argument("--format", choices=formats, default="auto", metavar="FORMAT", help=help)
    help = "reason first where the format leaves that open and a request does not say"
    group.add_argument("--thinking", action="store_true", help=help)


def need_libraries(verb: str) -> None:
    """Raises UserError where a package of the extra `serve` is missing."""
    from .core.records import library

    for name in SERVE:
        library(name, verb, "'dsv3[serve]'")


def names(args: argparse.Namespace, source: "Source") -> tuple[str, ...]:
    """Under which the model is asked for, its own first."""
    return tuple(args.served_model_name) or (source.directory.name,)


def chat_format(args: argparse.Namespace, source: "Source") -> str | None:
    """None for a model that does not chat. Raises UserError where it was told to."""
    from .conversation import choose_format

    if args.format == "none":
        return None
    try:
        return choose_format(source.tokenizer, source.config, args.format, args.thinking)
    except UserError:
        if args.format != "auto" or args.thinking:
            raise
        return None


def check_drafts(count: int, config: "ModelConfig") -> None:
    """Raises UserError for a --speculative-tokens that cannot be."""
    if not 0 <= count <= MOST_DRAFTED:
        raise UserError(f"--speculative-tokens must be between 0 and {MOST_DRAFTED}")
    if count and not config.num_nextn_predict_layers:
        raise UserError("--speculative-tokens drafts with the MTP module, and this model has none; leave it out")


def engine_options(args: argparse.Namespace, source: "Source", step_ms: float) -> "EngineOptions":
    """What the options say. step_ms: see EngineOptions. Raises UserError for what cannot be, before anything is
    loaded."""
    from .engine_process import EngineOptions

    for name, value in (("--max-running", args.max_running), ("--step-ms", step_ms), ("--dp", args.dp)):
        if value <= 0:
            raise UserError(f"{name} must be above 0")
    check_drafts(args.speculative_tokens, source.config)
    if args.context < 0 or args.cache_gib < 0 or args.threads < 0:
        raise UserError("--context, --cache-gib and --threads must not be negative")
    return EngineOptions(
        directory=str(source.directory),
        name=names(args, source)[0],
        backend=args.backend,
        dtype=args.dtype,
        fp8=args.fp8,
        context=args.context,
        cache=args.cache,
        cache_gib=args.cache_gib,
        requests=args.max_running,
        step_ms=step_ms,
        speculative_tokens=args.speculative_tokens,
        prefix_caching=not args.no_prefix_caching,
        batch_invariant=args.batch_invariant,
        ends=tuple(sorted(source.end_tokens())),
        threads=args.threads,
        dp=args.dp,
    )
