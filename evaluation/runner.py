"""Running a task: which items, which settings, getting the replies or likelihoods, grading them, summing up."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ..core.files import atomic_write
from ..errors import UserError
from ..grading.verdict import Verdict
from .asking import Ask, ask, asks
from .choosing import choose, questions
from .items import Data, Item, Kind, Task, plural
from .prompting import limited, shots_for
from .protocols import Protocol, Samples
from .results import Result, summarise
from .scoring import Case, Grade, Graders
from .store import Store, digest
from .subject import NO_TEXTS, Progress, Subject

GRADED = 256  # replies that are graded between two lines of progress

# Called with every reply of a task and its row in the store; for analyses that need whole traces.
Listener = Callable[[Ask, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Options:
    """What the command line says about all tasks. shots, samples, max_tokens: None for what the protocol says."""

    out: Path
    seed: int = 0
    shots: int | None = None
    samples: int | None = None
    max_tokens: int | None = None
    limit: int | None = None


class Runner:
    """Runs tasks on `subject`; all that it keeps lies in `options.out`."""

    def __init__(self, subject: Subject, graders: Graders, options: Options, progress: Progress) -> None:
        self.subject, self.graders, self.options, self.progress = subject, graders, options, progress

    def prepare(self, task: Task, data: Data, protocol: Protocol) -> None:
        """Raise UserError now, not after hours of other tasks, where this one cannot be run."""
        check(task, data)
        protocol.with_options(self.options.samples, self.options.max_tokens)
        self.graders.prepare(task)
        if protocol.chat:
            self.subject.describe(protocol.thinks)
        elif self.subject.likelihood is None:
            raise UserError(f"{task.name}: {NO_TEXTS}")
        show = shots_for(task, data, self._shots(task, data, protocol), self.options.seed)
        items = limited(_covered(task, data, protocol), self.options.limit, self.options.seed)
        self.graders.doubts(task, items)
        for item in items:
            show(item)

    def _shots(self, task: Task, data: Data, protocol: Protocol) -> int:
        """How many are shown: none to chat models, and none where neither task nor data know any."""
        if protocol.chat or not (task.shots or data.shots):
            return 0
        return task.shots if self.options.shots is None else self.options.shots

    def run(self, task: Task, data: Data, protocol: Protocol, listen: Listener | None = None) -> Result:
        """The result of a task. Leaves replies/TASK.jsonl and graded/TASK.PROTOCOL.jsonl.

        data: not empty, ids different; see `check`.
        """
        self.prepare(task, data, protocol)
        options = self.options
        scored = not protocol.chat and task.kind is Kind.CHOICE  # by likelihood: no replies, so no samples either
        chosen = protocol.with_options(options.samples, options.max_tokens)
        covered = _covered(task, data, protocol)
        samples = Samples(1) if scored else chosen.samples_of(task.name, len(covered))
        shots = self._shots(task, data, protocol)
        settings = {
            "model": self.subject.digest,
            "task": task.name,
            "mode": "likelihood" if scored else "chat" if protocol.chat else "text",
            "format": self.subject.describe(protocol.thinks) if protocol.chat else None,
            "shots": shots,
            "seed": options.seed,
            "top_p": chosen.top_p,
            "temperatures": list(samples.temperatures),
            "max_tokens": chosen.max_tokens if protocol.chat else min(task.tokens, chosen.max_tokens),
        }
        items = limited(covered, options.limit, options.seed)
        notes = [*data.notes, *self.graders.doubts(task, items)]
        if task.kind is Kind.CODE:
            notes.append(f"programs ran behind this wall: {self.graders.sandbox.description}")
        result = Result(
            task=task.name,
            title=task.title,
            protocol=protocol.name,
            metric=_metric(task, scored, samples.count),
            items=len(items),
            of=len(covered),
            samples=samples.count,
            full_samples=1 if scored else protocol.samples_of(task.name, len(covered)).count,
            settings=digest(settings),
            shots=shots,
            seed=options.seed,
            notes=notes,
        )
        show = shots_for(task, data, shots, options.seed)
        with Store(options.out / "replies" / f"{task.name}.jsonl") as store:
            if scored:
                asked = questions(self.subject, task, items, show, settings)
                grades = choose(self.subject, task.name, asked, store, self.progress)
                _account(result, [store.get(question.key) for question in asked])
                _fitting(result, [question.prompt.shots for question in asked])
            else:
                wanted = asks(self.subject, task, items, show, chosen, samples, settings)
                refused = ask(self.subject, task.name, wanted, chosen, store, self.progress)
                result.flags += [refused] if refused else []
                grades = self._grade(task, wanted, store, protocol.chat, listen)
                _account(result, [store.get(each.key) for each in wanted], replies=True)
                _fitting(result, [each.shots if each.fits else None for each in wanted if each.sample == 0])
        if protocol.chat:
            self._limits(result, protocol, chosen)
        self._keep(f"{task.name}.{protocol.name}", items, grades)
        return summarise(result, task, items, grades)

    def _limits(self, result: Result, protocol: Protocol, chosen: Protocol) -> None:
        """Flag replies that were given less room than the protocol says, and thoughts that could not be opened."""
        room = min(chosen.max_tokens, self.subject.context or chosen.max_tokens)
        if room < protocol.max_tokens:
            result.flags.append(f"replies had room for {room:,} tokens, not {protocol.max_tokens:,}")
        if protocol.thinks and not self.subject.forces_thought():
            result.notes.append("the reply was not made to begin with <think>; that is left to the model or its server")

    def _grade(
        self, task: Task, wanted: Sequence[Ask], store: Store, chat: bool, listen: Listener | None
    ) -> dict[str, list[Grade]]:
        """A grade for each sample, by the item's id. Where not even the question fitted there is nothing to grade."""
        grades: dict[str, list[Grade]] = {each.item.id: [] for each in wanted}
        for start in range(0, len(wanted), GRADED):
            part = wanted[start : start + GRADED]
            rows = [store.get(each.key) for each in part]
            cases = [
                Case(each.item, row["text"], chat) for each, row in zip(part, rows, strict=True) if row is not None
            ]
            found = iter(self.graders.grade(task, cases))
            for each, row in zip(part, rows, strict=True):
                grades[each.item.id].append(Grade(Verdict.MISSING, None) if row is None else next(found))
                if row is not None and listen is not None:
                    listen(each, row)
            self.progress.show(f"{task.name} | {start + len(part):,}/{len(wanted):,} replies graded")
        return grades

    def _keep(self, name: str, items: Sequence[Item], grades: Mapping[str, Sequence[Grade]]) -> None:
        """graded/NAME.jsonl: what became of every reply, for people who wonder about a number."""
        folder = self.options.out / "graded"
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / f"{name}.jsonl", "w") as file:
            for item in items:
                for sample, grade in enumerate(grades[item.id]):
                    row = {
                        "item": item.id,
                        "sample": sample,
                        "verdict": grade.verdict,
                        "answer": grade.answer,
                        "gold": item.gold,
                        "where": item.where,
                    } | ({} if grade.share is None else {"share": grade.share})
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _metric(task: Task, scored: bool, samples: int) -> str:
    if scored:
        return "accuracy by likelihood"
    return "pass@1" if samples > 1 and task.metric == "accuracy" else task.metric


def check(task: Task, data: Data) -> None:
    """Raise UserError for data that no result can come of."""
    if not data.items:
        raise UserError(f"{task.name}: no items to ask in these files; expected {task.files}")
    seen: dict[str, Item] = {}
    for item in data.items:
        if item.id in seen:
            raise UserError(f"{item.where}: the id {item.id!r} is also at {seen[item.id].where}; make them different")
        seen[item.id] = item


def _covered(task: Task, data: Data, protocol: Protocol) -> Sequence[Item]:
    """The items that the protocol asks: all, but for dated ones of other months."""
    items = [item for item in data.items if protocol.covers(item.extra.get("date"))]
    if not items and protocol.months is not None:
        raise UserError(
            f"{task.name}: protocol {protocol.name} asks problems of {' to '.join(protocol.months)}, and "
            f"{'; '.join(data.notes)}; give --protocol greedy, or other files"
        )
    return items


def _account(result: Result, rows: Sequence[Mapping[str, Any] | None], replies: bool = False) -> None:
    """Tokens, time and lengths, from what is in the store."""
    found = [row for row in rows if row is not None]
    result.seconds = sum(row["seconds"] for row in found)
    result.tokens = sum(row["tokens"] for row in found)
    if replies and found:
        result.lengths = [row["tokens"] for row in found]
        result.mean_tokens = fmean(result.lengths)
        result.truncated = sum(row["finish_reason"] == "length" for row in found) / len(found)


def _fitting(result: Result, shots: Sequence[int | None]) -> None:
    """Flag what had to be left out for the context's sake."""
    shortened = sum(count is not None and count < result.shots for count in shots)
    if shortened:
        result.flags.append(f"{plural(shortened, 'prompt')} had fewer than {result.shots} shots, to fit the context")
    if too_long := sum(count is None for count in shots):
        result.flags.append(f"too long for the context, and so wrong: {plural(too_long, 'question')}")
