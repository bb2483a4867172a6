"""What the engine's process sends to the server, which may be behind: the engine never waits for it.

Whatever cannot be written, and whatever nobody needs yet, is gathered: the outputs of a request become one, so that a
server that is behind has less to do, not more. A message costs the server a wake-up, and where no core is free it
costs the engine one, too.
"""

import socket
from collections.abc import Iterable
from typing import Any

from .messages import FromEngine, Output, Refused, Stats
from .wire import Wire


class Outbox:
    """behind: the server has not taken yet what it was sent, so that nothing more is sent."""

    def __init__(self, wire: Wire[Any]) -> None:
        self._wire = wire
        self._waiting: dict[int, Output] = {}
        self._whole: set[int] = set()  # ids whose tokens nobody reads as they come
        self._begun: set[int] = set()  # those of them that have sent a token
        self._rest = b""  # of a write that the socket took a part of

    @property
    def behind(self) -> bool:
        return bool(self._rest)

    def open(self, id: int, whole: bool) -> None:
        """A request begins. whole: see messages.Add."""
        if whole:
            self._whole.add(id)

    def drop(self, id: int) -> None:
        """Nobody wants to hear of this request any more."""
        self._waiting.pop(id, None)
        self._close(id)

    def _close(self, id: int) -> None:
        self._whole.discard(id)
        self._begun.discard(id)

    def put(self, outputs: Iterable[Output]) -> None:
        for output in outputs:
            if (before := self._waiting.get(output.id)) is None:
                self._waiting[output.id] = output
            else:
                before.add(output)

    def send(self, stats: Stats | None = None) -> None:
        """What is due, in one write: a step of 256 requests must not cost 256 calls of the system. With `stats` all is
        due, and they go along.

        A text that nobody reads as it grows is due with its first tokens, which end its waiting, and with its last.
        """
        if self._rest:
            self._write(self._rest)
        if self._rest:
            return
        due = list(self._waiting.values())
        if stats is None and self._begun:
            due = [output for output in due if output.finish is not None or output.id not in self._begun]
        messages: list[FromEngine] = []
        for output in due:
            del self._waiting[output.id]
            if output.finish is not None:
                self._close(output.id)
            elif output.tokens and output.id in self._whole:
                self._begun.add(output.id)
            messages.append(Refused(output.id, output.error or "") if output.finish == "refused" else output)
        if stats is not None:
            messages.append(stats)
        if messages:
            self._write(b"".join(map(self._wire.packed, messages)))

    def _write(self, data: bytes) -> None:
        try:
            sent = self._wire.link.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        self._rest = data[sent:]

    def finish(self, stats: Stats) -> None:
        """Send all that is left, however long that takes."""
        self._wire.link.sendall(self._rest)
        self._rest = b""
        self.send(stats)
        self._wire.link.sendall(self._rest)
