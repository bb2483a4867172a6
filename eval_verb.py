"""The options of `dsv3 eval`; `eval_run.py` does what they say. Nothing here needs torch."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cli import Verbs


class _List(argparse.Action):
    """Prints the tasks and ends, as --help does: no model is needed."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from .evaluation.listing import lines

        print("\n".join(lines()))
        parser.exit()


def add_eval(verbs: "Verbs") -> None:
    from .cli import add_json, add_pretrained

    parser = verbs.add("eval", "eval_run:run", "Measure a model on benchmarks, beside the published numbers.")
    add_pretrained(parser)
    parser.epilog = "MODEL may also be the URL of a server with OpenAI's API, such as http://localhost:8000/v1."
    help = "print the tasks, the files that they read and the protocols, and stop"
    parser.add_argument("--list", action=_List, nargs=0, help=help)
    what = parser.add_argument_group("what is measured")
    help = "tasks, by commas; lm:NAME is a task of lm-eval's, another name one of your own data"
    what.add_argument("--tasks", default="", metavar="NAMES", help=help)
    help = "the rows of a published table whose data is there: v3-paper, r1-paper"
    what.add_argument("--suite", metavar="NAME", help=help)
    help = "bits per byte of a text, or of all texts in a folder; may be given several times"
    what.add_argument("--perplexity", action="append", default=[], metavar="PATH", help=help)
    help = "folder of data sets, each under its task's name, or TASK=PATH; may be given several times"
    what.add_argument("--data", action="append", default=[], metavar="WHERE", help=help)
    help = "folder of task files of your own for lm-eval"
    what.add_argument("--harness-path", metavar="DIR", help=help)
    help = "lengths of the needle's texts in tokens, by commas (default: the context, halved down to 128)"
    what.add_argument("--lengths", metavar="TOKENS", help=help)
    help = "of tasks with thoughts, also compare first and final answers, and with thoughts cut short or begun wrong"
    what.add_argument("--reflection", action="store_true", help=help)
    help = "look for the items in training texts: a file or folder; may be given several times"
    what.add_argument("--contamination", action="append", default=[], metavar="CORPUS", help=help)
    how = parser.add_argument_group("how")
    help = (
        "how the reports ask: base, v3, r1, or greedy (default: base without chat tokens, r1 for models that think, "
        "else v3)"
    )
    how.add_argument("--protocol", metavar="NAME", help=help)
    how.add_argument("--samples", type=int, metavar="K", help="replies to every item, instead of the protocol's")
    how.add_argument("--max-tokens", type=int, metavar="N", help="most tokens of a reply, instead of the protocol's")
    how.add_argument("--shots", type=int, metavar="N", help="examples that base models see, instead of the task's")
    how.add_argument("--limit", type=int, metavar="N", help="ask only N items of each task, drawn by the seed")
    how.add_argument("--seed", type=int, default=0, metavar="S", help="of samples, shots and --limit (default 0)")
    how.add_argument("--batch", type=int, default=64, metavar="N", help="replies at a time (default %(default)s)")
    help = "run generated programs even where this machine has no sandbox for them"
    how.add_argument("--unsafe", action="store_true", help=help)
    help = "folder of replies and report; the same command there goes on (default runs/eval/MODEL)"
    how.add_argument("--out", metavar="DIR", help=help)
    server = parser.add_argument_group("where MODEL is a server")
    server.add_argument("--name", metavar="NAME", help="the model's name there")
    server.add_argument("--api-key-env", default="", metavar="VARIABLE", help="environment variable that holds the key")
    server.add_argument("--context", type=int, metavar="TOKENS", help="the context of the model there")
    server.add_argument("--devices", type=int, metavar="N", help="GPUs that serve it, for the GPU-hours")
    server.add_argument("--concurrency", type=int, default=16, metavar="N", help="requests at a time (default 16)")
    server.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds a reply may take (600)")
    server.add_argument("--retries", type=int, default=6, metavar="N", help="tries after the first (default 6)")
    server.add_argument("--body", metavar="JSON", help="fields for the body of every request")
    add_json(parser)
