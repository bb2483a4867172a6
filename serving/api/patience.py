"""A limit of time for what is done again and again: a send per token, a wait for each next one."""

import asyncio
from types import TracebackType


class Patience:
    """`with patience:` raises TimeoutError in what the block awaits once it has taken `seconds`; never two at a time.

    As asyncio.timeout, but a block that is left in time costs no timer: one timer goes off now and then, and looks
    whether a block that it finds was entered long ago. `close` takes that away.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[object] | None = None  # that is in the block
        self._since = 0.0
        self._cancelling = 0
        self._over = False

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        assert self._task is not None
        self._cancelling = self._task.cancelling()
        self._since = self._loop.time()
        if self._timer is None:
            self._arm()

    def _arm(self) -> None:
        self._timer = self._loop.call_at(self._since + self._seconds, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._task is None:
            return
        if self._loop.time() < self._since + self._seconds:
            self._arm()
        else:
            self._over = True
            self._task.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        if self._over:
            self._over = False
            assert task is not None
            if task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
                raise TimeoutError from error

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
