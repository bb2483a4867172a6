"""The engine and its scheduler under traffic, with a clock instead of a model: when would users get their tokens?

Everything is real but the runner: a step of it takes as long as the roofline says, and samples nothing of interest.
Two kinds of traffic: clients that decode all the time while one long prompt comes in (`beside_a_prompt`), and requests
that come at random (`poisson`).
"""

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil, inf

from ..core.sampling_params import SamplingParams
from ..errors import UserError
from .cost import MOST
from .engine import Engine, EngineSettings
from .messages import Add
from .roofline import PAGE, Chunk, Roofline
from .runner import Sampled
from .scheduler import Limits, Plan, Work

VOCABULARY = 2**16
TOKEN = 1  # what is sampled, always


class RooflineRunner:
    """A runner whose steps take the time that `roofline` gives them, on its own clock `now`, in seconds."""

    page_size, ahead = PAGE, False

    def __init__(self, roofline: Roofline) -> None:
        self.roofline = roofline
        self.num_blocks, self.shards = roofline.blocks, roofline.layout.groups
        self.now = 0.0

    def launch(self, plan: Plan) -> Plan:
        self.now += self.roofline.step(Chunk(work.start, work.count, work.request.shard) for work in plan.works)
        return plan

    def resolve(self, launched: Plan) -> list[tuple[Work, Sampled]]:
        return [(work, Sampled([TOKEN], [0.0]) if work.sample else Sampled()) for work in launched.works]


@dataclass(frozen=True)
class Arrival:
    """at: seconds. prompt, output: tokens."""

    at: float
    prompt: int
    output: int


@dataclass
class Course:
    """What one request saw. tokens: when each of its tokens came, in seconds; closed: of a client that decodes all the
    time, whose first tokens say nothing."""

    arrival: float
    prompt: int
    tokens: list[float] = field(default_factory=list)
    closed: bool = False

    @property
    def ttft(self) -> float:
        return self.tokens[0] - self.arrival

    @property
    def gaps(self) -> list[tuple[float, float]]:
        """(when, seconds since the token before)."""
        return [(there, there - before) for before, there in itertools.pairwise(self.tokens)]


@dataclass
class Outcome:
    """courses: of all requests. seconds: that it took. steps: of the engine."""

    courses: list[Course]
    seconds: float
    steps: int

    @property
    def gaps(self) -> list[float]:
        return sorted(gap for course in self.courses for _, gap in course.gaps)

    def report(self) -> dict[str, float]:
        """Milliseconds but for throughput (tokens/s, of outputs and of prompts) and `seconds`."""
        gaps = self.gaps
        ttft = sorted(course.ttft for course in self.courses if course.tokens and not course.closed)
        tpot = sorted(
            (course.tokens[-1] - course.tokens[0]) / (len(course.tokens) - 1)
            for course in self.courses
            if len(course.tokens) > 1
        )
        prompts = sum(course.prompt for course in self.courses if course.tokens and not course.closed)
        report = {
            f"{name}_p{percent}_ms": 1e3 * quantile(values, percent / 100)
            for name, values in (("ttft", ttft), ("itl", gaps), ("tpot", tpot))
            for percent in (50, 99)
            if values
        }
        return report | {
            "itl_max_ms": 1e3 * gaps[-1] if gaps else 0.0,
            "output_tokens_per_s": sum(len(course.tokens) for course in self.courses) / self.seconds,
            "prompt_tokens_per_s": prompts / self.seconds,
            "seconds": self.seconds,
            "steps": self.steps,
        }


def quantile(values: Sequence[float], part: float) -> float:
    """Of sorted values: the least that at least `part` of them do not exceed."""
    return values[max(ceil(part * len(values)), 1) - 1]


def poisson(rate: float, count: int, prompt: int, output: int, context: int, seed: int = 0) -> list[Arrival]:
    """`count` requests, `rate` a second; lengths are exponential around `prompt` and `output`, within `context`."""
    draw = random.Random(seed)
    arrivals, now = [], 0.0
    for _ in range(count):
        now += draw.expovariate(rate)
        length = min(1 + int(draw.expovariate(1 / prompt)), context - 2)
        arrivals.append(Arrival(now, length, min(1 + int(draw.expovariate(1 / output)), context - length)))
    return arrivals


class Simulation:
    """An engine of `context` tokens on `roofline`. Its scheduler reckons with the costs of that roofline beside
    `sequences` decoding ones of `context` tokens."""

    def __init__(self, roofline: Roofline, context: int, sequences: int, limits: Limits) -> None:
        self.runner, self.limits = RooflineRunner(roofline), limits
        cost = roofline.cost_model(sequences, context)
        capacity = self.runner.num_blocks * PAGE
        settings = EngineSettings(context, VOCABULARY, capacity, limits=limits, cost=cost)
        self.engine = Engine(self.runner, settings, clock=lambda: self.runner.now)  # type: ignore[arg-type]
        self.courses: dict[int, Course] = {}
        self.prompts: dict[int, list[int]] = {}
        self.ids = itertools.count(1)

    def add(self, arrival: Arrival, prompt: list[int] | None = None) -> int:
        """prompt: unlike any other one's by default."""
        id = next(self.ids)
        self.prompts[id] = prompt or [2 + id % (VOCABULARY - 2)] * arrival.prompt
        self.courses[id] = Course(arrival.at, arrival.prompt)
        params = SamplingParams(max_tokens=arrival.output, ignore_eos=True, seed=0)
        self.engine.add(Add(id, self.prompts[id], params))
        return id

    def step(self) -> Iterator[int]:
        """One of the engine's; the requests that have ended."""
        for output in self.engine.step():
            self.courses[output.id].tokens += [self.runner.now] * len(output.tokens)
            if output.finish is not None:
                yield output.id

    def open_loop(self, arrivals: Iterable[Arrival]) -> Outcome:
        """Requests come when they come, whatever the engine has to do."""
        coming = sorted(arrivals, key=lambda arrival: arrival.at, reverse=True)
        while coming or not self.engine.idle:
            if self.engine.idle:
                self.runner.now = max(self.runner.now, coming[-1].at)
            while coming and coming[-1].at <= self.runner.now:
                self.add(coming.pop())
            list(self.step())
        return self._outcome(0.0)

    def beside_a_prompt(self, clients: int, context: int, prompt: int, output: int, quiet: float = 2.0) -> Outcome:
        """`clients` decode behind 7/8 of `context` tokens, and ask the same again when they have filled it. After
        `quiet` seconds a prompt of `prompt` tokens comes; the end is `quiet` seconds after it has got `output` tokens.

        The clients' own prompts have been read before the clock starts. UserError where so much does not fit.
        """
        fit = self.runner.roofline.sequences(context)
        if clients + 1 > fit:
            raise UserError(f"{clients} sequences and one more of {context} tokens do not fit: {fit} do")
        scheduler, length = self.engine.scheduler, context - context // 8
        scheduler.limits = Limits(clients, int(MOST), inf)  # all of them in one step
        for number in range(clients):  # not all to end at the same time
            self.add(Arrival(0.0, length, (context - length) * (clients + number) // (2 * clients)))
        list(self.step())
        begin, scheduler.limits = self.runner.now, self.limits
        self.courses = {id: Course(begin, length, [begin], closed=True) for id in self.courses}
        newcomer, until = 0, begin + quiet
        while self.runner.now < until:
            for id in self.step():
                if id == newcomer:
                    until = self.runner.now + quiet
                else:
                    again = self.add(Arrival(self.runner.now, length, context - length), self.prompts.pop(id))
                    self.courses[again].closed = True
            if not newcomer and self.runner.now >= until:
                newcomer, until = self.add(Arrival(self.runner.now, prompt, output)), inf
        return self._outcome(begin)

    def _outcome(self, begin: float) -> Outcome:
        for course in self.courses.values():
            course.arrival -= begin
            course.tokens = [there - begin for there in course.tokens]
        return Outcome(list(self.courses.values()), self.runner.now - begin, self.engine.counted.steps)
