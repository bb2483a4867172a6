"""A server of the tests in front of the fake engine, and ways to call it without a socket."""

import asyncio
import json
from collections.abc import Coroutine
from typing import Any, TypeVar

import httpx
from fake_engine import FakeEngine, Script, spell
from starlette.applications import Starlette
from tiny_model import TOKENIZER

from dsv3.serving.api.app import create_app
from dsv3.serving.api.settings import Settings

T = TypeVar("T")
HELLO = {"messages": [{"role": "user", "content": "the cat"}]}
SECRET = b"a secret of these tests"


def says(*segments: str, **script: Any) -> FakeEngine:
    """An engine that answers everything with this text."""
    return FakeEngine(TOKENIZER, Script(spell(TOKENIZER, *segments), **script))


def server(engine: FakeEngine, format: str | None = "v3", **settings: Any) -> Starlette:
    settings = {"models": ("tiny", "alias"), "secret": SECRET, "format": format} | settings
    return create_app(engine, TOKENIZER, Settings(**settings))


def run(work: Coroutine[Any, Any, T], seconds: float = 20.0) -> T:
    return asyncio.run(asyncio.wait_for(work, seconds))


def call(app: Starlette, path: str, body: Any = None, method: str = "", **headers: str) -> httpx.Response:
    """One request. body: JSON, or bytes that are sent as they are."""
    return run(acall(app, path, body, method, **headers))


async def acall(app: Starlette, path: str, body: Any = None, method: str = "", **headers: str) -> httpx.Response:
    transport = httpx.ASGITransport(app, raise_app_exceptions=True)
    sent = {"Content-Type": "application/json"} if body is not None else {}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    content = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.request(method or ("GET" if body is None else "POST"), path, content=content, headers=sent)


def chat(app: Starlette, **fields: Any) -> httpx.Response:
    return call(app, "/v1/chat/completions", HELLO | fields)


def complete(app: Starlette, prompt: Any = "the cat", **fields: Any) -> httpx.Response:
    return call(app, "/v1/completions", {"prompt": prompt} | fields)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """What a stream said, which must be framed as it should be."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = response.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    assert all(frame.startswith("data: {") and "\n" not in frame for frame in frames[:-2] if frame != ": keep-alive")
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2] if frame != ": keep-alive"]


def joined(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """Chunks of a chat put together as clients do it: the choice that they add up to."""
    message: dict[str, Any] = {"content": ""}
    choice: dict[str, Any] = {"message": message, "logprobs": None}
    for chunk in chunks:
        for part in chunk["choices"]:
            if part["index"] != index:
                continue
            delta = dict(part["delta"])
            for call in delta.pop("tool_calls", []):
                calls = message.setdefault("tool_calls", [])
                if call["index"] == len(calls):
                    calls.append({"function": {"name": call["function"]["name"], "arguments": ""}, "id": call["id"]})
                    calls[-1]["type"] = call["type"]
                here = calls[call["index"]]
                here["function"]["arguments"] += call.get("function", {}).get("arguments", "")
                if "complete" in call:
                    here["complete"] = call["complete"]
            for name, value in delta.items():
                message[name] = value if name == "role" else message.get(name, "") + value
            if part["logprobs"] is not None:
                choice["logprobs"] = choice["logprobs"] or {"content": []}
                choice["logprobs"]["content"] += part["logprobs"]["content"]
            if part["finish_reason"] is not None:
                choice |= {name: part[name] for name in ("finish_reason", "stop_reason", "seed", "index")}
    return choice


class Wire:
    """One request at the level of ASGI, for what a client library cannot do: hang up, read slowly, send slowly.

    messages: what the server sent. reading: clear it, and the server's sends block.
    """

    def __init__(self, app: Starlette, path: str, body: Any, chunks: list[bytes] | None = None, **headers: str) -> None:
        self.app, self.messages = app, list[Any]()
        self.reading = asyncio.Event()
        self.reading.set()
        self.taken = 0
        self._incoming: asyncio.Queue[Any] = asyncio.Queue()
        parts = chunks if chunks is not None else [json.dumps(body).encode()]
        for number, part in enumerate(parts):
            self._incoming.put_nowait({"type": "http.request", "body": part, "more_body": number < len(parts) - 1})
        named = {"content-type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(name.encode(), value.encode()) for name, value in named.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }

    async def _receive(self) -> Any:
        self.taken += 1
        return await self._incoming.get()

    async def _send(self, message: Any) -> None:
        await self.reading.wait()
        self.messages.append(message)

    def start(self) -> asyncio.Task[None]:
        return asyncio.create_task(self.app(self.scope, self._receive, self._send))

    def hang_up(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.messages).decode()


async def until(condition: Any, seconds: float = 5.0) -> None:
    """Wait until it holds."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)
