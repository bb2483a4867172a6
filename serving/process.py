"""The engine's process: reads requests from its socket, steps, and writes what comes of it.

Between two steps it takes what has arrived, so that an abort takes effect within one step, and sends what is due, but
never waits for a server that is behind. A step that fails costs the requests that ran; when steps keep failing, or the
other side has gone, the process ends. It shows a sign of life at least every `HEARTBEAT` seconds while it is not
computing.
"""

import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable

from ..parallel.channel import PeerLost
from .engine import Engine
from .messages import Abort, Add, Close, EngineInfo, Output, Refused, RequestRefused, ToEngine
from .outbox import Outbox
from .wire import Wire

HEARTBEAT = 0.5  # seconds
STATS_EVERY = 0.1  # seconds, at most
FAILURES = 3  # steps in a row that may fail

logger = logging.getLogger(__name__)


def serve(link: socket.socket, make: Callable[[], tuple[Engine, EngineInfo]]) -> int:
    """Run until told to close; the exit code. `make` loads the model: what it raises is told in one line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the server, which closes this in good order
    wire: Wire[ToEngine] = Wire(link, ToEngine)  # type: ignore[arg-type]
    try:
        engine, info = make()
    except Exception as error:
        return 2 if _told(wire, Refused(0, f"{error}")) else 1
    try:
        return Loop(wire, engine).run() if _told(wire, info) else 1
    finally:
        engine.close()


def _told(wire: Wire[ToEngine], message: EngineInfo | Refused) -> bool:
    """False: the server has ended while the model was loaded."""
    try:
        wire.send(message)
    except ConnectionError:
        return False
    return True


class Loop:
    def __init__(self, wire: Wire[ToEngine], engine: Engine) -> None:
        self.wire, self.engine, self.outbox = wire, engine, Outbox(wire)
        self.closing = self.draining = False
        self.failures = 0
        self.next_stats = 0.0

    def run(self) -> int:
        try:
            while not self.closing:
                if self.draining and self.engine.idle:
                    self.outbox.finish(self.engine.stats())
                    return 0
                self.engine.runner.beat()
                self._hear(0.0 if self._busy() else HEARTBEAT)
                healthy = self.engine.idle or self._step()
                self._report()
                if not healthy:
                    return 3
        except (EOFError, ConnectionError):
            return 1  # nobody is left to work for
        except PeerLost as lost:
            logger.error("%s", lost)
            return 3
        return 0

    def _step(self) -> bool:
        """False: steps keep failing."""
        try:
            outputs = self.engine.step()
            self.failures = 0
        except PeerLost:
            raise
        except Exception:
            logger.exception("a step failed")
            self.failures += 1
            outputs = self.engine.fail("the engine failed in this step; try again")
        self.outbox.put(outputs)
        return self.failures < FAILURES

    def _busy(self) -> bool:
        """Is there something to compute, or only a guide to wait for?"""
        scheduler = self.engine.scheduler
        return not scheduler.idle or self.engine.under_way is not None

    def _hear(self, patience: float) -> None:
        if not self._busy() and self.engine.compiling:
            patience = min(patience, 0.002)
        link = self.wire.link
        while True:
            # While the server is behind, what it makes room for is sent, even if there is nothing to compute.
            readable, writable, _ = select.select([link], [link] if self.outbox.behind else [], [], patience)
            if writable:
                self.outbox.send()
            if not readable:
                return
            for message in self.wire.read():
                self._obey(message)
            patience = 0.0

    def _obey(self, message: ToEngine) -> None:
        if isinstance(message, Add):
            self.outbox.open(message.id, message.whole)
            try:
                self.engine.add(message)
            except RequestRefused as refused:
                self.outbox.put([Output(message.id, finish="refused", error=str(refused))])
        elif isinstance(message, Abort):
            self.engine.abort(message.id)
            self.outbox.drop(message.id)
        elif isinstance(message, Close):
            self.draining, self.closing = True, not message.drain

    def _report(self) -> None:
        """Send what is due; a few times a second, and with the end of the last request, with what the engine counts."""
        now = time.monotonic()
        due = now >= self.next_stats or self.engine.idle
        if due:
            self.next_stats = now + STATS_EVERY
        self.outbox.send(self.engine.stats() if due else None)


def main(descriptor: int, make: Callable[[], tuple[Engine, EngineInfo]]) -> None:
    """Entry of a child process that was given one end of a socket pair."""
    code = serve(socket.socket(fileno=descriptor), make)
    os._exit(code)  # libraries' threads are not waited for
