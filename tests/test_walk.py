"""Every kernel of every backend against its specification: a kernel is tested by being registered."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from walk import ARGUMENTS, cell_name, cells, clone, hold, is_real, outputs, widen

from dsv3.ops.op import OPS, Op, decompositions

# A failure is not made smaller: shrinking an op's arguments takes minutes and says little more than the first ones.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
QUICK = settings(
    deadline=None, max_examples=20, suppress_health_check=list(HealthCheck), derandomize=True, phases=PHASES
)
ONCE = settings(QUICK, max_examples=2)
ops = pytest.mark.parametrize("op", OPS.values(), ids=cell_name)
FP8_TYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)


def test_every_op_has_arguments_to_be_tested_with():
    assert sorted(OPS) == sorted(ARGUMENTS)


@ops
@settings(QUICK, max_examples=3)
@given(data=st.data())
def test_every_op_knows_its_cost(op: Op, data):
    """Floating-point operations and bytes, whole numbers: what rooflines are made of."""
    assert op.cost is not None
    flops, moved = op.cost(*data.draw(ARGUMENTS[op.name]))
    assert isinstance(flops, int) and isinstance(moved, int) and flops >= 0 and moved >= 0


@pytest.mark.parametrize("op, backend, kernel", cells(), ids=cell_name)
@QUICK
@given(data=st.data())
def test_kernel_matches_its_specification(op, backend, kernel, data):
    hold(op, backend, kernel, data.draw(ARGUMENTS[op.name]))


@ops
@ONCE
@given(data=st.data())
def test_op_is_a_citizen_of_pytorch(op: Op, data):
    args = data.draw(ARGUMENTS[op.name])
    checks = ["test_faketensor", "test_autograd_registration"]
    if not any(isinstance(leaf, Tensor) and leaf.dtype in FP8_TYPES for leaf in tree_leaves(args)):
        checks.append("test_schema")  # opcheck multiplies its inputs, which FP8 cannot
    torch.library.opcheck(op.overload, args, test_utils=checks)


@ops
@ONCE
@given(data=st.data())
def test_gradient_is_that_of_the_specification(op: Op, data):
    """Finite differences in float64, for every op with a registered gradient whose outputs are real numbers."""
    if not op.gradient_of or op.quantized:
        return
    args = list(widen(data.draw(ARGUMENTS[op.name])))
    assume(all(torch.isfinite(leaf).all() for leaf in tree_leaves(args) if is_real(leaf)))
    for place, name in enumerate(op.signature.parameters):
        if place < len(args) and name in op.gradient_of and is_real(args[place]):
            args[place] = args[place].detach().clone().requires_grad_()

    def real_outputs(*values):
        real = [out for out in outputs(op(*values)) if out.is_floating_point()]
        return tuple(out.masked_fill(out.isinf(), 0.0) for out in real)  # the -inf of a row without keys stays -inf

    assert torch.autograd.gradcheck(real_outputs, tuple(args), fast_mode=True, nondet_tol=0.0, atol=1e-5)


class Calling(nn.Module):
    """A module that does nothing but call an op on the tensors among its arguments."""

    def __init__(self, op: Op, args: tuple):
        super().__init__()
        self.op, self.args = op, args

    def forward(self, tensors):
        given = iter(tensors)
        args = tree_map(lambda value: next(given) if isinstance(value, Tensor) else value, self.args)
        return self.op(*args)


def is_exportable(args) -> bool:
    """Export specialises sizes of 0 and 1: draw others."""
    return all(min(leaf.shape, default=2) > 1 for leaf in tree_leaves(args) if isinstance(leaf, Tensor))


@pytest.mark.slow
@ops
@settings(QUICK, max_examples=1)
@given(data=st.data())
def test_op_survives_compilation(op: Op, data):
    args = data.draw(ARGUMENTS[op.name])
    tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    torch.compiler.reset()
    want = outputs(Calling(op, args)(clone(tensors)))
    got = outputs(torch.compile(Calling(op, args), fullgraph=True, backend="aot_eager")(clone(tensors)))
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(
            one.double() if one.is_floating_point() else one,
            other.double() if other.is_floating_point() else other,
            equal_nan=True,
        )


@pytest.mark.slow
@ops
@settings(QUICK, max_examples=1)
@given(data=st.data())
def test_op_is_exported_with_dynamic_shapes_and_lowered(op: Op, data):
    args = data.draw(ARGUMENTS[op.name].filter(is_exportable))
    tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    dynamic = [{axis: torch.export.Dim.AUTO for axis in range(tensor.dim())} for tensor in tensors]
    with torch.no_grad():
        program = torch.export.export(Calling(op, args), (clone(tensors),), dynamic_shapes=(dynamic,), strict=False)
        assert f"dsv3.{op.name}" in str(program.graph)
        lowered = program.run_decompositions(decompositions())
        if not op.mutates:  # a write in place is wrapped by the exporter as a whole, op and all
            assert "dsv3." not in str(lowered.graph)
        want, got = outputs(op.spec(*clone(args))), outputs(lowered.module()(clone(tensors)))
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(
            one.double() if one.is_floating_point() else one,
            other.double() if other.is_floating_point() else other,
            equal_nan=True,
        )
