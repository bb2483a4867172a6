"""How far a task is, how fast, and how long it will take."""

import time

from .subject import Progress


class Clock:
    """Counts what is finished of `total`, of which `done` was there before.

    Time is shared out as things are finished, so that the times kept with them add up to the time that all took.
    """

    def __init__(self, name: str, total: int, done: int, what: str, progress: Progress) -> None:
        self.name, self.total, self.done, self.what, self.progress = name, total, done, what, progress
        self._fresh, self._tokens = 0, 0
        self._begin = self._last = time.perf_counter()
        if done and done < total:
            progress.say(f"{name}: {done} of {total} {what} are there already")

    def tick(self, tokens: int) -> float:
        """One more is finished -> seconds since the last one was."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self.done += 1
        self._fresh += 1
        self._tokens += tokens
        self.progress.show(self._line())
        return seconds

    def finish(self) -> None:
        if self._fresh:
            self.progress.show(self._line(), final=True)

    def _line(self) -> str:
        spent = max(self._last - self._begin, 1e-9)
        left = round(spent / self._fresh * (self.total - self.done))
        return (
            f"{self.name} | {self.done:,}/{self.total:,} {self.what} | {self._tokens / spent:,.0f} tok/s | "
            f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
        )
