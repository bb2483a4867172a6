"""The server's process: listening, and ending politely.

On SIGTERM or SIGINT nothing new is taken (/ready says so at once, for the balancer), what runs may finish for `drain`
seconds, and the exit code is 0. A second signal ends it at once. A dead engine ends it with 1: something outside
should start it anew.
"""

import asyncio
import logging
import socket
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from ...errors import UserError
from .errors import Unavailable
from .service import Service

logger = logging.getLogger(__name__)

LAST_WORDS = 5  # seconds for streams to send their last event
TICK = 0.1  # seconds between two looks at the engine, and at what still runs


async def serve(app: Starlette, listener: socket.socket, drain: float = 30.0) -> int:
    """Serve an application of `create_app` until a signal comes or the engine dies; the exit code.

    listener: see `listen`. drain: seconds. To be awaited on the main thread, which gets the signals.
    """
    server = Server(app, drain)
    host, port = listener.getsockname()[:2]
    logger.info("serving on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    await server.serve([listener])
    return 1 if server.engine_died else 0


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises UserError."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=2048)
        # Connections inherit it; asyncio sets it only where a socket names its protocol. Else the first token waits
        # some 40 ms for the client to acknowledge the head of the answer.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except (OSError, OverflowError) as error:
        why = error.strerror if isinstance(error, OSError) else "there is no such port"
        raise UserError(f"cannot listen on {host}, port {port} ({why}); choose another one") from None


class Server(uvicorn.Server):
    """uvicorn's server, which goes on listening while it drains. engine_died: why it ended."""

    def __init__(self, app: Starlette, drain: float) -> None:
        config = uvicorn.Config(
            app,
            lifespan="off",
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=LAST_WORDS,
        )
        super().__init__(config)
        self._service: Service = app.state.service
        self._drain = drain
        self.engine_died = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal. uvicorn would raise it again at the end, and so end the process with its code."""
        if self._service.gate.draining:
            self.should_exit = self.force_exit = True
        self._service.gate.draining = True

    async def main_loop(self) -> None:
        watching = asyncio.create_task(self._watch())
        try:
            await super().main_loop()
        finally:
            watching.cancel()

    async def _watch(self) -> None:
        """Ask for the end when it is time."""
        service = self._service
        while not service.gate.draining:
            await asyncio.sleep(TICK)
            if not service.client.alive:
                logger.error("the engine is gone; the server ends")
                self.engine_died = service.gate.draining = True
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (LAST_WORDS if self.engine_died else self._drain)
        logger.info("taking no new requests; %d are under way", service.gate.running)
        while service.gate.running and loop.time() < deadline:
            await asyncio.sleep(TICK)
            self.engine_died = self.engine_died or not service.client.alive
        why = Unavailable("the server ends and could not wait for this text", code="draining")
        if self.engine_died:
            why = Unavailable("the engine is gone; ask another server", code="engine_dead")
        for generation in list(service.generations):
            generation.fail(why)
        self.should_exit = True
