"""`dsv3 serve` beside `transformers serve`: the same model, the same prompts, the same number of tokens.

    OMP_NUM_THREADS=1 python benchmarks/serve.py MODEL_DIR
    python benchmarks/serve.py MODEL_DIR --clients 1 8 --rounds 5 --json

tokens/s: completion tokens by the servers' own count, greedy, every text to its limit; so many clients send one request
after the other, with prompts that nobody has seen. TTFT: until the first text of a streamed completion arrives, alone,
for a prompt of which nothing is known, and for a second one that begins with the same tokens and ends otherwise.
Both servers run all the time, and are asked in turn; the medians of all rounds count, after one that does not; so for
the ratios, each of which is of one round, so that a machine that is slower for a while tilts none.

transformers serves with and without continuous batching; what does not answer is reported and left out. It needs
fastapi and openai besides what our extras bring.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from contest import machine
from rich.console import Console
from rich.table import Table

PATIENCE = 180.0  # seconds until a server must answer, and for any request
FIRST_TEXT = 8  # tokens of a streamed text: a token alone may be half a character
TAIL = 8  # tokens of a prompt behind the shared ones


@dataclass(frozen=True)
class Side:
    """A server. command: without address and port, which both sides take as --host and --port. options: of a request
    that is to be greedy and of so many tokens, whatever they are."""

    name: str
    command: list[str]
    options: Callable[[int], dict[str, Any]]


def sides(model: Path, dtype: str, threads: int) -> list[Side]:
    def ours(tokens: int) -> dict[str, Any]:
        return {"temperature": 0, "max_tokens": tokens, "ignore_eos": True, "add_special_tokens": False}

    def theirs(tokens: int) -> dict[str, Any]:
        greedy = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": -1}
        return {"generation_config": json.dumps(greedy)}

    scripts = Path(sysconfig.get_path("scripts"))
    serve = [sys.executable, "-m", "dsv3", "serve", str(model), "--backend", "cpu", "--dtype", dtype]
    transformers = [str(scripts / "transformers"), "serve", str(model), "--device", "cpu", "--dtype", dtype]
    return [
        Side("dsv3", [*serve, "--threads", str(threads), "--served-model-name", str(model)], ours),
        Side("transformers", transformers, theirs),
        Side("transformers, continuous batching", [*transformers, "--continuous-batching"], theirs),
    ]


class Service:
    """A server that runs, at `url`."""

    def __init__(self, side: Side, url: str, model: str) -> None:
        self.side, self.model = side, model
        self.client = httpx.AsyncClient(base_url=url, timeout=PATIENCE)

    def _body(self, prompt: str, tokens: int) -> dict[str, Any]:
        return {"model": self.model, "prompt": prompt, **self.side.options(tokens)}

    async def complete(self, prompt: str, tokens: int) -> tuple[int, str]:
        """How many tokens came, and their text."""
        reply = await self.client.post("/v1/completions", json=self._body(prompt, tokens))
        reply.raise_for_status()
        said = reply.json()
        return said["usage"]["completion_tokens"], said["choices"][0]["text"]

    async def first_text(self, prompt: str) -> float:
        """Seconds until a streamed completion says something."""
        body = {**self._body(prompt, FIRST_TEXT), "stream": True}
        first, begun = None, time.perf_counter()
        async with self.client.stream("POST", "/v1/completions", json=body) as reply:
            reply.raise_for_status()
            async for line in reply.aiter_lines():
                if first is None and line.startswith("data: {"):
                    choices = json.loads(line[6:]).get("choices")
                    if choices and choices[0].get("text"):
                        first = time.perf_counter() - begun
        if first is None:
            raise RuntimeError(f"{self.side.name} streamed no text")
        return first

    async def rate(self, prompts: list[list[str]], tokens: int) -> tuple[float, list[str]]:
        """Tokens per second with a client for each list of prompts, and the texts."""

        async def client(mine: list[str]) -> list[tuple[int, str]]:
            return [await self.complete(prompt, tokens) for prompt in mine]

        begun = time.perf_counter()
        replies = [reply for some in await asyncio.gather(*map(client, prompts)) for reply in some]
        seconds = time.perf_counter() - begun
        if {count for count, _ in replies} != {tokens}:
            raise RuntimeError(f"{self.side.name} did not write {tokens} tokens each time")
        return len(replies) * tokens / seconds, [text for _, text in replies]


@contextmanager
def running(side: Side, model: Path, threads: int) -> Iterator[str]:
    """Its URL, once it is healthy."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(threads),
    }
    with tempfile.TemporaryFile() as log:
        command = [*side.command, "--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
            while not healthy(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"{side.name} did not start: {log.read().decode().strip()[-500:]}")
                time.sleep(0.2)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


class Prompts:
    """Pieces of the library's own source by numbers of tokens, no two of them alike."""

    def __init__(self, model: Path) -> None:
        from dsv3.core.tokenizer import Tokenizer

        self.tokenizer = Tokenizer.load(model)
        modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = "".join(path.read_text("utf-8") for path in modules[:60] if path.stat().st_size < 60_000)
        self.tokens, self.draw = self.tokenizer.encode(text), random.Random(0)

    def piece(self, tokens: int) -> str:
        """A text that is encoded to so many tokens again."""
        while True:
            start = self.draw.randrange(len(self.tokens) - tokens)
            text = self.tokenizer.decode(self.tokens[start : start + tokens])
            if len(self.tokenizer.encode(text)) == tokens:
                return text


async def measure(services: list[Service], prompts: Prompts, options: argparse.Namespace) -> dict[str, Any]:
    """Row -> side -> what each round gave; and how many texts are those of our side."""
    rows: dict[str, dict[str, list[float]]] = {}
    same = {service.side.name: [0, 0] for service in services}
    for round in range(-1, options.rounds):  # the first one only warms up
        order = services if round % 2 else services[::-1]

        def keep(row: str, service: Service, value: float, round: int = round) -> None:
            if round >= 0:
                rows.setdefault(row, {}).setdefault(service.side.name, []).append(value)

        for clients in options.clients:
            each = max(2, 4 // clients)
            asked = [[prompts.piece(options.prompt) for _ in range(each)] for _ in range(clients)]
            texts = {}
            for service in order:
                rate, texts[service.side.name] = await service.rate(asked, options.tokens)
                keep(f"tokens/s, {clients} client{'s' * (clients > 1)}", service, rate)
            for name, mine in texts.items():
                same[name][0] += sum(map(str.__eq__, mine, texts[services[0].side.name]))
                same[name][1] += len(mine)
        shared = prompts.piece(options.prefix)
        ends = [prompts.piece(TAIL) for _ in range(2)]
        for service in order:
            for row, end in zip(("first", "second"), ends, strict=True):
                seconds = await service.first_text(shared + end)
                keep(f"TTFT in ms, {row} request", service, 1e3 * seconds)
    return {"rows": rows, "same": same}


def report(found: dict[str, Any], options: argparse.Namespace) -> None:
    rows, same = found["rows"], found["same"]
    names = list(next(iter(rows.values())))
    summary = []
    for row, values in rows.items():
        middle = {name: statistics.median(values[name]) for name in sorted(names, key="dsv3".__ne__)}
        mine, others = values["dsv3"], [theirs for name, theirs in values.items() if name != "dsv3"]
        faster = min if row.startswith("TTFT") else max
        pairs = [ours / faster(theirs) for ours, *theirs in zip(mine, *others, strict=True) if theirs]
        ratio = statistics.median(1 / pair if faster is min else pair for pair in pairs) if pairs else None
        summary.append({"row": row, **middle, "ratio": ratio})
    if options.json:
        print(json.dumps({"machine": machine(), "summary": summary, "rounds": rows, "same texts": same}))
        return
    table = Table(title=f"{options.prompt} tokens in, {options.tokens} out; {options.prefix} shared")
    for heading in ("", *(name for name in summary[0] if name not in ("row", "ratio")), "ratio to their best"):
        table.add_column(heading, justify="right" if heading else "left")
    for cells in summary:
        last = "-" if cells["ratio"] is None else f"{cells['ratio']:.1f}"
        table.add_row(cells["row"], *(f"{v:,.1f}" for k, v in cells.items() if k not in ("row", "ratio")), last)
    Console().print(table)
    for name, (equal, count) in same.items():
        if name != "dsv3":
            print(f"{name}: {equal} of {count} texts are ours")
    print(f"{options.threads} thread(s) each, {options.dtype}; {machine()}")


async def contest(running_ones: list[tuple[Side, str]], options: argparse.Namespace) -> None:
    prompts, services = Prompts(options.model), []
    for side, url in running_ones:
        service = Service(side, url, str(options.model))
        try:
            await service.complete(prompts.piece(options.prompt), 2)
            services.append(service)
        except (httpx.HTTPError, KeyError) as error:
            said = error.response.text if isinstance(error, httpx.HTTPStatusError) else error
            print(f"{side.name}: does not answer: {str(said)[:300]}", file=sys.stderr)
    report(await measure(services, prompts, options), options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="a checkpoint with its tokenizer")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=64, help="of a completion")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--prefix", type=int, default=1000, help="tokens that two prompts share, for TTFT")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=1, help="of a server")
    parser.add_argument("--json", action="store_true", help="every figure, for a program to read")
    options = parser.parse_args()
    options.model = options.model.resolve()
    with ExitStack() as stack:
        started = []
        for side in sides(options.model, options.dtype, options.threads):
            try:
                started.append((side, stack.enter_context(running(side, options.model, options.threads))))
            except RuntimeError as error:
                print(error, file=sys.stderr)
        asyncio.run(contest(started, options))


if __name__ == "__main__":
    main()
