"""The folder of a quickstart: whose it is, who is at work in it, and how long each stage took."""

import fcntl
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from ..core.files import atomic_write
from ..errors import UserError

FACTS = "quickstart.json"
PATIENCE = 30.0  # seconds that a run which was told to stop may take


class Folder:
    """`path`, made where it is missing and locked for one process (and its children) at a time. A context manager.

    facts: the seed, the seconds of each stage, and what `note` adds; kept in quickstart.json, the mark of a folder that
    is ours. lock: the descriptor that holds the lock. Raises UserError for a folder with other files in it, one of
    another seed, one in use, and a place where nothing can be written.
    """

    def __init__(self, path: Path, seed: int, say: Callable[[str], None]) -> None:
        self.path, self._say, self.lock = path, say, -1
        self.facts: dict[str, Any] = {"seed": seed, "seconds": {}}

    def __enter__(self) -> "Folder":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); choose another --out") from error
        try:
            self._wait_for_lock()
            self._open()
        except BaseException:
            os.close(self.lock)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.lock)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the block's seconds to those of `stage`, interrupted or not."""
        began = time.monotonic()
        try:
            yield
        finally:
            seconds = self.facts["seconds"]
            self.note("seconds", seconds | {stage: round(seconds.get(stage, 0) + time.monotonic() - began, 2)})

    def note(self, key: str, value: Any) -> None:
        self.facts[key] = value
        with atomic_write(self.path / FACTS, "w") as file:
            json.dump(self.facts, file)

    def _open(self) -> None:
        seed = self.facts["seed"]
        file = self.path / FACTS
        if not file.exists():
            others = sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith(f".{FACTS}."))
            if others:
                raise UserError(f"{self.path} holds {others[0]!r}, which is not quickstart's: choose another --out")
            self.note("seed", seed)
            return
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            found_seed, found["seconds"] = found["seed"], dict(found["seconds"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} cannot be read ({error}): delete {self.path}, or choose another --out") from error
        if found_seed != seed:
            raise UserError(f"{self.path} was begun with --seed {found_seed}, not {seed}: choose another --out")
        self.facts = found

    def _wait_for_lock(self) -> None:
        deadline, told = time.monotonic() + PATIENCE, False
        while True:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(f"{self.path}: another quickstart is at work there; wait, or stop it") from None
            if not told:
                self._say(f"waiting for another quickstart in {self.path} to stop")
                told = True
            time.sleep(0.2)


@contextmanager
def exceptions_for_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP (the terminal was closed) interrupt like Ctrl-C while the block runs. Main thread only."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
