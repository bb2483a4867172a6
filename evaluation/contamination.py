"""Do the training texts hold the questions? Items that share a run of 13 words with a text of a corpus, and what the
results are without them.

Runs are compared as in grading/ngrams.py. One that more than ten items share is the benchmark's own phrase ("which of
the following statements is true"), and says nothing about any of them.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..grading.ngrams import normalised_words
from ..grading.statistics import UNKNOWN
from ..grading.verdict import Verdict
from .items import Item, Kind, Task, plural
from .perplexity import documents
from .results import Result, known, summarise
from .scoring import Grade
from .subject import Progress

RUN = 13  # words
PHRASE = 10  # items that may share a run
MANIFEST = "manifest.json"  # of a folder of token shards
PAUSE = 1.0  # seconds between two lines of progress

Texts = Iterable[tuple[str, str]]  # (place, text)


@dataclass(frozen=True)
class Hit:
    """Where an item was found. where: file, with the line where there are lines. run: the words that both have."""

    item: str
    where: str
    run: str


@dataclass
class Overlap:
    """What a corpus has of one task's items.

    items: asked. short: those of fewer than `run` words, which cannot be found. documents: read. clean: the result over
    the items that were not found; None where all of them were found, or none.
    """

    task: str
    title: str
    protocol: str
    items: int
    short: int
    documents: int = 0
    run: int = RUN
    hits: list[Hit] = field(default_factory=list)
    clean: Result | None = None

    @property
    def share(self) -> float:
        """Of the items long enough to be found, those that were."""
        return len(self.hits) / max(1, self.items - self.short)

    def as_json(self) -> dict[str, Any]:
        clean = self.clean
        return {
            "task": self.task,
            "protocol": self.protocol,
            "run": self.run,
            "documents": self.documents,
            "items": self.items,
            "too_short": self.short,
            "found": len(self.hits),
            "share": self.share,
            "hits": [{"item": hit.item, "where": hit.where, "run": hit.run} for hit in self.hits],
            "clean": clean
            and {"items": clean.items, "value": clean.value, "low": known(clean.low), "high": known(clean.high)},
        }


def check(
    ran: Sequence[tuple[Result, Task, Sequence[Item]]],
    corpora: Sequence[Path],
    out: Path,
    progress: Progress,
    shards: Callable[[Path], Texts] | None = None,
) -> list[Overlap]:
    """Look for the items of results in corpora.

    ran: results with their tasks and all items of their data; made-up texts (the needle's) are passed over. corpora:
    files or folders of texts as evaluation/perplexity.py reads them, or folders of token shards. out: where the runner
    left the grades. shards: reads a folder of token shards; None where they cannot be read here.
    Raises UserError for a corpus that is not there or cannot be read.
    """
    chosen = [(result, task, _asked(result, items, out)) for result, task, items in ran if task.kind is not Kind.FIND]
    found: list[Overlap] = []
    index = _Index()
    for result, _, items in chosen:
        short = sum(not index.add(item, len(found)) for item in items)
        found.append(Overlap(result.task, result.title, result.protocol, len(items), short))
    hits = _scan(index, _texts(corpora, shards), progress)
    for place, (overlap, (result, task, items)) in enumerate(zip(found, chosen, strict=True)):
        overlap.documents = index.documents
        overlap.hits = [hits[place, item.id] for item in items if (place, item.id) in hits]
        if overlap.hits:
            gone = {hit.item for hit in overlap.hits}
            overlap.clean = without(result, task, [item for item in items if item.id not in gone], out)
    return found


def without(result: Result, task: Task, kept: Sequence[Item], out: Path) -> Result | None:
    """The result over `kept` alone, from the grades that the runner left; None where nothing is kept."""
    if not kept:
        return None
    grades: dict[str, list[Grade]] = {}
    for row in _graded(result, out):
        grades.setdefault(row["item"], []).append(Grade(Verdict(row["verdict"]), row["answer"], row.get("share")))
    fresh = replace(
        result,
        metric=result.metric.partition(", mean over")[0],
        items=len(kept),
        value=None,
        low=UNKNOWN[0],
        high=UNKNOWN[1],
        groups={},
        extra={},
        flags=[],
        notes=[],
    )
    return summarise(fresh, task, kept, grades)


def _graded(result: Result, out: Path) -> Iterator[dict[str, Any]]:
    path = out / "graded" / f"{result.task}.{result.protocol}.jsonl"
    try:
        with path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); run the same command again to grade anew") from error


def _asked(result: Result, items: Sequence[Item], out: Path) -> list[Item]:
    """The items that were asked: all, or those that --limit drew."""
    if result.items == len(items):
        return list(items)
    names = {row["item"] for row in _graded(result, out)}
    return [item for item in items if item.id in names]


def _texts(corpora: Sequence[Path], shards: Callable[[Path], Texts] | None) -> Iterator[tuple[str, str]]:
    for corpus in corpora:
        if not (corpus / MANIFEST).is_file():
            yield from documents(corpus, "contamination")
        elif shards is None:
            raise UserError(f"contamination: {corpus} holds token shards, and the tokenizer to read them is not here")
        else:
            yield from shards(corpus)


class _Index:
    """Runs of words -> the items that hold them, as (task, item) numbers."""

    def __init__(self) -> None:
        self.owners: list[tuple[int, str]] = []
        self.runs: dict[int, list[int]] = {}
        self.documents = 0

    def add(self, item: Item, task: int) -> bool:
        """Know the runs of an item that begin in its question; False where it is too short, choices included."""
        asked = len(normalised_words(item.question))  # choices alone are often those of other questions
        words = normalised_words("\n".join([item.question, *item.choices]))
        runs = {key for start, key in _runs(words) if start < asked}
        for key in runs:
            self.runs.setdefault(key, []).append(len(self.owners))
        self.owners.append((task, item.id))
        return bool(runs)


def _runs(words: Sequence[str]) -> Iterator[tuple[int, int]]:
    """(start, hash) of each whole run."""
    for start in range(len(words) - RUN + 1):
        yield start, hash(tuple(words[start : start + RUN]))


def _scan(index: _Index, texts: Texts, progress: Progress) -> Mapping[tuple[int, str], Hit]:
    """The first hit of every item that is found, by task number and item."""
    # What many items of one task share is a phrase; the same item in two tasks is not.
    runs = {key: owners for key, owners in index.runs.items() if not _is_phrase(index, owners)}
    hits: dict[tuple[int, str], Hit] = {}
    begin = last = time.perf_counter()
    read = 0
    for where, text in texts:
        words = normalised_words(text)
        for start, key in _runs(words):
            for owner in runs.get(key, ()):
                name = index.owners[owner]
                if name not in hits:
                    hits[name] = Hit(name[1], where, " ".join(words[start : start + RUN]))
        index.documents += 1
        read += len(text)
        if (now := time.perf_counter()) - last > PAUSE:
            last = now
            progress.show(_line(index.documents, read, len(hits), now - begin))
    progress.show(_line(index.documents, read, len(hits), time.perf_counter() - begin), final=True)
    return hits


def _is_phrase(index: _Index, owners: Sequence[int]) -> bool:
    if len(owners) <= PHRASE:
        return False
    tasks = [index.owners[owner][0] for owner in owners]
    return max(map(tasks.count, set(tasks))) > PHRASE


def _line(documents: int, read: int, hits: int, seconds: float) -> str:
    speed = read / 1e6 / max(seconds, 1e-9)
    return (
        f"contamination | {plural(documents, 'text')}, {read / 1e6:,.1f} million characters, {speed:.1f} a second | "
        f"{plural(hits, 'item')} found"
    )
