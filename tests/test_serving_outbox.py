"""What the engine's process sends, and when: a server that is behind, and texts that nobody reads as they grow."""

import socket
from dataclasses import replace

import pytest
from engine_line import BLOCKS, PAGE, Line, Scripted, fake_engine, outputs
from fake_runner import FakeRunner, text

from dsv3.core.sampling_params import SamplingParams
from dsv3.serving import process
from dsv3.serving.messages import Abort, Add, Close, FromEngine, Output, Refused, Stats, ToEngine
from dsv3.serving.outbox import Outbox
from dsv3.serving.process import Loop
from dsv3.serving.wire import Wire


class Ends:
    """An outbox, and the server's end of its socket."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.outbox, self._wire = Outbox(Wire(theirs, ToEngine)), Wire(ours, FromEngine)
        ours.setblocking(False)

    def heard(self) -> list[FromEngine]:
        said: list[FromEngine] = []
        try:
            while True:
                said += self._wire.read()
        except BlockingIOError:
            return said

    def fill(self) -> int:
        """Send until the server is behind; how many outputs it was sent."""
        sent = 0
        while not self.outbox.behind:
            self.outbox.put([Output(1, [sent], [-1.0])])
            self.outbox.send()
            sent += 1
        return sent


def test_a_server_that_is_behind_gets_one_output_for_what_came_meanwhile():
    ends = Ends()
    first = ends.fill()
    later = [Output(1, [-number], [-2.0], finish="length" if number == 9 else None) for number in range(10)]
    for output in later:
        ends.outbox.put([output, Output(2, [5], [-1.0])])
        ends.outbox.send()
    said = ends.heard()
    while ends.outbox.behind or not said or (said[-1].id == 1 and said[-1].finish is None):
        ends.outbox.send()
        said += ends.heard()
    ones = [output for output in said if output.id == 1]
    assert [token for output in ones for token in output.tokens] == [*range(first), *range(0, -10, -1)]
    assert len(ones) == first + 1 and ones[-1].finish == "length"
    assert [len(output.tokens) for output in said if output.id == 2] == [10]


def test_a_text_that_nobody_reads_is_told_with_its_first_token_with_the_counters_and_at_its_end():
    ends = Ends()
    ends.outbox.open(1, whole=True)
    ends.outbox.open(2, whole=False)
    for number in range(6):
        finish = "stop" if number == 5 else None
        ends.outbox.put([Output(1, [number], [-1.0], finish=finish), Output(2, [number], [-1.0])])
        ends.outbox.send(Stats(steps=number) if number == 3 else None)
    said = ends.heard()
    assert [output.tokens for output in outputs(said, 1)] == [[0], [1, 2, 3], [4, 5]]
    assert [output.tokens for output in outputs(said, 2)] == [[number] for number in range(6)]
    assert [message.steps for message in said if isinstance(message, Stats)] == [3]


def test_nothing_is_said_of_a_request_that_was_dropped():
    ends = Ends()
    ends.outbox.open(1, whole=True)
    ends.outbox.put([Output(1, [5], [-1.0])])
    ends.outbox.send()
    ends.outbox.put([Output(1, [6], [-1.0])])
    ends.outbox.drop(1)
    ends.outbox.send(Stats())
    assert ends.heard() == [Output(1, [5], [-1.0]), Stats()]


def test_a_refusal_is_sent_at_once():
    ends = Ends()
    ends.outbox.open(1, whole=True)
    ends.outbox.put([Output(1, finish="refused", error="it is too long")])
    ends.outbox.send()
    assert ends.heard() == [Refused(1, "it is too long")]


def test_outputs_put_behind_each_other_are_one():
    first = Output(1, [5], [-1.0], [[(5, -1.0)]], cached=3, seed=7, prompt_logprobs=[-4.0], prompt_top=[[]], queued=0.5)
    first.add(Output(1, [6, 2], [-2.0, -3.0], [[], []], "stop", 2, None, 0, 7, [-5.0], [[(1, -5.0)]]))
    assert first == Output(
        1, [5, 6, 2], [-1.0, -2.0, -3.0], [[(5, -1.0)], [], []], "stop", 2, None, 3, 7, [-4.0, -5.0],
        [[], [(1, -5.0)]], 0.5,
    )  # fmt: skip


@pytest.mark.parametrize("ahead", [False, True])
def test_whole_texts_and_those_that_are_read_as_they_grow_are_the_same(ahead: bool):
    line = Line(fake_engine(FakeRunner(BLOCKS, PAGE, ahead=ahead)))
    for id in (1, 2):
        line.wire.send(Add(id, [3, 4], SamplingParams(max_tokens=30, seed=9), whole=id == 1))
    line.wire.send(Close(drain=True))
    code, said = line.run()
    assert code == 0
    for id in (1, 2):
        assert [token for output in outputs(said, id) for token in output.tokens] == text([3, 4], 9, 30)
        assert outputs(said, id)[-1].finish == "length"
    assert len(outputs(said, 1)) < 10 < len(outputs(said, 2)) == 30


def test_an_abort_of_a_whole_text_is_the_last_of_it():
    runner = Scripted(lambda step: line.wire.send(Abort(1)) if step == 4 else None)
    line = Line(fake_engine(runner))
    line.wire.send(Add(1, [1, 2, 3], SamplingParams(max_tokens=60), whole=True))
    line.wire.send(Add(2, [1, 2, 3], SamplingParams(max_tokens=20)))
    line.wire.send(Close(drain=True))
    code, said = line.run()
    assert code == 0 and line.engine.idle
    assert sum(len(output.tokens) for output in outputs(said, 1)) <= 5


def test_the_engine_does_not_wait_for_a_server_that_reads_nothing(monkeypatch: pytest.MonkeyPatch):
    """Nobody reads until the last step is computed; then everything is there."""
    monkeypatch.setattr(process, "STATS_EVERY", 0.0)
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    engine = fake_engine(FakeRunner(400, PAGE))
    engine.settings = replace(engine.settings, context=1000, capacity=1600)
    loop, wire = Loop(Wire(theirs, ToEngine), engine), Wire(ours, FromEngine)
    for id in (1, 2):
        wire.send(Add(id, [id], SamplingParams(max_tokens=400, seed=id)))
    loop._hear(0.0)
    while not engine.idle:
        loop._step()
        loop._report()
    assert loop.outbox.behind
    wire.send(Close(drain=True))
    ours.settimeout(20)
    said: list[FromEngine] = []
    while not (done := [m for m in said if isinstance(m, Output) and m.finish is not None]) or len(done) < 2:
        loop._hear(0.0)
        said += wire.read()
    for id in (1, 2):
        assert [token for output in outputs(said, id) for token in output.tokens] == text([id], id, 400)
    assert loop.run() == 0
