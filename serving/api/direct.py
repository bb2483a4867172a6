"""The application called in its own process, without a socket: for files of requests."""

import asyncio
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers

SERVER = ("dsv3", 80)  # what ASGI wants to be told, and nobody here reads


@dataclass(frozen=True)
class Answer:
    """What the server would send. request_id: as in its header X-Request-Id."""

    status: int
    request_id: str
    body: bytes


async def post(app: Starlette, path: str, body: bytes) -> Answer:
    """POST JSON and wait for the whole answer. Cancelled, what is computed for it is given up."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json")],
        "client": SERVER,
        "server": SERVER,
    }
    sent = False
    status, headers, parts = 0, Headers(), list[bytes]()

    async def receive() -> Any:
        nonlocal sent
        if sent:
            await asyncio.Event().wait()  # a client that waits for its answer and never hangs up
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status, headers = message["status"], Headers(raw=message["headers"])
        else:
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    return Answer(status, headers["x-request-id"], b"".join(parts))
