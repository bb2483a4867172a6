"""The engine's side of one HTTP call: one request or several, their outputs in the order in which they come."""

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType

from ...core.sampling_params import SamplingParams
from ..messages import EngineDied, Output, RequestRefused
from .auth import Tenant
from .errors import ApiError, BadRequest, DeadlinePassed, ServerFault, Unavailable
from .limits import Ticket
from .metrics import Timing
from .patience import Patience
from .responses import FinishReason
from .service import Service

logger = logging.getLogger(__name__)

FINISHES: dict[str, FinishReason] = {"stop": "stop", "length": "length", "timeout": "insufficient_system_resource"}
"""The engine's word for how a text ended, and the clients'."""


@dataclass(frozen=True)
class Job:
    """One text to be generated: a choice of the answer, a sample."""

    prompt: list[int]
    params: SamplingParams


class Generation:
    """Runs jobs while the `async with` block lasts; leaving it early aborts what still runs.

    whole: nobody reads the texts as they grow.
    Entering raises Unavailable or TooManyRequests before anything is queued.
    """

    def __init__(self, service: Service, tenant: Tenant, jobs: Sequence[Job], whole: bool) -> None:
        self._service, self._tenant, self._jobs, self._whole = service, tenant, jobs, whole
        self._arrived: asyncio.Queue[tuple[int, Output] | ApiError] = asyncio.Queue(service.settings.buffered)
        self._next: tuple[int, Output] | None = None
        self._patience = Patience(service.settings.keep_alive)
        self._left = len(jobs)
        self._tickets: list[Ticket] = []
        self._pumps: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Generation":
        service = self._service
        if not service.client.alive:
            raise Unavailable("the engine is gone; ask another server", code="engine_dead")
        self._tickets = service.gate.enter(self._tenant, [len(job.prompt) for job in self._jobs])
        self._pumps = [asyncio.create_task(self._pump(index)) for index in range(len(self._jobs))]
        service.generations.add(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._service.generations.discard(self)
        self._patience.close()
        for pump in self._pumps:
            pump.cancel()
        try:
            await asyncio.gather(*self._pumps, return_exceptions=True)
        finally:
            for ticket in self._tickets:  # a pump that was cancelled before it began has left nothing
                ticket.leave()

    async def first(self) -> None:
        """Wait for the first output, or until it is time for a sign of life. Raises ApiError if it is one."""
        self._next = await anext(self)

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> tuple[int, Output] | None:
        """(job, its next output); None if there was no news for `keep_alive` seconds. Raises ApiError if a job fails,
        StopAsyncIteration behind the last output of all."""
        if self._next is not None:
            item, self._next = self._next, None
            return item
        if not self._left:
            raise StopAsyncIteration
        try:
            with self._patience:
                arrived = await self._arrived.get()
        except TimeoutError:
            return None
        if isinstance(arrived, ApiError):
            raise arrived
        self._left -= arrived[1].finish is not None
        return arrived

    def fail(self, error: ApiError) -> None:
        """End all that runs with an error."""
        for pump in self._pumps:
            pump.cancel()
        while self._arrived.full():
            self._arrived.get_nowait()
        self._arrived.put_nowait(error)

    async def _pump(self, index: int) -> None:
        """The outputs of one job into the queue, which blocks when the client does not keep up."""
        service, job, ticket = self._service, self._jobs[index], self._tickets[index]
        timing = Timing(service.metrics, len(job.prompt), time.monotonic())
        reason = "abort"
        try:
            timeout = service.settings.timeout
            stream = service.client.stream(job.prompt, job.params, self._tenant.salt, timeout, self._whole)
            async with aclosing(stream) as outputs:
                async for output in outputs:
                    ticket.start()
                    timing.output(output, time.monotonic())
                    await self._arrived.put(_failure(output, timing.tokens) or (index, output))
                    if output.finish is not None:
                        return
            raise EngineDied("its outputs ended before the text did")
        except RequestRefused as error:
            reason = "error"
            await self._arrived.put(BadRequest(str(error), code="request_refused"))
        except EngineDied:
            reason = "error"
            await self._arrived.put(ServerFault("the engine died while it worked on this", code="engine_dead"))
        except Exception:
            reason = "error"
            logger.exception("a request failed")
            await self._arrived.put(ServerFault("the server made a mistake; its log tells more"))
        finally:
            ticket.leave()
            timing.end(reason, time.monotonic())


def _failure(output: Output, tokens: int) -> ApiError | None:
    """The error that an output stands for. tokens: of its request so far."""
    if output.finish == "timeout" and not tokens:
        return DeadlinePassed("the request waited for its turn until its time was over")
    if output.finish is None or output.finish in FINISHES:
        return None
    if output.finish == "abort":
        return Unavailable("the engine let the request go; try again", code="aborted")
    return ServerFault(output.error or "the engine could not go on with this text", code="engine_error")
