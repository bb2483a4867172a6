"""Everything that changes with time in a run, as pure functions of the step: batch size, learning rate, gamma, lambda.

Time is counted in steps and in tokens, and the two are not proportional while the batch grows. `Timeline` knows both
exactly (integers), from the settings alone, so a resumed run needs no state but its step.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass

from ..errors import UserError
from .config import BatchSection, OptimSection, PretrainConfig
from .settings import Span


class Timeline:
    """How many sequences each step of a run takes, and where in the run a step or a token lies."""

    def __init__(self, batch: BatchSection, seq_len: int, length: Span) -> None:
        self.seq_len = seq_len
        self._length = length
        self._full = batch.sequences
        self._starts = [0]  # sequences before each step, until the batch has its full size
        if batch.ramp:
            self._climb(batch.ramp.start, batch.ramp.multiple, batch.ramp.over)
        self.total_steps = self.first_step_at(length)
        if self.total_steps < 1:
            raise UserError("length must be at least one step")

    def _climb(self, start: int, multiple: int, over: Span) -> None:
        while True:
            at = self._starts[-1] * self.seq_len if over.unit == "tokens" else len(self._starts) - 1
            if at >= over.value:
                return
            size = start + int((self._full - start) * at // int(over.value)) // multiple * multiple
            self._starts.append(self._starts[-1] + size)

    def sequences_before(self, step: int) -> int:
        """Sequences that the steps 0 .. step-1 took: the data position at the start of `step`."""
        ramp = len(self._starts) - 1
        return self._starts[step] if step <= ramp else self._starts[ramp] + (step - ramp) * self._full

    def tokens_before(self, step: int) -> int:
        return self.sequences_before(step) * self.seq_len

    def batch_size(self, step: int) -> int:
        """Sequences of the global batch of `step`."""
        return self.sequences_before(step + 1) - self.sequences_before(step)

    def first_step_at(self, span: Span) -> int:
        """The first step that starts at or after a point of the run."""
        span = self.resolve(span)
        if span.unit == "steps":
            return int(span.value)
        sequences = -(-int(span.value) // self.seq_len)
        if sequences <= self._starts[-1]:
            return bisect_left(self._starts, sequences)
        return len(self._starts) - 1 - (self._starts[-1] - sequences) // self._full

    def resolve(self, span: Span) -> Span:
        """The same point in steps or tokens: percentages are of the length, in its unit."""
        if span.unit != "percent":
            return span
        return Span(round(self._length.value * span.value / 100), self._length.unit)


@dataclass(frozen=True)
class _Stretch:
    """A phase with its ends known: from `low` to `high` while time, in tokens or steps, runs from start to end."""

    shape: str
    in_tokens: bool
    start: int
    end: int
    last_step: int  # the phase holds for steps before this one
    low: float
    high: float

    def value(self, at: int) -> float:
        share = (at - self.start) / (self.end - self.start)
        if self.shape == "linear":
            return self.low + (self.high - self.low) * share
        if self.shape == "cosine":
            return self.high + (self.low - self.high) * (1 + math.cos(math.pi * share)) / 2
        return self.high


class LearningRate:
    """The learning rate of the settings `optim` at a step (0-based; it holds for the update made by that step)."""

    def __init__(self, optim: OptimSection, timeline: Timeline) -> None:
        self._optim, self._timeline = optim, timeline
        self._stretches = self._build()

    def _build(self) -> list[_Stretch]:
        time, optim = self._timeline, self._optim
        stretches: list[_Stretch] = []
        step, tokens, lr = 0, 0, optim.lr
        for index, phase in enumerate(optim.schedule):
            until = time.resolve(phase.until)
            in_tokens, end = until.unit == "tokens", int(until.value)
            start = tokens if in_tokens else step
            last_step = time.first_step_at(until)
            if end <= start:
                raise UserError(
                    f"optim.schedule[{index}] ends at {phase.until}, which is not after the phase before it"
                )
            to = phase.lr if phase.lr is not None else lr if phase.shape == "constant" else optim.final_lr
            stretches.append(_Stretch(phase.shape, in_tokens, start, end, last_step, lr, to))
            step, tokens, lr = last_step, end if in_tokens else time.tokens_before(end), to
        return stretches

    def __call__(self, step: int) -> float:
        """Warm-up reaches the full value at its last step: (step + 1) / warmup_steps."""
        warm = min(1.0, (step + 1) / self._optim.warmup_steps) if self._optim.warmup_steps else 1.0
        for stretch in self._stretches:
            if step < stretch.last_step:
                return warm * stretch.value(self._timeline.tokens_before(step) if stretch.in_tokens else step)
        return warm * (self._stretches[-1].high if self._stretches else self._optim.lr)


class Schedule:
    """The settings of a pre-training run, read off at a step (0-based)."""

    def __init__(self, config: PretrainConfig) -> None:
        self.timeline = Timeline(config.batch, config.data.seq_len, config.length)
        self.lr = LearningRate(config.optim, self.timeline)
        self._config = config
        self._gamma_ends = self.timeline.first_step_at(config.balance.gamma_until)
        self._lambda_switches = self.timeline.first_step_at(config.mtp.switch_at)

    def gamma(self, step: int) -> float:
        """Step of the balance biases."""
        return self._config.balance.gamma if step < self._gamma_ends else 0.0

    def mtp_weight(self, step: int) -> float:
        """Weight lambda of the multi-token-prediction loss."""
        mtp = self._config.mtp
        return mtp.weight if step < self._lambda_switches else mtp.final_weight
