"""What the engine itself costs in a step, with 256 requests running and nothing computed.

    taskset -c 0 python benchmarks/scheduler.py
    taskset -c 0 python benchmarks/scheduler.py --requests 64 --context 32768 --profile

plan: `Scheduler.step`. scheduler: `Scheduler.computed` of every result. engine: the rest of `Engine.step`, outputs made
and ends looked for. All requests decode; with speculation, each has a draft of one token, which is right every other
time. Steps in which some request crosses a page and takes a block are among them, as they are in service.
"""

import argparse
import cProfile
import gc
import pstats
import statistics
import time

from contest import machine

from dsv3.core.sampling_params import SamplingParams
from dsv3.serving.engine import Engine, EngineSettings
from dsv3.serving.messages import Add
from dsv3.serving.runner import Sampled
from dsv3.serving.scheduler import Limits

PAGE = 64


class Nothing:
    """A runner that computes nothing: every text goes on with the same token."""

    page_size, shards = PAGE, 1

    def __init__(self, num_blocks: int, speculative: bool, ahead: bool):
        self.num_blocks, self.speculative, self.ahead = num_blocks, speculative, ahead
        self.count = 0

    def launch(self, plan):
        return plan

    def resolve(self, plan):
        results = []
        for work in plan.works:
            self.count += 1
            right = work.request.draft and self.count % 2
            tokens = [] if not work.sample else [7, 7] if right else [7]
            results.append((work, Sampled(tokens, [-0.5] * len(tokens), draft=[7] if self.speculative else [])))
        return results


class Watch:
    """Wraps a method of an object and sums up the seconds that its calls take."""

    def __init__(self, owner: object, name: str):
        self.seconds, self.call = 0.0, getattr(owner, name)
        setattr(owner, name, self)

    def __call__(self, *arguments):
        begun = time.thread_time()
        result = self.call(*arguments)
        self.seconds += time.thread_time() - begun
        return result

    def take(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def engine_of(options: argparse.Namespace, speculative: bool, ahead: bool) -> Engine:
    """All requests are running, and have begun to decode."""
    context = options.context + 4 * options.steps
    blocks = options.requests * (context // PAGE + 2)
    limits = Limits(options.requests, 2**31, float("inf"))
    settings = EngineSettings(context, 50_000, blocks * PAGE, limits=limits)
    engine = Engine(Nothing(blocks, speculative, ahead), settings)
    params = SamplingParams(ignore_eos=True, seed=0)
    for id in range(options.requests):
        engine.add(Add(id, [id + 8] * (options.context - id % PAGE), params))  # pages are crossed at different steps
    while any(len(request.tokens) == request.prompt_length for request in engine.scheduler.waiting) or not all(
        request.output for request in engine.scheduler.running
    ):
        engine.step()
    return engine


def measure(options: argparse.Namespace, speculative: bool, ahead: bool) -> dict[str, list[float]]:
    """Microseconds per step of each part; what the scheduler does with results is timed in steps of its own."""
    times: dict[str, list[float]] = {"plan": [], "scheduler": [], "step": []}
    engine = engine_of(options, speculative, ahead)
    gc.collect()
    gc.freeze()
    plan = Watch(engine.scheduler, "step")
    resolve, launch = Watch(engine.runner, "resolve"), Watch(engine.runner, "launch")
    for _ in range(options.steps):
        begun = time.thread_time()
        engine.step()
        spent = time.thread_time() - begun
        times["plan"].append(1e6 * plan.take())
        times["step"].append(1e6 * (spent - resolve.take() - launch.take()))
    scheduler = engine.scheduler
    for _ in range(options.steps):
        work = plan.call()
        results = resolve.call(work)
        if ahead:
            scheduler.launched(work)
        begun = time.thread_time()
        for done, sampled in results:
            scheduler.computed(done, sampled.tokens)
        times["scheduler"].append(1e6 * (time.thread_time() - begun))
        for done, sampled in results:
            done.request.draft = sampled.draft
    times["engine"] = [whole - part for whole, part in zip(times["step"], times["plan"], strict=True)]
    gc.unfreeze()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--profile", action="store_true", help="where the time of a step goes, by function")
    options = parser.parse_args()
    if options.profile:
        engine = engine_of(options, False, False)
        with cProfile.Profile() as profile:
            for _ in range(options.steps):
                engine.step()
        pstats.Stats(profile).sort_stats("tottime").print_stats(14)
        return
    print(machine())
    print(f"{options.requests} requests, context {options.context}, {options.steps} steps; us, least / median")
    print("| | plan | scheduler, results | both | engine, results |\n|---|---|---|---|---|")
    for name, speculative, ahead in (("plain", 0, 0), ("a step ahead", 0, 1), ("speculation", 1, 0)):
        times = measure(options, bool(speculative), bool(ahead))
        both = [a + b for a, b in zip(times["plan"], times["scheduler"], strict=True)]
        cells = [
            f"{min(values):.0f} / {statistics.median(values):.0f}"
            for values in (times["plan"], times["scheduler"], both, times["engine"])
        ]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
