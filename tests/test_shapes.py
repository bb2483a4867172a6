"""Shapes of an op's tensors: declared once, and what they do not fit is refused before a kernel reads memory."""

import inspect
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_op import op_of
from test_walk import ONCE, QUICK
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map
from walk import ARGUMENTS, cell_name

from dsv3.ops import mla_cache
from dsv3.ops import op as mechanism
from dsv3.ops.formats import BLOCK
from dsv3.ops.op import OPS, Op, OpError, use_backend
from dsv3.ops.shapes import MOST_KNOWN, Pattern, Shapes

pytestmark = pytest.mark.slow

GPUS = ("cuda", "rocm")
WITH_KERNELS = [op for op in OPS.values() if any(op.kernels.get(backend) for backend in GPUS)]
every_op = pytest.mark.parametrize("op", WITH_KERNELS, ids=cell_name)


def tensors_of(op: Op, args: tuple) -> list[tuple[int, int | None, Tensor, Pattern]]:
    """(place, index in a list, tensor, pattern) of every tensor that a pattern is about."""
    found = []
    for place, (name, value) in enumerate(zip(op.signature.parameters, args, strict=False)):
        pattern = op.shapes.tensors.get(name)
        if isinstance(pattern, tuple):
            found += [(place, index, value[index], one) for index, one in enumerate(pattern)]
        elif isinstance(value, Tensor):
            found.append((place, None, value, pattern))
    return found


def with_shape(args: tuple, place: int, index: int | None, shape: tuple[int, ...]) -> tuple:
    """The same call with a tensor of this shape in one place."""
    args = list(args)
    if index is None:
        args[place] = args[place].new_empty(shape)
    else:
        args[place] = list(args[place])
        args[place][index] = args[place][index].new_empty(shape)
    return tuple(args)


def refuses(op: Op, args: tuple) -> bool:
    """Does a call on a GPU's backend end before a kernel, or anything else, has run?"""
    with use_backend("cuda"), pytest.raises(OpError) as caught:
        op(*args)
    said = str(caught.value)
    return (
        said.startswith(f"dsv3.{op.name}(") and re.search(r": \w+(\[\d\])? is \[.*\] and not \[.*\]", said) is not None
    )


@every_op
def test_an_op_with_a_kernel_on_gpus_says_the_shape_of_each_tensor(op):
    assert op.shapes is not None
    tensors = {name for name, param in op.signature.parameters.items() if "Tensor" in str(param.annotation)}
    assert set(op.shapes.tensors) == tensors


@pytest.mark.slow
@every_op
@QUICK
@given(data=st.data())
def test_arguments_that_are_right_pass(op, data):
    args = data.draw(ARGUMENTS[op.name])
    op.shapes.require(args, {})
    on_meta = tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, args)
    op.shapes.require(on_meta, {})
    names = list(op.signature.parameters)
    op.shapes.require((), dict(zip(names, args, strict=False)))
    with FakeTensorMode() as fakes:
        op.shapes.require(
            tree_map(lambda leaf: fakes.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf, args), {}
        )


@every_op
@ONCE
@given(data=st.data())
def test_a_wrong_rank_is_refused(op, data):
    args = data.draw(ARGUMENTS[op.name])
    for place, index, tensor, pattern in tensors_of(op, args):
        assert refuses(op, with_shape(args, place, index, ()))
        if not pattern.open:
            assert refuses(op, with_shape(args, place, index, (1, 1, *tensor.shape)))


def words_of_axes(pattern: Pattern, tensor: Tensor) -> list[set[str]]:
    """The words that each axis of a tensor is about."""
    terms = pattern.text.split()
    if tensor.dim() < len(terms):
        terms = [term for term in terms if not term.endswith("?")]
    terms = ["..."] * (tensor.dim() - len(terms) + pattern.open) + terms[pattern.open :]
    return [{"..."} if term == "..." else set(re.findall(r"[A-Za-z_]\w*", term)) for term in terms]


@every_op
@ONCE
@given(data=st.data())
def test_a_size_that_does_not_fit_the_others_is_refused(op, data):
    """Every axis whose size is that of another axis, or follows from it, or from an argument that is a number."""
    args = data.draw(ARGUMENTS[op.name])
    tensors = tensors_of(op, args)
    axes = [
        (which, words)
        for which, (_, _, tensor, pattern) in enumerate(tensors)
        for words in words_of_axes(pattern, tensor)
    ]
    numbers = {name for name, value in zip(op.signature.parameters, args, strict=False) if isinstance(value, int)}
    for which, (place, index, tensor, pattern) in enumerate(tensors):
        elsewhere = numbers.union(*(words for other, words in axes if other != which))
        for axis, words in enumerate(words_of_axes(pattern, tensor)):
            if words & elsewhere:
                shape = list(tensor.shape)
                shape[axis] += BLOCK
                assert refuses(op, with_shape(args, place, index, tuple(shape))), (op.name, place, axis)


# --- in a call ---


@pytest.fixture
def summed():
    """An op whose kernel, on backends that say so, would read out of bounds."""

    def summed(x: Tensor, w: Tensor | None = None) -> Tensor:
        """x [T, D], w [D] or None -> x * w."""
        return x * w if w is not None else x + 0

    made = op_of(summed, shapes={"x": "T D", "w": "D"})
    for backend in ("guarded", "cpu"):
        made.kernel(backend, "beads")(lambda x, w=None: x * 0 + 7)
    return made


@pytest.fixture
def guarded(monkeypatch):
    monkeypatch.setattr(mechanism, "GUARDED", {"guarded"})


def test_a_call_of_a_wrong_shape_names_the_op_what_came_and_what_is_expected(summed, guarded):
    with use_backend("guarded"):
        assert summed(torch.ones(2, 3), torch.ones(3)).tolist() == [[7.0] * 3] * 2
        assert summed(x=torch.ones(2, 3)).tolist() == [[7.0] * 3] * 2
        for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
            with mode(), pytest.raises(OpError) as caught:
                summed(torch.ones(2, 3), w=torch.ones(4))
            said = str(caught.value)
            assert said.startswith(f"dsv3.{summed.name}(x=float32 [2, 3] on cpu, w=float32 [4] on cpu)")
            assert "w is [4] and not [D] with D = 3" in said and "It expects: x [T, D], w [D] or None" in said


def test_other_backends_are_not_asked(summed, guarded):
    """The CPU's kernels are torch's operators, which refuse by themselves."""
    assert summed(torch.ones(2, 3), torch.ones(4)).shape == (2, 3)


def test_the_backends_of_gpus_are_guarded_and_the_others_are_not():
    assert set(GPUS) == mechanism.GUARDED


def test_a_cache_of_other_latents_is_not_taken_by_a_kernel():
    """How wide its rows are for latents of some size depends on its dtype, so that its shape alone does not tell."""
    table, lens, slots = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32), torch.zeros(1).long()
    for cache in (torch.zeros(2, 8, 48), torch.zeros(2, 8, 68, dtype=torch.uint8)):  # of 32 + 16 numbers
        for width, fits in ((48, True), (47, False), (51, False)):
            q, latent = torch.zeros(1, 1, 2, width), torch.zeros(1, width)
            for op, args in (
                (mla_cache.mla_decode, (q, [cache], table, lens, lens, [], 1.0, 32)),
                (mla_cache.mla_cache_write, ([cache], slots, latent)),
            ):
                (kernel,) = (kernel for kernel in op.kernels["cuda"] if kernel.provider == "triton")
                op.shapes.require(args, {})
                assert kernel.supports(*args) == fits, (op.name, cache.dtype, width)
        (gather,) = mla_cache.mla_cache_gather.kernels["cuda"]
        assert gather.supports([cache], table, lens, lens.cumsum(0), 1, 32)
        assert not gather.supports([cache], table, lens, lens.cumsum(0), 1, 128)


# --- the rules of a declaration ---


def fits(patterns: dict, **given) -> bool:
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in given]
    values = tuple(torch.empty(value, device="meta") if isinstance(value, tuple) else value for value in given.values())
    try:
        Shapes(inspect.Signature(parameters), patterns).require(values, {})
    except ValueError:
        return False
    return True


def test_a_word_has_one_size_in_a_call():
    assert fits({"a": "M K", "b": "N K"}, a=(2, 3), b=(9, 3))
    assert not fits({"a": "M K", "b": "N K"}, a=(2, 3), b=(9, 4))
    assert not fits({"a": "K K"}, a=(2, 3))


def test_a_number_among_the_arguments_is_the_size_of_its_name():
    assert fits({"a": "T k"}, a=(5, 3), k=3) and not fits({"a": "T k"}, a=(5, 3), k=4)


@pytest.mark.parametrize("size, blocks", [(1, 1), (128, 1), (129, 2), (576, 5)])
def test_blocks_are_rounded_up(size, blocks):
    assert fits({"a": "K", "s": "K/128"}, a=(size,), s=(blocks,))
    assert not fits({"a": "K", "s": "K/128"}, a=(size,), s=(blocks + 1,))


def test_multiples_and_sums_are_of_known_sizes_or_make_them_known():
    assert fits({"a": "2*I", "b": "I"}, a=(6,), b=(3,)) and not fits({"a": "2*I"}, a=(7,))
    assert fits({"a": "E+1", "b": "E"}, a=(4,), b=(3,)) and not fits({"b": "E", "a": "E+1"}, a=(3,), b=(3,))
    assert fits({"a": "n r", "b": "n+r", "c": "n*r"}, a=(2, 5), b=(7,), c=(10,))
    assert not fits({"a": "n r", "b": "n+r"}, a=(2, 5), b=(8,)) and not fits({"a": "n r", "b": "n*r"}, a=(2, 5), b=(8,))


def test_a_dimension_that_may_be_missing_is_missing_everywhere_or_nowhere():
    patterns = {"a": "E? N K", "s": "E? N"}
    assert fits(patterns, a=(2, 3), s=(2,)) and fits(patterns, a=(4, 2, 3), s=(4, 2))
    assert not fits(patterns, a=(2, 3), s=(4, 2)) and not fits(patterns, a=(4, 2, 3), s=(2,))
    assert not fits(patterns, a=(4, 2, 3), s=(5, 2)) and not fits(patterns, a=(1, 4, 2, 3), s=(4, 2))


def test_leading_dimensions_are_the_same_everywhere():
    patterns = {"x": "... D", "y": "... D", "w": "D"}
    assert fits(patterns, x=(3,), y=(3,), w=(3,)) and fits(patterns, x=(5, 2, 3), y=(5, 2, 3), w=(3,))
    assert not fits(patterns, x=(5, 2, 3), y=(10, 3), w=(3,)) and not fits(patterns, x=(2, 3), y=(3,), w=(3,))
    assert not fits(patterns, x=(), y=(), w=(3,))


def test_a_list_has_patterns_for_its_first_tensors():
    parameters = [inspect.Parameter("some", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    shapes = Shapes(inspect.Signature(parameters), {"some": ("T k", "T")})
    two, ones, rest = torch.empty(3, 2), torch.empty(3), torch.empty(7, 7, 7)
    shapes.require(([two, ones, rest],), {})
    for wrong in ([two], [ones, two], [two, torch.empty(4)]):
        with pytest.raises(ValueError, match="some"):
            shapes.require((wrong,), {})


def test_a_packed_weight_has_the_shape_that_its_kernel_gave_it():
    patterns = {"a": "M K", "b": "N K"}
    assert fits(patterns, a=(2, 3), b=(3, 9), layout="transposed")
    assert not fits(patterns, a=(2, 3), b=(3, 9), layout="plain")


def test_many_different_sizes_are_not_all_kept():
    parameters = [inspect.Parameter("a", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    shapes = Shapes(inspect.Signature(parameters), {"a": "T"})
    for size in range(MOST_KNOWN + 10):
        shapes.require((torch.empty(size, device="meta"),), {})
    assert len(shapes._right) <= MOST_KNOWN


def test_a_declaration_that_is_none_is_an_error():
    with pytest.raises(ValueError, match="not a size: 'K-1'"):
        Pattern("T K-1")
