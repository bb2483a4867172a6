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

LAST_WORDS = 5.0  # seconds for streams to send their last event
TICK = 0.1  # seconds between two looks at the engine


def serve(app: Starlette, host: str = "127.0.0.1", port: int = 8000, drain: float = 30.0) -> int:
    """Serve an application of `create_app` until a signal comes or the engine dies; the exit code.

    port: 0 takes a free one; the log names it. Raises UserError if it cannot be had.
    """
    try:
        listener = socket.create_server((host, port), family=_family(host), backlog=2048)
    except OSError as error:
        raise UserError(f"cannot listen on {host} port {port} ({error.strerror}); choose another with --port") from None
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_level="info",
        access_log=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=int(LAST_WORDS),
    )
    server = Server(config, app.state.service, drain)
    shown = f"[{host}]" if ":" in host else host
    logger.info("serving on http://%s:%d", shown, listener.getsockname()[1])
    server.run([listener])
    return 1 if server.engine_died else 0


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


class Server(uvicorn.Server):
    """uvicorn's server, that goes on listening while it drains. engine_died: why it ended."""

    def __init__(self, config: uvicorn.Config, service: Service, drain: float) -> None:
        super().__init__(config)
        self._service, self._drain = service, drain
        self.engine_died = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
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
        for generation in list(service.generations):
            generation.fail(Unavailable("the server ends and could not wait for this text", code="draining"))
        self.should_exit = True
