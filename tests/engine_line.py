"""The loop of the engine's process in this one, over a runner without a model, and the other end of its socket."""

import contextlib
import socket
import threading
from collections.abc import Callable

from fake_runner import FakeRunner

from dsv3.core.sampling_params import SamplingParams
from dsv3.serving.engine import Engine, EngineSettings
from dsv3.serving.messages import Add, FromEngine, Output, ToEngine
from dsv3.serving.process import Loop
from dsv3.serving.scheduler import Limits
from dsv3.serving.wire import Wire

PAGE, BLOCKS = 4, 40


class Scripted(FakeRunner):
    """before: called ahead of every step with its number; it may raise, or do what somebody else does meanwhile."""

    def __init__(self, before: Callable[[int], None], **options) -> None:
        super().__init__(BLOCKS, PAGE, **options)
        self.before = before

    def launch(self, plan):
        self.before(len(self.steps))
        return super().launch(plan)


def fake_engine(runner: FakeRunner, running: int = 8) -> Engine:
    return Engine(runner, EngineSettings(100, 50, BLOCKS * PAGE, limits=Limits(running)))


def free(engine: Engine) -> bool:
    scheduler = engine.scheduler
    rows = sorted(scheduler.rows) == list(range(2 * scheduler.limits.running))
    return rows and all(pool.available == pool.num_blocks for pool in scheduler.pools) and not scheduler.computing


class Line:
    """A loop that is run here, and the other end of its socket."""

    def __init__(self, engine: Engine) -> None:
        ours, theirs = socket.socketpair()
        self.engine, self.wire = engine, Wire(ours, FromEngine)
        self.loop = Loop(Wire(theirs, ToEngine), engine)

    def run(self) -> tuple[int, list[FromEngine]]:
        """The loop's exit code and all that it said."""
        said: list[FromEngine] = []

        def listen() -> None:
            with contextlib.suppress(EOFError):
                while True:
                    said.extend(self.wire.read())

        listening = threading.Thread(target=listen)
        listening.start()
        code = self.loop.run()
        self.loop.wire.link.close()
        listening.join(20)
        return code, said


def outputs(said: list[FromEngine], id: int) -> list[Output]:
    return [message for message in said if isinstance(message, Output) and message.id == id]


def ask(line: Line, id: int, count: int, prompt: tuple[int, ...] = (1, 2, 3)) -> None:
    line.wire.send(Add(id, list(prompt), SamplingParams(max_tokens=count, seed=id)))
