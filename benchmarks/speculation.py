"""Decoding with and without drafts of the MTP module, on the engine: tokens per second, drafts that were right, and
where the time of a step goes.

    OMP_NUM_THREADS=1 python benchmarks/speculation.py MODEL_DIR          # the quickstart's questions, as chats
    OMP_NUM_THREADS=1 python benchmarks/speculation.py MODEL_DIR --text   # the library's own source, to go on with

Each text ends where the model ends it. All numbers of drafts are run in turn in one process, round after round, and the
medians count, after a round that does not.

tokens a step: of one place in the batch, those included that are empty while the last texts end. pass: of the model
over the tokens of a step and their drafts, with its head where the step is replayed; module: the MTP module, its heads
and what it chooses; choice: sampling and verification; rest: the head of other steps, the plan, the tensors of a step
and what is told of it.
"""

import argparse
import json
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from contest import machine
from rich.console import Console
from rich.table import Table

from dsv3 import DeepseekV3
from dsv3.backends import activate
from dsv3.core.encoding import detect_format, encode_chat, stop_token
from dsv3.core.sampling_params import SamplingParams
from dsv3.core.tokenizer import Tokenizer
from dsv3.quickstart.arithmetic import problems
from dsv3.serving import compute
from dsv3.serving.rollout import EngineRollout

# Methods of compute.Computer.
PARTS = {"_forward": "pass", "_replayed": "pass", "_module": "module", "_draft": "module"}
COUNTERS = ("steps", "draft_tokens", "accepted_tokens")  # of messages.Stats
COLUMNS = ("rate", "accepted", "tokens a step", "ms a step", "pass", "module", "choice", "rest")
PROMPT = 64  # tokens of a text to go on with


class Clock:
    """Seconds that each part has taken."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def watched(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - begun

        return timed


@contextmanager
def watching() -> Iterator[Clock]:
    clock, kept = Clock(), [(compute, "choose", compute.choose)]
    kept += [(compute.Computer, name, getattr(compute.Computer, name)) for name in PARTS]
    for owner, name, call in kept:
        setattr(owner, name, clock.watched(call, PARTS.get(name, "choice")))
    try:
        yield clock
    finally:
        for owner, name, call in kept:
            setattr(owner, name, call)


def prompts_of(tokenizer: Tokenizer, text: bool, count: int) -> tuple[list[list[int]], tuple[int, ...]]:
    """Token ids of each prompt, and the ids that end a reply besides the model's own."""
    if text:
        source = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text("utf-8")
        ids = tokenizer.encode(source)
        stride = (len(ids) - PROMPT) // count
        return [[tokenizer.bos_id, *ids[i * stride : i * stride + PROMPT]] for i in range(count)], ()
    format = detect_format(tokenizer)
    chats = [[{"role": "user", "content": problem.question}] for problem in problems(count, True, 0)]
    end = tokenizer.special_id(stop_token(format))
    return [tokenizer.encode_segments(encode_chat(chat, format)) for chat in chats], (end,)


def run(rollout: EngineRollout, prompts: list[list[int]], params: list[SamplingParams], at_once: int) -> dict[str, Any]:
    """All prompts, so many at a time."""
    texts: list[list[int]] = []
    before = {name: getattr(rollout.engine.counted, name) for name in COUNTERS} if rollout.engine else {}
    with watching() as clock:
        begun = time.perf_counter()
        for start in range(0, len(prompts), at_once):
            some = slice(start, start + at_once)
            texts += [completion.token_ids for completion in rollout.generate(prompts[some], params[some])]
        seconds = time.perf_counter() - begun
    counted = {name: getattr(rollout.engine.counted, name) - before.get(name, 0) for name in COUNTERS}
    steps, parts = counted["steps"], {part: clock.seconds.get(part, 0.0) for part in ("pass", "module", "choice")}
    parts["rest"] = seconds - sum(parts.values())
    drafts = counted["draft_tokens"]
    return {
        "rate": sum(map(len, texts)) / seconds,
        "accepted": counted["accepted_tokens"] / drafts if drafts else None,
        "tokens a step": sum(map(len, texts)) / steps / at_once,
        "ms a step": 1e3 * seconds / steps,
        **{part: 1e3 * spent / steps for part, spent in parts.items()},
        "texts": texts,
    }


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way to run."""
    torch.set_num_threads(options.threads)
    activate("cpu")
    model = DeepseekV3.from_pretrained(options.model, dtype=torch.float32)
    model.pack()
    tokenizer = Tokenizer.load(options.model)
    prompts, ends = prompts_of(tokenizer, options.text, options.requests)
    rollouts = {count: EngineRollout(model, speculative_tokens=count) for count in options.drafts}
    rows = []
    for temperature in options.temperatures:
        chosen = [
            SamplingParams(temperature, seed=i, max_tokens=options.tokens, stop_token_ids=ends)
            for i in range(len(prompts))
        ]
        for at_once in options.sequences:
            found: dict[int, list[dict[str, Any]]] = {count: [] for count in rollouts}
            for round in range(-1, options.rounds):  # the first one only warms up
                for count, rollout in rollouts.items():
                    result = run(rollout, prompts, chosen, at_once)
                    if round >= 0:
                        found[count].append(result)
            plain = found[options.drafts[0]]
            for count, results in found.items():
                row = {"temperature": temperature, "sequences": at_once, "drafts": count}
                for column in COLUMNS:
                    values = [result[column] for result in results if result[column] is not None]
                    row[column] = statistics.median(values) if values else None
                row["ratio"] = row["rate"] / statistics.median(result["rate"] for result in plain)
                pairs = zip(results[-1]["texts"], plain[-1]["texts"], strict=True)
                row["same texts"] = f"{sum(mine == theirs for mine, theirs in pairs)}/{len(prompts)}"
                row["tokens"] = statistics.mean(map(len, results[-1]["texts"]))
                rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL_DIR", help="a checkpoint with an MTP module and its tokenizer")
    parser.add_argument("--text", action="store_true", help="plain text instead of questions")
    parser.add_argument("--drafts", type=int, nargs="+", default=[0, 1, 2], help="the first is what others are held to")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8], help="that run at a time")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.6])
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="of a text, at the most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="every figure, for a program to read")
    options = parser.parse_args()
    rows = measure(options)
    if options.json:
        print(json.dumps({"machine": machine(), "rows": rows}))
        return
    headings = {"temperature": "T", "sequences": "seq.", "drafts": "drafts", "rate": "tokens/s", "ratio": "ratio"}
    headings |= {name: name for name in (*COLUMNS[1:], "same texts")}
    table = Table(title=f"{options.requests} texts of {rows[0]['tokens']:.0f} tokens; milliseconds")
    for heading in headings.values():
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in headings))
    Console(width=max(Console().width, 130)).print(table)
    print(f"{options.threads} thread(s), float32; {machine()}")


def _cell(value: float | str | None) -> str:
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
