"""Kernels whose launchers cut work into pieces: small arguments never reach a second piece unless made to."""

import pytest

pytest.importorskip("triton", reason="needs triton")

from hypothesis import given, settings
from hypothesis import strategies as st
from test_walk import QUICK
from walk import ARGUMENTS, hold

from dsv3.backends.triton import loss
from dsv3.backends.triton.target import interpreted, use_target
from dsv3.ops import load

pytestmark = [pytest.mark.interpreter, pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")]


@pytest.mark.parametrize("name", ["linear_cross_entropy", "linear_cross_entropy_backward"])
def test_logits_in_several_pieces_give_the_same_loss_and_gradients(name, monkeypatch):
    for limit, value in (("WORKSPACE", 5600), ("FEWEST", 32), ("ALIGNMENT", 16)):
        assert hasattr(loss, limit)
        monkeypatch.setattr(loss, limit, value)
    op = load()[name]
    kernel = next(kernel for kernel in op.kernels["cuda"] if kernel.provider == "triton")

    @settings(QUICK, max_examples=12)
    @given(data=st.data())
    def walk(data):
        with use_target("sm_90"):
            hold(op, "cuda", kernel, data.draw(ARGUMENTS[name]))

    walk()
