"""Every Triton kernel against its specification, in Triton's interpreter: no GPU, the semantics of the kernel's text.

Whether Triton interprets is decided when it is imported: these tests want a process of their own (`make test-triton`).
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_walk import QUICK
from walk import ARGUMENTS, cell_name, hold

from dsv3.backends.triton.target import TARGETS, interpreted, use_target
from dsv3.ops.op import OPS

pytestmark = [pytest.mark.interpreter, pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")]

EXAMPLES = {"sm_90": 12, "gfx942": 8, "sm_80": 4, "gfx950": 2}  # the chips differ by their FP8 and their tiles


def kernels(providers: tuple[str, ...] = ("triton", "blas")) -> list:
    """(op, target, kernel): every kernel of these providers, for every chip with tiles of its own."""
    return [
        (op, target, kernel)
        for op in OPS.values()
        for target in EXAMPLES
        for kernel in op.kernels.get(TARGETS[target].backend, ())
        if kernel.provider in providers
    ]


@pytest.mark.parametrize("op, target, kernel", kernels(), ids=cell_name)
def test_kernel_matches_its_specification(op, target, kernel):
    taken = []

    @settings(QUICK, max_examples=EXAMPLES[target])
    @given(data=st.data())
    def walk(data):
        with use_target(target):
            taken.append(hold(op, TARGETS[target].backend, kernel, data.draw(ARGUMENTS[op.name])))

    walk()
    assert any(taken), "it took none of the arguments"
