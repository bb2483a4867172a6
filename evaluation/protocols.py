"""How a model is asked: the protocols of the reports, as data.

What the reports say is kept to the letter and named in `source`; where they leave something open, the choice is ours
and says so.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..errors import UserError

SMALL = 1000  # items below which the V3 report asks several times


@dataclass(frozen=True)
class Samples:
    """How often every item is asked, and how warm: sample i has temperatures[i % len(temperatures)]."""

    count: int
    temperatures: tuple[float, ...] = (0.0,)


@dataclass(frozen=True)
class Protocol:
    """A way to ask.

    chat: conversations, or for base models texts to go on with. thinks: the reply is made to begin with a thought.
    samples: of every item; small: of sets with fewer than 1,000 items; special: of single tasks.
    max_tokens: of a reply. months: first and last one of dated problems, such as 2024-08; None: whatever the data has.
    """

    name: str
    chat: bool
    max_tokens: int
    samples: Samples
    small: Samples
    source: str
    special: Mapping[str, Samples] = field(default_factory=dict)
    top_p: float = 1.0
    thinks: bool = False
    months: tuple[str, str] | None = None

    def covers(self, date: str | None) -> bool:
        """Whether a problem of this date (2024-08-31...) is one of those that the report asked; undated ones are."""
        return date is None or self.months is None or self.months[0] <= date[:7] <= self.months[1]

    def samples_of(self, task: str, items: int) -> Samples:
        """For a task whose whole test set has so many items."""
        return self.special.get(task) or (self.small if items < SMALL else self.samples)

    def with_options(self, samples: int | None, max_tokens: int | None) -> "Protocol":
        """The protocol with other numbers of samples or tokens, where given."""
        if samples is not None and samples < 1:
            raise UserError("--samples must be 1 or more")
        if max_tokens is not None and max_tokens < 1:
            raise UserError("--max-tokens must be 1 or more")
        changed = self if max_tokens is None else replace(self, max_tokens=max_tokens)
        if samples is None:
            return changed
        return replace(
            changed,
            samples=replace(self.samples, count=samples),
            small=replace(self.small, count=samples),
            special={task: replace(chosen, count=samples) for task, chosen in self.special.items()},
        )


_R1 = (0.6,)
PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "r1",
            chat=True,
            max_tokens=32768,
            top_p=0.95,
            thinks=True,
            months=("2024-08", "2025-01"),
            samples=Samples(4, _R1),
            small=Samples(16, _R1),
            special={
                **{task: Samples(64, _R1) for task in ("aime24", "aime25", "gpqa")},
                "math": Samples(16, _R1),
                "livecodebench": Samples(8, _R1),
                "needle": Samples(1, _R1),
            },
            source=(
                "R1 report, section 3: at most 32,768 tokens, temperature 0.6, top-p 0.95, k samples for pass@1 (64 "
                "for AIME and GPQA, 16 for MATH, 8 for LiveCodeBench of August 2024 to January 2025); no system prompt "
                "and a reply that begins with <think>, as the release advises. Of other sets the report says 4 to 64 "
                "by their size; here 4, 16 below 1,000 items."
            ),
        ),
        Protocol(
            "v3",
            chat=True,
            max_tokens=8192,
            months=("2024-08", "2024-11"),
            samples=Samples(1),
            small=Samples(4, (0.2, 0.4, 0.6, 0.8)),
            special={
                "aime24": Samples(16, (0.7,)),
                "aime25": Samples(16, (0.7,)),
                "math500": Samples(1),
                "needle": Samples(1),
            },
            source=(
                "V3 report, section 5.3.1: at most 8,192 tokens, AIME at temperature 0.7 with 16 samples, MATH-500 "
                "greedy, LiveCodeBench of August to November 2024; sets of fewer than 1,000 items several times at "
                "varying temperature (which ones, it does not say: here four, 0.2 to 0.8); everything else greedy. "
                "Where it took the prompts of simple-evals, ours ask the same in other words."
            ),
        ),
        Protocol(
            "base",
            chat=False,
            max_tokens=2048,
            samples=Samples(1),
            small=Samples(1),
            source=(
                "V3 report, section 4.4.1: few-shot; multiple choice by likelihood, the rest by greedy generation. Its "
                "prompts and shots are not published; here they come from each set's own dev or training split."
            ),
        ),
        Protocol(
            "greedy",
            chat=True,
            max_tokens=8192,
            samples=Samples(1),
            small=Samples(1),
            source="one greedy reply to every item: a quick look, which no report uses",
        ),
    )
}


def protocol(name: str) -> Protocol:
    if name not in PROTOCOLS:
        raise UserError(f"unknown protocol {name!r}; there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
