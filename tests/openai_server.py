"""A server with OpenAI's API on a thread of the test, that answers as it is told to, misbehaviour included."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Handler = BaseHTTPRequestHandler


def completion(
    content: str | None, finish: str | None = "stop", tokens: int | None = 3, **message: Any
) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
        ]
    }
    return answer if tokens is None else answer | {"usage": {"completion_tokens": tokens, "prompt_tokens": 1}}


def last_words(body: dict[str, Any]) -> str:
    return body["messages"][-1]["content"]


class Server:
    """base: what an Endpoint is given. bodies, keys: what came, in order. plan: misbehaviour for the next requests,
    taken from the front; each is called with the HTTP handler in place of an answer. answer: the answer to a body."""

    def __init__(self, port: int = 0) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []
        self.models: list[str] | None = ["tutor"]
        self.plan: list[Callable[[Handler], None]] = []
        self.key: str | None = None
        self.answer: Callable[[dict[str, Any]], dict[str, Any]] = lambda body: completion("to " + last_words(body))
        self.under_way = self.most_under_way = 0
        self._lock = threading.Lock()
        server = self

        class Handling(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                if self.path == "/v1/models" and server.models is not None:
                    if server.key is not None and self.headers.get("Authorization") != f"Bearer {server.key}":
                        return send(self, 401, {"error": {"message": "who are you?"}})
                    return send(self, 200, {"data": [{"id": name} for name in server.models]})
                return send(self, 404, {"detail": "Not Found"})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server._lock:
                    server.bodies.append(body)
                    server.keys.append(self.headers.get("Authorization"))
                    server.times.append(time.monotonic())
                    trick = server.plan.pop(0) if server.plan else None
                    server.under_way += 1
                    server.most_under_way = max(server.most_under_way, server.under_way)
                with ExitStack() as under_way:
                    under_way.callback(server._answered)
                    if trick is not None:
                        return trick(self)
                    if self.path != "/v1/chat/completions":
                        return send(self, 404, {"detail": "Not Found"})
                    if server.key is not None and self.headers.get("Authorization") != f"Bearer {server.key}":
                        return send(self, 401, {"error": {"message": f"wrong key {self.headers.get('Authorization')}"}})
                    if server.models is not None and body["model"] not in server.models:
                        return send(self, 404, {"error": {"message": "no such model"}})
                    answer = server.answer(body)
                    under_way.close()  # who has the answer may ask the next question at once
                    return send(self, 200, answer)

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

            def handle_error(self, *args: object) -> None:
                pass  # clients that have gone

        self._http = Quiet(("127.0.0.1", port), Handling)
        self.port = self._http.server_address[1]
        self.base = f"http://127.0.0.1:{self.port}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def _answered(self) -> None:
        with self._lock:
            self.under_way -= 1

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@contextmanager
def serving(port: int = 0) -> Iterator[Server]:
    server = Server(port)
    try:
        yield server
    finally:
        server.close()


def send(handler: Handler, status: int, content: Any, **headers: str) -> None:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(data)))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)


# Misbehaviour.


def fails(status: int, said: str = "oh no", **headers: str) -> Callable[[Handler], None]:
    return lambda handler: send(handler, status, {"error": {"message": said}}, **headers)


def hangs_up(handler: Handler) -> None:
    handler.close_connection = True
    handler.connection.close()


def breaks_off(handler: Handler) -> None:
    """Half of the answer that it announced."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.wfile.flush()
    hangs_up(handler)


def breaks_off_in_chunks(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b'5\r\n{"cho\r\n')
    handler.wfile.flush()
    hangs_up(handler)


def babbles(handler: Handler) -> None:
    send(handler, 200, b"<html>gateway</html>")


def sleeps(seconds: float) -> Callable[[Handler], None]:
    def trick(handler: Handler) -> None:
        time.sleep(seconds)
        send(handler, 200, completion("late"))

    return trick


def drips(seconds: float) -> Callable[[Handler], None]:
    """A byte now and then, so that no single wait is long."""

    def trick(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(1000):
            try:
                handler.wfile.write(b" ")
                handler.wfile.flush()
            except OSError:
                return
            time.sleep(seconds)

    return trick
