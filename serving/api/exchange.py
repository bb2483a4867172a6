"""One HTTP exchange: the body comes in whole and bounded, the answer goes out whole or as a stream of events.

All the while somebody listens whether the client hangs up; then whatever was computed for it is cancelled, streaming or
not. A client that does not take what it is sent is treated as gone, too.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .auth import Tenant
from .errors import ApiError, ClientGone, ServerFault, TooSlow
from .limits import read_body
from .patience import Patience
from .service import Service

logger = logging.getLogger(__name__)

ENCODER = msgspec.json.Encoder()
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def event(value: Any) -> bytes:
    """A server-sent event whose data is `value` as JSON, which has no line breaks."""
    return b"data: " + ENCODER.encode(value) + b"\n\n"


class Json(Response):
    """A struct as the whole answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return ENCODER.encode(content)


@dataclass
class Call:
    """A request that is being answered. body: all of it. patience: with a client that makes no room."""

    service: Service
    tenant: Tenant
    body: bytes
    scope: Scope
    receive: Receive
    send: Send
    patience: Patience

    async def answer(self, value: Any) -> None:
        await Json(value)(self.scope, self.receive, self._send)

    async def stream(self, frames: AsyncGenerator[bytes, None]) -> None:
        """Send frames as they come. An error among them is the last event; the status is long gone by then."""
        await self._send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        try:
            async with aclosing(frames):
                async for frame in frames:
                    await self._frame(frame)
        except ApiError as error:
            await self._frame(event(error.body))
        except ClientGone:
            raise
        except Exception:
            logger.exception("a stream failed")
            await self._frame(event(ServerFault("the server made a mistake; its log tells more").body))
        await self._frame(DONE)
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _frame(self, frame: bytes) -> None:
        await self._send({"type": "http.response.body", "body": frame, "more_body": True})

    async def _send(self, message: Any) -> None:
        try:
            with self.patience:
                await self.send(message)
        except (TimeoutError, OSError):
            raise ClientGone from None


class Post:
    """An ASGI endpoint that reads the body and hands the call to `answer`."""

    def __init__(self, service: Service, answer: Callable[[Call], Awaitable[None]]) -> None:
        self._service, self._answer = service, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        settings = self._service.settings
        try:
            async with asyncio.timeout(settings.slow_sender):
                body = await read_body(Headers(scope=scope), receive, settings.max_body)
        except TimeoutError:
            raise TooSlow("the body did not come in", headers={"Connection": "close"}) from None
        patience = Patience(settings.slow_reader)
        try:
            call = Call(self._service, scope["state"]["tenant"], body, scope, receive, send, patience)
            await while_connected(receive, self._answer(call))
        finally:
            patience.close()


async def while_connected(receive: Receive, work: Awaitable[None]) -> None:
    """Run `work` to its end; cancel it and raise ClientGone if the client hangs up before."""
    working, listening = asyncio.ensure_future(work), asyncio.ensure_future(_hung_up(receive))
    try:
        await asyncio.wait((working, listening), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        working.result()
    finally:
        working.cancel()
        listening.cancel()
        await asyncio.gather(working, listening, return_exceptions=True)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
