"""The engine as an asyncio program sees it: `EngineClient` over the socket to the engine's process.

One task reads; every request has a queue of what came for it. A queue that nobody empties does not grow without bound:
outputs of one request that wait are merged into one.
"""

import asyncio
import contextlib
import socket
import subprocess
import time
from collections.abc import AsyncGenerator

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
        first = self.waiting
        if first is None:
            self.waiting = output
        else:
            self.waiting = Output(
                first.id, first.tokens + output.tokens, first.logprobs + output.logprobs, first.top + output.top,
                output.finish, output.stop_reason, output.error, first.cached or output.cached, output.seed,
                first.prompt_logprobs + output.prompt_logprobs, first.prompt_top + output.prompt_top, first.queued,
            )  # fmt: skip
        self.arrived.set()


class SocketClient:
    """See messages.EngineClient. process: the engine's, to be watched and, at the end, waited for. silence: seconds
    without a sign of life after which the engine counts as dead: longer than any step."""

    def __init__(
        self, link: socket.socket, process: "subprocess.Popen[bytes] | None" = None, silence: float = SILENCE
    ) -> None:
        link.setblocking(False)
        self._wire: Wire[FromEngine] = Wire(link, FromEngine)  # type: ignore[arg-type]
        self._link, self._process, self._silence = link, process, silence
        self._boxes: dict[int, Mailbox] = {}
        self._next = 1
        self._dead = False
        self._heard = time.monotonic()
        self._ready: asyncio.Future[EngineInfo] | None = None
        self._reader: asyncio.Task[None] | None = None
        self._outgoing = asyncio.Lock()
        self.info = EngineInfo("", 0, 0, 0, 0, "")
        self.stats = Stats()

    @property
    def alive(self) -> bool:
        return not self._dead and time.monotonic() - self._heard < self._silence

    async def start(self) -> EngineInfo:
        """Wait until the engine has loaded its model. Raises UserError with what it says if it cannot."""
        self._ready = asyncio.get_running_loop().create_future()
        self._reader = asyncio.create_task(self._read())
        self.info = await self._ready
        self._heard = time.monotonic()
        return self.info

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                fresh = await loop.sock_recv(self._link, 1 << 18)
                if not fresh:
                    break
                self._heard = time.monotonic()
                for message in self._wire.feed(fresh):
                    self._take(message)
        except OSError:
            pass
        finally:
            self._died()

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
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(
                UserError("the engine's process ended while it loaded the model; see its log above")
            )
        for box in self._boxes.values():
            box.arrived.set()

    async def _send(self, message: object) -> None:
        """Whoever is cancelled meanwhile, it is sent whole: half a message would make nonsense of all that follow."""
        if self._dead:
            raise EngineDied("the engine's process has ended")
        sending = asyncio.ensure_future(self._write(message))
        sending.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(sending)

    async def _write(self, message: object) -> None:
        async with self._outgoing:
            try:
                await asyncio.get_running_loop().sock_sendall(self._link, self._wire.packed(message))
            except OSError:
                self._died()
                raise EngineDied("the engine's process has ended") from None

    async def stream(
        self, prompt: list[int], params: SamplingParams, salt: bytes = b"", timeout: float | None = None
    ) -> AsyncGenerator[Output, None]:
        id, self._next = self._next, self._next + 1
        box = self._boxes[id] = Mailbox()
        finished = False
        try:
            await self._send(Add(id, prompt, params, salt, timeout))
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
                self._abort(id)

    def _abort(self, id: int) -> None:
        """Of a generator that is being closed: nothing may be awaited there."""
        task = asyncio.ensure_future(self._send(Abort(id)))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def close(self, drain: bool = False) -> int:
        """End the engine's process; its exit code. One that does not listen is killed: it still loads, or hangs."""
        listens = self.alive and self.info.capacity > 0
        if self._process is not None and not self._dead and not listens:
            self._process.kill()
        elif not self._dead:
            with contextlib.suppress(EngineDied):
                await self._send(Close(drain))
        if self._reader is not None:
            await asyncio.wait([self._reader], timeout=None if drain else 10)
            self._reader.cancel()
        self._link.close()
        if self._process is None:
            return 0
        try:
            return await asyncio.to_thread(self._process.wait, 10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return await asyncio.to_thread(self._process.wait)
