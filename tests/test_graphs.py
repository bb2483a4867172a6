"""Capture by CUDA graphs, on a stand-in for them: a recording of operators that is run again on the same memory."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from parity import random_model
from test_capture import SMALL, Decoding
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsv3.backends.triton.graphs import Graph


class Recording(TorchDispatchMode):
    """Every operator with its arguments and the memory of its results."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, kwargs or {}, result))
        return result

    def replay(self):
        for operator, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(operator(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def graphs(monkeypatch):
    """Stand-ins for the parts of torch.cuda that a capture uses."""

    @contextmanager
    def graph(recording):
        with recording:
            yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)


def test_a_replay_computes_from_the_new_inputs_and_its_result_outlives_the_next_one(graphs):
    weight = torch.ones(3)
    captured = Graph(lambda x, y: (x * weight + y, [x.sum()]), (torch.zeros(3), torch.zeros(3)))
    first, (total,) = captured.replay(torch.ones(3), torch.full((3,), 2.0))
    captured.replay(torch.zeros(3), torch.zeros(3))
    assert first.tolist() == [3.0] * 3 and total.item() == 3.0


def test_warm_ups_come_before_the_capture_and_are_no_part_of_it(graphs):
    made = []

    def step(x):
        if not made:
            made.append(torch.full((3,), 5.0))  # a table, made on the first call
        return x + made[0]

    captured = Graph(step, (torch.zeros(3),))
    assert [str(operator) for operator, *_ in captured.graph.calls] == ["aten.add.Tensor"]


def test_a_whole_decoding_step_is_replayed(graphs):
    decoding, plain = (Decoding(random_model(SMALL, 0), [[1, 2, 3], [4]]) for _ in range(2))
    captured = None
    with torch.no_grad():
        for tokens in ([7, 8], [9, 3], [0, 49]):
            arguments, wanted = decoding.next(tokens), plain.next(tokens)
            captured = captured or Graph(decoding.step, arguments)
            torch.testing.assert_close(captured.replay(*arguments), plain.step(*wanted), rtol=1e-5, atol=1e-5)


def test_other_shapes_are_refused(graphs):
    captured = Graph(lambda x: x + 1, (torch.zeros(2),))
    with pytest.raises(ValueError, match="capture once per shape"):
        captured.replay(torch.zeros(3))
