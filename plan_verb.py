"""The options of `dsv3 plan`; `plan_serve.py` does what they say. Nothing here needs torch."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .cli import Verbs


def add_plan(verbs: "Verbs") -> None:
    from .cli import add_json

    parser = verbs.add("plan", "plan_serve:run", "Reckon what a model needs on a node, before there is one.")
    parser.add_argument("--serve", action="store_true", help="plan serving: memory, time per token, prefill")
    parser.add_argument("--model", required=True, metavar="MODEL", help="a preset or a model directory")
    parser.add_argument("--node", required=True, metavar="NODE", help="COUNTxDEVICE: 8xh200, 8xmi300x, 16x910c")
    help = "tokens of every sequence (default 131072, or the model's limit where that is less)"
    parser.add_argument("--context", type=int, metavar="TOKENS", help=help)
    help = "that decode at the same time (default: as many as there are devices)"
    parser.add_argument("--sequences", type=int, metavar="N", help=help)
    help = "precision of the weights: fp8 (the default) or bf16"
    parser.add_argument("--weights", choices=("fp8", "bf16"), default="fp8", metavar="HOW", help=help)
    help = "precision of the latent cache: bf16 (the default) or fp8"
    parser.add_argument("--cache", choices=("bf16", "fp8"), default="bf16", metavar="HOW", help=help)
    help = (
        "another number for the node: memory-gb, bandwidth-tbs, tflops and reserve-gb of a device; products and "
        "attention, parts of the peak; overhead-ms of every step; may be given several times"
    )
    parser.add_argument("--assume", action="append", default=[], metavar="NAME=NUMBER", help=help)
    add_json(parser)
    simulation = parser.add_argument_group("simulation of the engine and its scheduler")
    help = "let the sequences decode while a prompt of the same length comes in"
    simulation.add_argument("--simulate", action="store_true", help=help)
    help = "devices that share out attention (default: the most that leave room for all sequences and the prompt)"
    simulation.add_argument("--tp", type=int, metavar="N", help=help)
    help = "time that a step may take while requests decode (default %(default)s)"
    simulation.add_argument("--step-ms", type=float, default=50.0, metavar="MS", help=help)
    help = "requests that come at random instead, so many a second, 200 in all"
    simulation.add_argument("--rate", type=float, metavar="R", help=help)
    help = "with --rate: mean tokens of a prompt (default %(default)s)"
    simulation.add_argument("--prompt", type=int, default=4096, metavar="TOKENS", help=help)
    help = "with --rate: mean tokens of a reply (default %(default)s)"
    simulation.add_argument("--output", type=int, default=512, metavar="TOKENS", help=help)
    help = "draw the time between tokens, beside that with a fixed number of tokens a step, into this PNG"
    simulation.add_argument("--plot", metavar="FILE", help=help)
