"""The command line: `dsv3 VERB [--backend NAME] ...`.

A verb is one function here, which names its options and the function that runs it. What runs it is imported only then,
so help and errors do not wait for torch. A verb returns nothing or an exit code.

Errors of the user (`UserError`) are one line on stderr and exit code 2; Ctrl-C is exit code 130.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NoReturn

from . import __version__
from .batch_verb import add_batch
from .bench_verb import add_bench
from .engine_args import add_decoding
from .errors import UserError
from .eval_verb import add_eval
from .plan_verb import add_plan
from .serve_verb import add_serve

INTERRUPTED, BROKEN_PIPE = 130, 141  # as a shell reports death by SIGINT and SIGPIPE


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, and a suggestion for a misspelt word."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            close = difflib.get_close_matches(str(value), choices, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(choices)}"
            raise UserError(f"unknown {action.metavar or action.dest} {value!r}; {hint}")


class Verbs:
    """Where the verbs below add themselves."""

    def __init__(self, parser: Parser):
        self._subparsers = parser.add_subparsers(metavar="verb", parser_class=Parser)

    def add(self, name: str, run: str, help: str) -> Parser:
        """run: "module:function" within the package, called with the parsed arguments."""
        parser: Parser = self._subparsers.add_parser(name, help=help, description=help)
        _add_backend(parser, default=argparse.SUPPRESS)  # keeps what was said before the verb
        parser.set_defaults(run=run)
        return parser


def _add_backend(parser: Parser, default: str) -> None:
    parser.add_argument(
        "--backend",
        default=default,
        metavar="NAME",
        help="auto (the default), cpu, cpu-invariant, cuda, rocm, ascend, or one that another package registers",
    )


def add_json(parser: Parser) -> None:
    """For verbs that report."""
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def add_doctor(verbs: Verbs) -> None:
    help = "Say what this machine has, and which backends and kernels can run on it."
    parser = verbs.add("doctor", "doctor:run", help)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a preset or a model directory: describe it instead")
    parser.add_argument("--ops", action="store_true", help="for every op, the backend's kernels in the order tried")
    add_json(parser)


def add_pretrained(parser: Parser) -> None:
    """For verbs that run a model with its weights and its tokenizer."""
    help = "a directory in the Hugging Face format, or OWNER/NAME on the hub together with --revision"
    parser.add_argument("model", metavar="MODEL", help=help)
    help = "commit (which stays the same), tag or branch of a model on the hub; its files are fetched, never its code"
    parser.add_argument("--revision", metavar="COMMIT", help=help)
    help = "compute and hold weights in this precision instead of the checkpoint's: %(choices)s"
    dtypes = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtype", choices=dtypes, metavar="DTYPE", help=help)
    help = "keep FP8 weights as they are (the default), or dequantize them on load"
    parser.add_argument("--fp8", choices=("keep", "dequantize"), default="keep", metavar="HOW", help=help)


def add_sampling(parser: Parser, max_tokens: int) -> None:
    group = parser.add_argument_group("sampling")
    help = "most tokens of a text (default %(default)s); the context is a limit too"
    group.add_argument("--max-tokens", type=int, default=max_tokens, metavar="N", help=help)
    help = "0 takes the likeliest token, always (default %(default)s)"
    group.add_argument("--temperature", type=float, default=0.6, metavar="T", help=help)
    help = "choose among the likeliest tokens that hold this much probability (default %(default)s; 1 is off)"
    group.add_argument("--top-p", type=float, default=0.95, metavar="P", help=help)
    help = "choose among the K likeliest tokens (default %(default)s: off)"
    group.add_argument("--top-k", type=int, default=0, metavar="K", help=help)
    help = "leave out tokens less likely than P times the likeliest (default %(default)s: off)"
    group.add_argument("--min-p", type=float, default=0.0, metavar="P", help=help)
    group.add_argument("--seed", type=int, metavar="S", help="the same seed gives the same text; drawn if left out")
    help = "end before this text; may be given several times"
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help=help)


def add_generate(verbs: Verbs) -> None:
    parser = verbs.add("generate", "generate_verb:run", "Let a model go on with a text.")
    add_pretrained(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the beginning; may be empty")
    prompt.add_argument("--prompt-file", metavar="FILE", help="the beginning from a UTF-8 file; - is standard input")
    help = "how many samples; the first has the seed S, the second S + 1, ... (default 1)"
    parser.add_argument("-n", dest="samples", type=int, default=1, metavar="SAMPLES", help=help)
    add_sampling(parser, max_tokens=256)
    add_decoding(parser.add_argument_group("engine"))
    help = "print a JSON object per sample, one a line: text, token_ids, logprobs, finish_reason, seed"
    parser.add_argument("--json", action="store_true", help=help)


def add_chat(verbs: Verbs) -> None:
    help = "Talk to a model; with standard input from a file or pipe, answer every line of it."
    parser = verbs.add("chat", "chat:run", help)
    add_pretrained(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    formats = ("auto", "v3", "r1", "v3.1", "kimi-k2", "moonlight")
    help = "chat format: %(choices)s; auto, the default, goes by the tokenizer's control tokens and chat template"
    parser.add_argument("--format", choices=formats, default="auto", metavar="FORMAT", help=help)
    help = "let the model reason before it answers, where the format leaves that open (v3.1)"
    parser.add_argument("--thinking", action="store_true", help=help)
    help = "draw K replies to each message and show the one whose final answer most of them give; for short answers"
    parser.add_argument("--verify", type=int, default=1, metavar="K", help=help)
    add_sampling(parser, max_tokens=4096)
    add_decoding(parser.add_argument_group("engine"))


def add_quickstart(verbs: Verbs) -> None:
    help = "Train a small DeepSeek-V3 on the text and code of this machine, and show what it writes."
    parser = verbs.add("quickstart", "quickstart.stages:run", help)
    help = "folder for all that it leaves (default %(default)s); a run that was interrupted there goes on"
    parser.add_argument("--out", default="runs/quickstart", metavar="DIR", help=help)
    parser.add_argument("--seed", type=int, metavar="S", help="another seed gives another model (default 0)")
    help = "data-parallel processes (default: two where there are two cores, one on a GPU)"
    parser.add_argument("--processes", type=int, metavar="N", help=help)
    add_json(parser)


def add_train(verbs: Verbs) -> None:
    parser = verbs.add("train", "training.verbs:run", "Train a model. Under torchrun, on several processes.")
    parser.add_argument(
        "stage", choices=("pretrain", "sft", "grpo", "distill", "r1"), metavar="STAGE", help="%(choices)s"
    )
    parser.add_argument("config", metavar="CONFIG", help="a TOML file, or the name of a shipped one")
    help = "settings over those of the file, such as optim.lr=1e-3"
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=help)
    parser.add_argument("--dump-config", action="store_true", help="print the resolved settings as TOML and stop")


def add_data(verbs: Verbs) -> None:
    parser = verbs.add("data", "training.data.recipe:run", "Turn folders of text into shards of tokens for training.")
    parser.add_argument("action", choices=("prepare",), metavar="ACTION", help="%(choices)s")
    parser.add_argument("recipe", metavar="RECIPE", help="a TOML file, or the name of a shipped one")
    help = "settings over those of the file, such as out=data/mine"
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=help)
    parser.add_argument("--dump-config", action="store_true", help="print the resolved settings as TOML and stop")
    add_json(parser)


VERBS: tuple[Callable[[Verbs], None], ...] = (
    add_quickstart,
    add_data,
    add_train,
    add_eval,
    add_doctor,
    add_bench,
    add_plan,
    add_generate,
    add_chat,
    add_serve,
    add_batch,
)


def build_parser() -> Parser:
    parser = Parser(prog="dsv3", description="DeepSeek-V3 and R1, whole and portable.")
    parser.add_argument("--version", action="version", version=f"dsv3 {__version__}")
    _add_backend(parser, default="auto")
    verbs = Verbs(parser)
    for add in VERBS:
        add(verbs)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    # torch_npu without CANN breaks `import torch` unless told before; the ascend backend imports it itself.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    try:
        code = _run(argv)
        sys.stdout.flush()
    except UserError as error:
        print(f"dsv3: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dsv3: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has gone. What is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return code


def _engine_rollout(*args: Any) -> Any:
    """Everything that generates on the command line does so on the serving engine."""
    return import_module(".serving.rollout", __package__).EngineRollout(*args)


def _run(argv: Sequence[str] | None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    if "run" not in args:
        parser.print_help(sys.stderr)
        return 2
    import_module(".backends", __package__)  # so that `activate_backend` knows them: the wings below do not
    import_module(".core.generate", __package__).generate_with(_engine_rollout)
    module, function = args.run.split(":")
    return getattr(import_module(f".{module}", __package__), function)(args) or 0
