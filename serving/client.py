"""The engine as an asyncio program sees it: `EngineClient` over the socket to the engine's process.

What comes goes to the mailbox of its request. One that nobody empties does not grow without bound: outputs of one
request that wait are merged into one.
"""

import asyncio
import contextlib
import socket
import subprocess
import time
from collections.abc import AsyncGenerator
from typing import cast

from ..core.sampling_params import SamplingParams
from ..errors import UserError
from .messages import (
    Abort,
    Add,
    Close,
    EngineDied,
    EngineInfo,
    FromEngine,
    Output,
    Refused,
    RequestRefused,
    Stats,
    ToEngine,
)
from .wire import Wire

SILENCE = 30.0


class Mailbox:
    """What has come for a request and was not taken yet: one output, to which later ones are added."""

    def __init__(self) -> None:
        self.waiting: Output | None = None
        self.refused: str | None = None
        self.arrived = asyncio.Event()

    def put(self, output: Output) -> None:
        if self.waiting is None:
            self.waiting = output
        else:
            self.waiting.add(output)
        self.arrived.set()


class SocketClient(asyncio.Protocol):
    """See messages.EngineClient. process: the engine's, to be watched and, at the end, waited for. silence: seconds
    without a sign of life after which the engine counts as dead: longer than any step."""

    def __init__(
        self, link: socket.socket, process: "subprocess.Popen[bytes] | None" = None, silence: float = SILENCE
    ) -> None:
        self._wire: Wire[FromEngine] = Wire(link, FromEngine)  # type: ignore[arg-type]
        self._link, self._process, self._silence = link, process, silence
        self._boxes: dict[int, Mailbox] = {}
        self._next = 1
        self._dead = False
        self._heard = time.monotonic()
        self._ready: asyncio.Future[EngineInfo] | None = None
        self._ended = asyncio.Event()
        self._transport: asyncio.Transport | None = None
        self.info = EngineInfo("", 0, 0, 0, 0, "")
        self.stats = Stats()

    @property
    def alive(self) -> bool:
        return not self._dead and time.monotonic() - self._heard < self._silence

    async def start(self) -> EngineInfo:
        """Wait until the engine has loaded its model. Raises UserError with what it says if it cannot."""
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        await loop.create_unix_connection(lambda: self, sock=self._link)
        self.info = await self._ready
        self._heard = time.monotonic()
        return self.info

    # Called by the event loop -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._heard = time.monotonic()
        try:
            for message in self._wire.feed(data):
                self._take(message)
        except EOFError:
            assert self._transport is not None
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._died()

    # What comes, and what goes ----------------------------------------------------------------------------------------

    def _take(self, message: FromEngine) -> None:
        if isinstance(message, Stats):
            self.stats = message
        elif isinstance(message, Output):
            if (box := self._boxes.get(message.id)) is not None:
                box.put(message)
        elif isinstance(message, EngineInfo):
            if self._ready is not None and not self._ready.done():
                self._ready.set_result(message)
        elif isinstance(message, Refused):
            if self._ready is not None and not self._ready.done():
                self._ready.set_exception(UserError(message.error))
            elif (box := self._boxes.get(message.id)) is not None:
                box.refused = message.error
                box.arrived.set()

    def _died(self) -> None:
        self._dead = True
        self._ended.set()
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(
                UserError("the engine's process ended while it loaded the model; see its log above")
            )
        for box in self._boxes.values():
            box.arrived.set()

    def _send(self, message: ToEngine) -> None:
        """Does not wait: what the socket does not take at once is kept, and written whole before anything else."""
        if self._dead or self._transport is None:
            raise EngineDied("the engine's process has ended")
        self._transport.write(self._wire.packed(message))

    async def stream(
        self,
        prompt: list[int],
        params: SamplingParams,
        salt: bytes = b"",
        timeout: float | None = None,
        whole: bool = False,
    ) -> AsyncGenerator[Output, None]:
        id, self._next = self._next, self._next + 1
        box = self._boxes[id] = Mailbox()
        finished = False
        try:
            self._send(Add(id, prompt, params, salt, timeout, whole))
            while not finished:
                if not self._dead:
                    await box.arrived.wait()
                    box.arrived.clear()
                output, box.waiting = box.waiting, None
                if output is not None:
                    finished = output.finish is not None
                    yield output
                elif box.refused is not None:
                    finished = True
                    raise RequestRefused(box.refused)
                elif self._dead:
                    raise EngineDied("the engine's process has ended")
        finally:
            del self._boxes[id]
            if not finished and not self._dead:
                self._send(Abort(id))

    async def close(self, drain: bool = False) -> int:
        """End the engine's process; its exit code. One that does not listen is killed: it still loads, or hangs."""
        listens = self.alive and self.info.capacity > 0
        if self._process is not None and not self._dead and not listens:
            self._process.kill()
        elif not self._dead:
            with contextlib.suppress(EngineDied):
                self._send(Close(drain))
        if self._transport is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), None if drain else 10)
            self._transport.abort()
        self._link.close()
        if self._process is None:
            return 0
        try:
            return await asyncio.to_thread(self._process.wait, 10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return await asyncio.to_thread(self._process.wait)
