"""What is refused before it costs anything: bodies that are too large, and requests that would wait too long."""

from collections import Counter

from starlette.datastructures import Headers
from starlette.types import Receive

from .auth import Tenant
from .errors import ApiError, ClientGone, TooLarge, TooManyRequests, Unavailable, WrongType
from .metrics import Metrics
from .settings import Settings


async def read_body(headers: Headers, receive: Receive, most: int) -> bytes:
    """The body of a request. Raises WrongType, TooLarge while it is still coming in, ClientGone."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise WrongType("send JSON, with the header `Content-Type: application/json`")
    too_large = TooLarge(f"the body is larger than {most} bytes", headers={"Connection": "close"})
    announced = headers.get("content-length", "")
    if announced.isdecimal() and (len(announced) > 18 or int(announced) > most):
        raise too_large
    parts, size, more = list[bytes](), 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        more = message.get("more_body", False)
        if size > most:
            raise too_large
    return b"".join(parts)


class Gate:
    """Lets requests in while there is room. queued, queued_tokens: without a first token yet; running: all under way.

    draining: the server is about to end, and takes nothing new.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self._of_tenant: Counter[int] = Counter()
        self.queued = self.queued_tokens = self.running = 0
        self.draining = False

    @property
    def full(self) -> bool:
        return self.queued >= self._settings.max_queued or self.queued_tokens >= self._settings.max_queued_tokens

    def enter(self, tenant: Tenant, prompts: list[int]) -> "list[Ticket]":
        """A ticket for each of several requests, or none and Unavailable or TooManyRequests. prompts: their tokens."""
        settings = self._settings
        if self.draining:
            raise self._refusal("draining", Unavailable("the server is about to end; ask another one", code="draining"))
        # A request larger than the queue may still enter an empty one: it could never run otherwise.
        crowded = self.queued + len(prompts) > settings.max_queued
        if self.queued and (crowded or self.queued_tokens + sum(prompts) > settings.max_queued_tokens):
            raise self._refusal("queue_full", Unavailable("the queue is full; try again a little later"))
        most = settings.max_per_key
        if most is not None and self._of_tenant[tenant.number] + len(prompts) > most:
            text = f"this key has {most} requests under way, and may not have more"
            raise self._refusal("key_limit", TooManyRequests(text))
        return [Ticket(self, tenant, tokens) for tokens in prompts]

    def _refusal(self, reason: str, error: ApiError) -> ApiError:
        self._metrics.rejected(reason)
        error.headers["Retry-After"] = str(self._settings.retry_after)
        return error

    def count(self, ticket: "Ticket", queued: int, running: int) -> None:
        self.queued += queued
        self.queued_tokens += queued * ticket.tokens
        self.running += running
        self._of_tenant[ticket.tenant.number] += running


class Ticket:
    """The place of one request: queued until `start`, counted until `leave`. Both may be called more than once."""

    def __init__(self, gate: Gate, tenant: Tenant, tokens: int) -> None:
        self._gate, self.tenant, self.tokens = gate, tenant, tokens
        self._queued = self._inside = True
        gate.count(self, 1, 1)

    def start(self) -> None:
        if self._queued:
            self._queued = False
            self._gate.count(self, -1, 0)

    def leave(self) -> None:
        self.start()
        if self._inside:
            self._inside = False
            self._gate.count(self, 0, -1)
