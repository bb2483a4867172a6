"""The options of `dsv3 bench`; the modules of bench/ do what they say. Nothing here needs torch."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .cli import Verbs


def add_bench(verbs: "Verbs") -> None:
    from .cli import add_json

    help = "Time the ops on this machine, tune their kernels, or compile them for GPUs that are not here."
    parser = verbs.add("bench", "bench.ops:run", help)
    parser.add_argument("what", choices=("ops",), metavar="WHAT", help="%(choices)s")
    help = "only these ops, by commas (default: all that have a workload)"
    parser.add_argument("--ops", default="", metavar="NAMES", help=help)
    parser.add_argument("--first", action="store_true", help="only the first workload of each op")
    help = "most seconds that one call may be expected to take; longer ones are left out (default %(default)s)"
    parser.add_argument("--longest", type=float, default=1.0, metavar="S", help=help)
    mode = parser.add_mutually_exclusive_group()
    help = "search for faster tiles on this GPU, and write them into the table of its chip"
    mode.add_argument("--tune", action="store_true", help=help)
    help = "compile the Triton kernels ahead of time instead, and say what they use; needs no GPU"
    mode.add_argument("--compile", action="store_true", help=help)
    help = "with --compile: for these chips, by commas (default: all that there are tables for)"
    parser.add_argument("--chips", default="", metavar="NAMES", help=help)
    help = "with --compile: write the page about all kernels to this file"
    parser.add_argument("--page", metavar="FILE", help=help)
    add_json(parser)
