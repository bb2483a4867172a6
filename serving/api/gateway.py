"""What surrounds every route: a name for the request, who sends it, and an answer for whatever goes wrong."""

import logging
import re
import secrets
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import ApiError, ClientGone, NotFound, ServerFault, WrongMethod
from .exchange import Json
from .service import Service

logger = logging.getLogger(__name__)

OPEN = frozenset({"/health", "/ready"})
"""The routes that need no key. Every other one does, those that do not exist included."""


class Gateway:
    """ASGI middleware: X-Request-Id, the key, the last resort for exceptions.

    The request's id is the client's if it is harmless, else drawn. open_paths: need no key, besides `OPEN`.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._keys = app, service.keys
        self._open = OPEN | ({"/metrics"} if service.settings.open_metrics else set())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":  # a websocket; there are none here
            return await send({"type": "websocket.close", "code": 1008})
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        name = given if re.fullmatch(r"[A-Za-z0-9._-]{1,128}", given) else secrets.token_hex(16)
        started = False

        async def named(message: Any) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["X-Request-Id"] = name
            await send(message)

        try:
            if scope["path"] not in self._open:
                scope.setdefault("state", {})["tenant"] = self._keys.tenant(headers)
            await self._app(scope, receive, named)
        except ClientGone:
            return
        except ApiError as error:
            if not started:
                await answer(error)(scope, receive, named)
        except Exception:
            logger.exception("request %s failed", name)
            if not started:
                await answer(ServerFault("the server made a mistake; its log tells more"))(scope, receive, named)


def answer(error: ApiError) -> Response:
    return Json(error.body, error.status, headers=error.headers)


async def http_error(request: Request, error: Exception) -> Response:
    """What the router refuses, in the form of all errors."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        return answer(WrongMethod("this path does not take this method", headers=dict(error.headers or {})))
    return answer(NotFound("there is nothing at this path"))
