"""`dsv3 plan --serve`: what a model needs on a node, and how its users would fare; from data sheets, not from runs."""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .core.config import ModelConfig
from .errors import UserError
from .serving.nodes import Node
from .serving.roofline import Chunk, Layout, Roofline, ideal_layout, mesh_layout
from .serving.scheduler import Limits
from .serving.simulate import Outcome, Simulation, poisson

CONTEXT = 131072
CHUNK = 2048  # tokens of a step: the budget that `cost` does better than
OUTPUT = 256  # tokens that the long prompt of a simulation is answered with
REQUESTS = 200
WIDTH = 120  # columns that the tables need
NOT_INCLUDED = (
    "communication between devices and launches (--assume overhead-ms=MS adds them to every step), sampling, MTP "
    "modules and speculation, experts and sequences that are spread unevenly"
)


def run(args: argparse.Namespace) -> None:
    if not args.serve:
        raise UserError("dsv3 plan: say what is to be planned: --serve")
    config = ModelConfig.from_pretrained(args.model)
    node = Node.parse(args.node, args.assume)
    context = _context(args.context, config)
    sequences = args.sequences if args.sequences is not None else node.count
    if sequences < 1:
        raise UserError(f"--sequences must be at least 1, got {sequences}")
    if args.plot and not args.simulate:
        raise UserError("--plot draws a simulation: give --simulate, too")
    rooflines = [Roofline(config, node, layout, args.weights, args.cache) for layout in _layouts(config, node, args)]
    report = describe(args.model, rooflines, context, sequences)
    outcomes = _simulate(args, rooflines, context, sequences, report) if args.simulate else {}
    if outcomes and args.plot:
        from .serving.plots import draw

        draw(outcomes, args.plot, _title(report))
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
        if outcomes and args.plot:
            print(f"picture: {Path(args.plot)}")


def _context(given: int | None, config: ModelConfig) -> int:
    most = config.max_position_embeddings
    context = min(CONTEXT, most) if given is None else given
    if not 2 <= context <= most:
        raise UserError(f"--context must be from 2 to the model's {most} tokens, got {context}")
    return context


def _layouts(config: ModelConfig, node: Node, args: argparse.Namespace) -> Iterator[Layout]:
    """The bound, and every mesh that the model divides over."""
    yield ideal_layout(config, node.count, args.weights)
    errors = []
    for tp in range(node.count, 0, -1):
        if node.count % tp == 0:
            try:
                yield mesh_layout(config, tp, node.count // tp, args.weights)
            except UserError as error:
                errors.append(error)
    if len(errors) == sum(node.count % tp == 0 for tp in range(1, node.count + 1)):
        raise errors[-1]


# --- the report ---


def describe(model: str, rooflines: list[Roofline], context: int, sequences: int) -> dict[str, Any]:
    first = rooflines[0]
    node, device = first.node, first.node.device
    needs = min(r.layout.held.total for r in rooflines[1:]) + node.reserve
    return {
        "model": model,
        "node": node.name,
        "context": context,
        "sequences": sequences,
        "weights": first.weights,
        "cache": first.cache,
        "assumptions": {
            "memory_gb": device.memory / 1e9,
            "bandwidth_tbs": device.bandwidth / 1e12,
            "tflops": device.flops / 1e12,
            "products": node.products,
            "attention": node.attention,
            "reserve_gb": node.reserve / 1e9,
            "overhead_ms": node.overhead * 1e3,
            "eight_bit": device.eight_bit,
            "source": device.source,
            "touched_experts": first.touched(sequences),
            "break_even": first.break_even if first.break_even < CONTEXT else None,
        },
        "not_included": NOT_INCLUDED,
        "parameters": first.parameters,
        "active_parameters": first.active_parameters,
        "weights_gb": {name: size * node.count / 1e9 for name, size in vars(first.layout.held).items()},
        "latent_bytes_per_token": first.latent_bytes,
        "latent_gb_per_sequence": first.latent_bytes * context / 1e9,
        "attention_tflop_per_token": first.absorbed_flops * context / 1e12,
        "fits": any(r.free >= 0 for r in rooflines[1:]),
        "needs_gb": needs / 1e9,
        "layouts": [_describe_layout(roofline, context, sequences) for roofline in rooflines],
    }


def _describe_layout(roofline: Roofline, context: int, sequences: int) -> dict[str, Any]:
    """Times in ms, but for prefill in s; None where the memory does not suffice."""
    fit = roofline.sequences(context)
    chunk = min(CHUNK, context)
    bill = roofline.bill(context - chunk, chunk)
    return {
        "layout": roofline.layout.name,
        "weights_gb": roofline.layout.held.total / 1e9,
        "free_gb": roofline.free / 1e9,
        "sequences": fit,
        "tpot_one_ms": 1e3 * roofline.decode(1, context) if fit else None,
        "tpot_ms": 1e3 * roofline.decode(sequences, context) if fit >= sequences else None,
        "prefill_s": roofline.prefill(context) if fit else None,
        "first_chunk_ms": 1e3 * roofline.step([Chunk(0, chunk)]) if fit else None,
        "last_chunk_ms": {name: 1e3 * value for name, value in vars(bill).items()} if fit else None,
        "cost_model": dataclasses.asdict(roofline.cost_model(min(sequences, max(fit, 1)), context)) if fit else None,
    }


def _title(report: dict[str, Any]) -> str:
    return f"{report['model']} on {report['node']}, weights {report['weights']}, cache {report['cache']}"


def show(report: dict[str, Any]) -> None:
    console, context = Console(highlight=False, soft_wrap=True), report["context"]
    console.width = max(console.width, WIDTH)
    assumed, sizes = report["assumptions"], report["weights_gb"]
    console.print(f"[bold]{_title(report)}[/bold]")
    parts = ", ".join(f"{name.replace('_', ' ')} {size:.1f}" for name, size in sizes.items())
    console.print(f"{report['parameters']:,} parameters, {report['active_parameters']:,} active, without MTP modules")
    console.print(f"weights {sum(sizes.values()):.1f} GB: {parts}")
    console.print(
        f"latents {report['latent_bytes_per_token']:,} bytes a token, {report['latent_gb_per_sequence']:.2f} GB a "
        f"sequence of {context:,}; attention {report['attention_tflop_per_token']:.3g} TFLOP a token behind it"
    )
    console.print(_table(report))
    if not report["fits"]:
        console.print(
            f"[bold]does not fit: needs {report['needs_gb']:.1f} GB a device, has {assumed['memory_gb']:.1f} GB[/bold]"
            "; take more devices or larger ones" + (" or --weights fp8" if report["weights"] == "bf16" else "")
        )
    elif all(row["sequences"] < report["sequences"] for row in report["layouts"][1:]):
        most = max(row["sequences"] for row in report["layouts"][1:])
        console.print(f"[bold]{report['sequences']} sequences of {context:,} tokens do not fit: {most} do[/bold]")
    for line in _assumptions(report):
        console.print(line)
    if "simulation" in report:
        console.print(_simulation_table(report["simulation"]))


def _table(report: dict[str, Any]) -> Table:
    count, context = report["sequences"], f"{report['context']:,}"
    table = Table(box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("layout", no_wrap=True)
    for name in (
        "weights\nGB", "free\nGB", f"sequences\nof {context}", "1 decodes\nms a token", f"{count} decode\nms a token",
        "prefill\ns", "first\nchunk, ms", "last\nchunk, ms", "expansion\nin it, ms",
    ):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    for row in report["layouts"]:
        last = row["last_chunk_ms"]
        cells = (
            row["tpot_one_ms"], row["tpot_ms"], row["prefill_s"], row["first_chunk_ms"],
            sum(last.values()) if last else None, last["expansion"] if last else None,
        )  # fmt: skip
        fit = f"{row['sequences']}" if row["free_gb"] >= 0 else "no room"
        sizes = f"{row['weights_gb']:.1f}", f"{max(row['free_gb'], 0.0):.1f}"
        table.add_row(row["layout"], *sizes, fit, *map(_number, cells))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _assumptions(report: dict[str, Any]) -> Iterator[str]:
    assumed = report["assumptions"]
    yield (
        f"device: {assumed['memory_gb']:g} GB, {assumed['bandwidth_tbs']:g} TB/s, {assumed['tflops']:g} dense bfloat16 "
        f"TFLOP/s ({assumed['source']}); {assumed['reserve_gb']:g} GB are kept for activations and graphs"
    )
    yield (
        f"assumed: products and expanded attention reach {assumed['products']:.0%} of that peak, also with "
        f"{assumed['eight_bit']} weights, attention in latent space {assumed['attention']:.0%}; "
        f"{assumed['overhead_ms']:g} ms of overhead a step"
    )
    yield (
        f"assumed: {report['sequences']} tokens touch {assumed['touched_experts']:.1f} experts of a layer, by "
        "independent and even choices; only those are read"
    )
    if assumed["break_even"] is not None:
        yield (
            f"assumed: chunks of up to {assumed['break_even']:.0f} tokens attend in latent space, larger ones expand "
            "the latents before them once more, whichever is cheaper"
        )
    yield f"GB are of a device; chunks are of {CHUNK:,} tokens, the last one that of a full context in expanded form"
    yield "all sharded: a bound, latents cut over all devices; tp N: N devices hold the same latents and share heads"
    yield f"not included: {report['not_included']}"


# --- the simulation ---


def _simulate(
    args: argparse.Namespace, rooflines: list[Roofline], context: int, sequences: int, report: dict[str, Any]
) -> dict[str, Outcome]:
    """Under the cost budget and under a fixed number of tokens; nothing, and a reason in the report, without room."""
    wanted = sequences + (args.rate is None)
    roofline = _choose(args.tp, rooflines, context, wanted)
    if roofline is None:
        report["simulation"] = {"why_not": f"no layout has room for {wanted} sequences of {context:,} tokens"}
        return {}
    if args.step_ms <= 0 or (args.rate is not None and args.rate <= 0) or min(args.prompt, args.output) < 1:
        raise UserError("--step-ms, --rate, --prompt and --output must be above 0")
    running = max(256, sequences)
    budgets = {
        f"at most {args.step_ms:g} ms a step": Limits(running, Limits.tokens, args.step_ms / 1e3),
        f"at most {CHUNK:,} tokens a step": Limits(running, CHUNK, float("inf")),
    }
    outcomes = {}
    for name, limits in budgets.items():
        simulation = Simulation(roofline, context, sequences, limits)
        if args.rate is None:
            reply = max(min(OUTPUT, context // 4), 1)
            outcomes[name] = simulation.beside_a_prompt(sequences, context, context - reply, reply)
        else:
            arrivals = poisson(args.rate, REQUESTS, args.prompt, args.output, context)
            outcomes[name] = simulation.open_loop(arrivals)
    report["simulation"] = {
        "layout": roofline.layout.name,
        "traffic": f"{sequences} sequences decode while a prompt of {context - reply:,} tokens comes in"
        if args.rate is None
        else f"{REQUESTS} requests, {args.rate:g} a second, about {args.prompt:,} + {args.output:,} tokens each",
        "outcomes": {name: outcome.report() for name, outcome in outcomes.items()},
    }
    return outcomes


def _choose(tp: int | None, rooflines: list[Roofline], context: int, wanted: int) -> Roofline | None:
    """Of the meshes, the one of this tp; else the one with the largest that has room, as prefill is fastest there."""
    meshes = rooflines[1:]
    if tp is not None:
        meshes = [roofline for roofline in meshes if roofline.layout.group == tp]
        if not meshes:
            known = ", ".join(str(roofline.layout.group) for roofline in rooflines[1:])
            raise UserError(f"--tp {tp} does not divide this node and model; {known} do")
    return next((roofline for roofline in meshes if roofline.sequences(context) >= wanted), None)


def _simulation_table(simulation: dict[str, Any]) -> Table | str:
    if "why_not" in simulation:
        return f"[bold]no simulation: {simulation['why_not']}[/bold]"
    table = Table(
        box=SIMPLE_HEAD, title=f"simulated on {simulation['layout']}: {simulation['traffic']}", title_justify="left",
        title_style="bold", pad_edge=False,
    )  # fmt: skip
    table.add_column("")
    for name in simulation["outcomes"]:
        table.add_column(name, justify="right")
    rows = {
        "between two tokens, p50, ms": "itl_p50_ms", "between two tokens, p99, ms": "itl_p99_ms",
        "between two tokens, most, ms": "itl_max_ms", "per token of a reply, p50, ms": "tpot_p50_ms",
        "per token of a reply, p99, ms": "tpot_p99_ms", "to the first token, p50, ms": "ttft_p50_ms",
        "to the first token, p99, ms": "ttft_p99_ms", "output tokens/s": "output_tokens_per_s",
        "prompt tokens/s": "prompt_tokens_per_s",
    }  # fmt: skip
    for label, key in rows.items():
        cells = [outcome.get(key) for outcome in simulation["outcomes"].values()]
        table.add_row(label, *map(_number, cells))
    return table
