"""Bits per byte of texts: -log2 of their probability over their length, which compares models whatever their
tokenizers. Every document begins anew; long ones go through windows that overlap, so that no token lacks context."""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..grading.statistics import UNKNOWN, Interval, t_quantile
from .clock import Clock
from .likelihood import Request, windows
from .reading import TEXTS, files_below, is_data, open_text, read_records
from .results import Result
from .runner import Options
from .store import Key, Store, digest
from .subject import NO_TEXTS, Progress, Subject

WINDOW = 4096  # tokens at a time, less where the context is shorter; half of it is context for the other half
TOGETHER = 128  # windows that are scored at a time


def documents(path: Path, name: str) -> Iterator[tuple[str, str]]:
    """(place, text) of each document at or below `path`. A file that is no table of records is one document."""
    if not path.exists():
        raise UserError(f"{name}: {path} does not exist; expected {TEXTS}")
    files = files_below(path)
    if not files:
        raise UserError(f"{name}: {path} holds no data files; expected {TEXTS}")
    for file in files:
        if is_data(file) and ".txt" not in file.name.lower():
            for record in read_records(file):
                yield record.where, record.text("text", "content")
        else:
            try:
                with open_text(file) as opened:
                    text = opened.read()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{file}: not a text in UTF-8 ({error}); expected {TEXTS}") from None
            if text.strip():
                yield str(file), text


def bits_per_byte(subject: Subject, path: Path, name: str, title: str, options: Options, progress: Progress) -> Result:
    """The result over all documents at `path`, or the first `options.limit` of them; kept in replies/NAME.jsonl."""
    check(subject, name)
    assert subject.likelihood is not None
    length = min(WINDOW, subject.likelihood.context)
    settings = {"model": subject.digest, "task": name, "window": length, "overlap": max(1, length // 2)}
    if options.limit is not None and options.limit < 1:
        raise UserError("--limit must be 1 or more")
    # Texts are read twice, once for their names and once to score them: a test set may be larger than the memory.
    found: list[Key] = [
        (where, i, digest([settings, _digest(text)])) for i, (where, text) in enumerate(documents(path, name))
    ]
    keys = found[: options.limit]
    with Store(options.out / "replies" / f"{name}.jsonl") as store:
        _score(subject, name, documents(path, name), keys, settings, store, progress)
        rows = [store.rows[key] for key in keys]
    nats, size = [row["nats"] for row in rows], [row["bytes"] for row in rows]
    tokens = sum(row["tokens"] for row in rows)
    low, high = ratio_interval([value / math.log(2) for value in nats], size)
    return Result(
        task=name,
        title=title,
        protocol="base",
        metric="bits per byte",
        items=len(rows),
        of=len(found),
        samples=1,
        settings=digest(settings),
        value=sum(nats) / math.log(2) / sum(size),
        low=low,
        high=high,
        lower=True,
        scale=1.0,
        tokens=tokens,
        seconds=sum(row["seconds"] for row in rows),
        extra={"bytes": sum(size), "bytes_per_token": sum(size) / tokens, "perplexity": math.exp(sum(nats) / tokens)},
        notes=[f"windows of {length} tokens, {settings['overlap']} of them context"],
    )


def check(subject: Subject, name: str) -> None:
    """UserError for a subject that cannot say how likely a text is."""
    if subject.likelihood is None:
        raise UserError(f"{name}: {NO_TEXTS}")


def _score(
    subject: Subject,
    name: str,
    texts: Iterator[tuple[str, str]],
    keys: list[Key],
    settings: dict[str, Any],
    store: Store,
    progress: Progress,
) -> None:
    """Score the documents that the store does not have."""
    assert subject.likelihood is not None
    missing = [i for i, key in enumerate(keys) if store.get(key) is None]
    last = max(missing, default=-1)
    clock = Clock(name, len(keys), len(keys) - len(missing), "documents", progress)
    waiting: list[tuple[Key, int, int, list[Request]]] = []  # with bytes, tokens and windows
    for i, (_, text) in enumerate(texts):
        if i > last:
            break
        if store.get(keys[i]) is not None:
            continue
        start, *ids = subject.document(text)
        parts = list(windows(ids, start, settings["window"], settings["overlap"]))
        waiting.append((keys[i], len(text.encode()), len(ids), parts))
        if sum(len(parts) for *_, parts in waiting) < TOGETHER and i != last:
            continue
        scores = iter(subject.likelihood.score([part for *_, parts in waiting for part in parts]))
        for key, size, tokens, parts in waiting:
            nats = -math.fsum(next(scores).logprob for _ in parts)
            row = {"nats": nats, "bytes": size, "tokens": tokens}
            store.add(key, row | {"seconds": round(clock.tick(tokens), 4)})
        waiting = []
    clock.finish()


def ratio_interval(above: list[float], below: list[float]) -> Interval:
    """For sum(above) / sum(below) over documents drawn at random: the delta method, t with n - 1 degrees."""
    count = len(above)
    if count < 2:
        return UNKNOWN
    ratio = sum(above) / sum(below)
    spread = math.fsum((a - ratio * b) ** 2 for a, b in zip(above, below, strict=True))
    half = t_quantile(0.95, count - 1) * math.sqrt(spread * count / (count - 1)) / sum(below)
    return ratio - half, ratio + half


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
