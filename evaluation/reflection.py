"""Whether thinking on helps: the first answer of each thought against the final one, with two controls.

Control: the thought is cut at its first answer and ended there, and the model has to answer. What it would have said
without the rest is compared with what it did say, item by item. Injection: a right first answer is replaced by a wrong
one and the model thinks on from there; how often it ends right all the same is how often it truly notices an error.
Both ask once for every item, after its first sample, and need weights in this process: a server does not let us write
the beginning of a thought.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

from ..core.generate import SamplingParams
from ..core.special_tokens import THINK
from ..grading.answers import ANSWER, final_answer, number, reply_of, split_thought
from ..grading.math import MathGrader
from ..grading.reflection import Reflection, candidates, until_first, with_wrong_first
from ..grading.statistics import paired_interval, wilson
from ..grading.verdict import Verdict
from .asking import Ask, ask
from .items import Item
from .protocols import Protocol
from .runner import Options
from .store import Store, digest, seed_of
from .subject import Progress, Subject

FORCED = "The final answer is \\boxed{"  # or the tag, for models that answer in tags
FORCED_TOKENS = 64


@dataclass(frozen=True)
class Trace:
    """A whole reply to an item, thought included."""

    asked: Ask
    text: str


class Traces:
    """A listener of Runner.run that keeps every reply."""

    def __init__(self) -> None:
        self.found: list[Trace] = []

    def __call__(self, asked: Ask, row: Mapping[str, Any]) -> None:
        self.found.append(Trace(asked, row["text"]))


class Judge:
    """Whether an answer is right; asks the grader once for each pair of answer and gold."""

    def __init__(self, grader: MathGrader) -> None:
        self._grader = grader
        self._known: dict[tuple[str, str], bool] = {}

    def learn(self, pairs: Sequence[tuple[str, str | None]]) -> None:
        """Grade many (gold, answer) together."""
        fresh = list({(gold, answer) for gold, answer in pairs if answer is not None} - self._known.keys())
        verdicts = self._grader.grade([gold for gold, _ in fresh], [answer for _, answer in fresh])
        self._known |= {pair: verdict is Verdict.RIGHT for pair, verdict in zip(fresh, verdicts, strict=True)}

    def right(self, gold: str, answer: str | None) -> bool:
        if answer is None:
            return False
        if (gold, answer) not in self._known:
            self.learn([(gold, answer)])
        return self._known[gold, answer]


def analyse(
    subject: Subject,
    name: str,
    traces: Sequence[Trace],
    grader: MathGrader,
    protocol: Protocol,
    options: Options,
    progress: Progress,
) -> dict[str, Any]:
    """Everything about the reflection in `traces`, as plain data. protocol: the one that they were made under."""
    judge = Judge(grader)
    judge.learn([pair for trace in traces for pair in _pairs(trace.asked.item, trace.text)])
    report: dict[str, Any] = {"traces": len(traces), "matrix": _matrix(judge, traces)}
    firsts = [each for each in traces if each.asked.sample == 0 and _thought(each.text) and candidates(each.text)]
    protocol = replace(protocol, thinks=True)
    if not subject.can_continue or not subject.forces_thought():
        report["note"] = (
            "no controls: the beginning of a thought can only be written to a model loaded here, that thinks"
        )
    elif firsts:
        with Store(options.out / "replies" / f"{name}.reflection.jsonl") as store:
            controls = _Controls(subject, name, judge, protocol, options.seed, store, progress)
            report["control"] = controls.cut_short(firsts)
            report["injection"] = controls.begun_wrong(firsts)
    return report


def _thought(text: str) -> bool:
    return split_thought(text)[0] is not None


def _pairs(item: Item, text: str) -> list[tuple[str, str | None]]:
    return [(item.gold, next(iter(candidates(text)), None)), (item.gold, final_answer(text, whole=True))]


def _matrix(judge: Judge, traces: Sequence[Trace]) -> dict[str, Any]:
    reflection = Reflection()
    for trace in traces:
        reflection.add(trace.text, partial(judge.right, trace.asked.item.gold))
    return reflection.report()


@dataclass(frozen=True)
class _Controls:
    """Traces of the task `name`, gone on with from a beginning that was changed."""

    subject: Subject
    name: str
    judge: Judge
    protocol: Protocol
    seed: int
    store: Store
    progress: Progress

    def cut_short(self, traces: Sequence[Trace]) -> dict[str, Any]:
        """The thought ends at its first answer: what was thinking on worth?"""
        params = SamplingParams(temperature=0.0, max_tokens=FORCED_TOKENS, seed=0)
        openings = [ANSWER if ANSWER in reply_of(trace.text) else FORCED for trace in traces]
        wanted = [
            _go_on(self.subject, trace, until_first(trace.text) or "", opening, params)
            for trace, opening in zip(traces, openings, strict=True)
        ]
        ask(self.subject, f"{self.name}, thoughts cut short", wanted, self.protocol, self.store, self.progress)
        forced, full = [], []
        for trace, asked, opening in zip(traces, wanted, openings, strict=True):
            gold = trace.asked.item.gold
            row = self.store.get(asked.key)
            if row is not None:
                forced.append(float(self.judge.right(gold, final_answer(opening + row["text"]))))
                full.append(float(self.judge.right(gold, final_answer(trace.text, whole=True))))
        low, high = paired_interval(full, forced)
        return {
            "items": len(forced),
            "cut_short": fmean(forced) if forced else None,
            "whole_thought": fmean(full) if full else None,
            "gain": fmean(full) - fmean(forced) if full else None,
            "gain_interval": [low, high] if len(full) > 1 else None,
        }

    def begun_wrong(self, traces: Sequence[Trace]) -> dict[str, Any]:
        """A wrong number in the place of a right first answer: how often is it noticed?"""
        wanted, beginnings = [], []
        for trace in traces:
            item = trace.asked.item
            value = number(item.gold)
            if value is None or not self.judge.right(item.gold, candidates(trace.text)[0]):
                continue
            beginning = with_wrong_first(trace.text, str(value + 1)) or ""
            seed = seed_of(self.seed, f"{self.name}, injection", item.id, 0)
            params = SamplingParams(
                temperature=trace.asked.params.temperature,
                top_p=trace.asked.params.top_p,
                max_tokens=trace.asked.params.max_tokens,
                seed=seed,
            )
            wanted.append(_go_on(self.subject, trace, beginning, "", params))
            beginnings.append(beginning)
        ask(self.subject, f"{self.name}, wrong first answers", wanted, self.protocol, self.store, self.progress)
        items = mended = 0
        reflection = Reflection()
        for asked, beginning in zip(wanted, beginnings, strict=True):
            row = self.store.get(asked.key)
            if row is None:
                continue
            whole = row["text"] if row["text"].startswith(THINK) else beginning + row["text"]
            gold = asked.item.gold
            reflection.add(whole, partial(self.judge.right, gold))
            items += 1
            mended += self.judge.right(gold, final_answer(whole, whole=True))
        return {
            "items": items,
            "mended": mended / items if items else None,
            "mended_interval": list(wilson(mended, items)) if items else None,
            "matrix": reflection.report(),
        }


def _go_on(subject: Subject, trace: Trace, thought: str, content: str, params: SamplingParams) -> Ask:
    """Ask for what follows a thought that has begun; with `content`, for what follows that, behind the thought."""
    begun = thought.lstrip().removeprefix(THINK).lstrip("\n")
    message = {"role": "assistant", "content": content, "reasoning_content": begun, "prefix": True}
    prompt = [*trace.asked.prompt, message]
    key = trace.asked.item.id, 0, digest([subject.digest, prompt, asdict(params)])
    length = subject.chat_tokens(prompt, True)
    fits = length is None or subject.context is None or length < subject.context
    return Ask(trace.asked.item, 0, prompt, params, key, fits)
