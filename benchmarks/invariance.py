"""What batch invariance costs on the CPU, and what it saves from: backend cpu-invariant beside cpu.

    python benchmarks/invariance.py                      # dsv3-2m, float32 and bfloat16
    python benchmarks/invariance.py --model dsv3-15m --completions 32
    python benchmarks/invariance.py --model runs/quickstart/pretrain/model

Speed: decoding with one sequence and with eight, and a prompt of 512 tokens. On cpu-invariant every token of the prompt
attends in absorbed form as a sequence of its own, as an invariant engine has it; on cpu keys and values are expanded.
Divergence: of the completions that are sampled at temperature 1, each with a seed of its own, the share whose tokens
are not the same when they are computed one at a time and eight at a time.
A preset gets random weights, of a size that makes its guesses as sure as those of a trained model.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from contest import contest, machine
from torch import Tensor

BACKENDS, PRECISIONS = ("cpu", "cpu-invariant"), {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCH, PROMPT, CONTEXT = 8, 512, 128
STD = 0.08  # of random weights
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def load(options: argparse.Namespace, backend: str, dtype: torch.dtype) -> torch.nn.Module:
    from dsv3 import DeepseekV3, ModelConfig
    from dsv3.backends import activate

    activate(backend)
    if Path(options.model).is_dir():
        return DeepseekV3.from_pretrained(options.model, backend=backend, dtype=dtype).eval()
    model = DeepseekV3(ModelConfig.from_pretrained(options.model))
    model.init_weights(STD, seed=0)
    return model.to(dtype).eval()


class Sequences:
    """Sequences in a paged cache, each at pages of its own."""

    def __init__(self, model: torch.nn.Module, count: int, length: int, posing: bool):
        from dsv3.core.cache import PagedCache

        self.model, self.posing, self.known = model, posing, [0] * count
        each = -(-length // 64)
        self.cache = PagedCache(model.config, count * each, next(model.parameters()).dtype)
        self.pages = [list(range(i * each, (i + 1) * each)) for i in range(count)]

    def feed(self, tokens: Tensor) -> Tensor:
        """tokens i64 [B, n] -> logits of the last of each [B, V]."""
        B, n = tokens.shape
        if self.posing:
            pages = [owned for owned in self.pages for _ in range(n)]
            known, new = [old + i for old in self.known for i in range(n)], [1] * (B * n)
        else:
            pages, known, new = self.pages, self.known, [n] * B
        step = self.cache.step(pages, known, new, absorbed=self.posing or n == 1)
        places = torch.cat([torch.arange(old, old + n) for old in self.known])
        ends = torch.cat([torch.zeros(1, dtype=torch.long), torch.tensor(new).cumsum(0)]).int()
        hidden = self.model(tokens.flatten(), ends, step, positions=places, logits="none").hidden
        self.known = [old + n for old in self.known]
        return self.model.head(hidden.view(B, n, -1)[:, -1])


def seconds(call: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = clock()
        call()
        times.append(clock() - start)
    return min(times)


def speeds(model: torch.nn.Module, posing: bool, clock: Callable[[], float]) -> dict[str, float]:
    """Tokens a second."""
    vocabulary = model.config.vocab_size
    found = {}
    for count in (1, BATCH):
        sequences = Sequences(model, count, CONTEXT + 64, posing)
        sequences.feed(torch.randint(0, vocabulary, (count, CONTEXT)))
        token = torch.zeros(count, 1, dtype=torch.long)
        found[f"decode_{count}"] = count / seconds(partial(sequences.feed, token), 48, clock)
    prompt = torch.randint(0, vocabulary, (1, PROMPT))
    found["prefill"] = PROMPT / seconds(lambda: Sequences(model, 1, PROMPT, posing).feed(prompt), 4, clock)
    return found


def completions(model: torch.nn.Module, prompts: Tensor, seeds: Tensor, length: int, posing: bool) -> Tensor:
    """prompts i64 [B, n], seeds i64 [B] -> sampled tokens [B, length]."""
    from dsv3.ops.sampling import sample

    B, n = prompts.shape
    sequences, tokens, chosen = Sequences(model, B, n + length, posing), prompts, []
    ones, zeros = torch.ones(B), torch.zeros(B)
    for place in range(n, n + length):
        logits = sequences.feed(tokens).float()
        token, _ = sample(logits, ones, zeros.int(), ones, zeros, seeds, torch.full((B,), place))
        chosen.append(token)
        tokens = token[:, None]
    return torch.stack(chosen, 1)


def divergence(model: torch.nn.Module, posing: bool, count: int, length: int) -> float:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, model.config.vocab_size, (count, 16), generator=generator)
    seeds = torch.arange(count)

    def by(batch: int) -> Tensor:
        groups = zip(prompts.split(batch), seeds.split(batch), strict=True)
        return torch.cat([completions(model, *group, length, posing) for group in groups])

    return (by(1) != by(BATCH)).any(1).float().mean().item()


def run(name: str, options: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(options.threads)
    backend, precision = name.rsplit("-", 1)
    posing = backend != "cpu"
    with torch.inference_mode():
        model = load(options, backend, PRECISIONS[precision])
        found = speeds(model, posing, CLOCKS[options.clock])
        diverged = divergence(model, posing, options.completions, options.length)
    return {"rate": found["decode_1"], **found, "diverged": diverged}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="dsv3-2m", help="a preset or a directory")
    parser.add_argument("--completions", type=int, default=64)
    parser.add_argument("--length", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: with one thread, on a busy machine")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(run(options.only, options)))
        return
    names = [f"{backend}-{precision}" for precision in PRECISIONS for backend in BACKENDS]
    arguments = []
    for key in ("model", "completions", "length", "threads", "clock"):
        arguments += [f"--{key}", str(getattr(options, key))]
    best = contest(__file__, names, options.rounds, arguments)
    print(f"| backend | decode, 1 | decode, {BATCH} | prefill, {PROMPT} | diverged |\n|---|---|---|---|---|")
    for name, result in best.items():
        rates = " | ".join(f"{result[key]:,.0f}" for key in ("decode_1", f"decode_{BATCH}", "prefill"))
        print(f"| {name} | {rates} | {100 * result['diverged']:.1f} % |")
    for precision in PRECISIONS:
        plain, invariant = (best.get(f"{backend}-{precision}") for backend in BACKENDS)
        if plain and invariant:
            ratios = (f"{key} {invariant[key] / plain[key]:.2f}" for key in ("decode_1", f"decode_{BATCH}", "prefill"))
            print(f"cpu-invariant over cpu, {precision}: {', '.join(ratios)}")
    print(machine())


if __name__ == "__main__":
    main()
