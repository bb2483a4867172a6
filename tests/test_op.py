"""The mechanism of an op: which kernel runs, what each override replaces, and who may register kernels."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import random_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dsv3 import backends
from dsv3.core.checkpoint import save_pretrained
from dsv3.core.model import DeepseekV3
from dsv3.core.presets import PRESETS
from dsv3.errors import UserError
from dsv3.ops import op as mechanism
from dsv3.ops.op import EXACT, OPS, Kernel, Near, Op, OpError, active_backend, decompositions, op, use_backend


def op_of(spec, **options) -> Op:
    """An op with a name of its own that the walker does not visit."""
    spec.__name__ = f"test_{spec.__name__}_{len(MADE)}"
    made = op(**{"tolerance": 1e-6} | options)(spec)
    MADE.append(made)
    OPS.pop(made.name)
    return made


MADE: list[Op] = []  # torch.library drops an op with the object that holds it


@pytest.fixture
def double() -> Op:
    def double(x: Tensor, by: int = 2) -> Tensor:
        """x * by."""
        return x * by

    return op_of(double)


def runs(op: Op, *args) -> str:
    return op.choose(*args).provider


# --- the choice ---


@settings(deadline=None, max_examples=50, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.booleans()), max_size=6, unique_by=lambda kernel: kernel[0])
)
def test_the_first_by_priority_that_is_available_and_supports_the_call_runs(kernels):
    def first(x: Tensor) -> Tensor:
        return x + 0

    made = op_of(first)
    for priority, available, supports in kernels:
        options = {"priority": priority, "available": lambda a=available: a, "supports": lambda x, s=supports: s}
        made.kernel("cpu", f"kernel {priority}", **options)(lambda x, priority=priority: x + priority)
    able = [priority for priority, available, supports in kernels if available and supports]
    assert runs(made, torch.zeros(1)) == (f"kernel {max(able)}" if able else "specification")
    assert made(torch.zeros(1)).item() == max(able, default=0)


def test_support_is_asked_on_every_call_and_availability_once(double):
    asked = []

    def available() -> bool:
        asked.append("available")
        return True

    def supports(x: Tensor, by: int = 2) -> bool:
        asked.append("supports")
        return by != 3

    double.kernel("cpu", "shift", available=available, supports=supports)(lambda x, by=2: x * by + 100)
    assert [double(torch.ones(1), by).item() for by in (2, 3, 4)] == [102, 3, 104]  # 3: falls back for this call only
    assert asked.count("available") == 1 and asked.count("supports") == 3
    assert double(torch.ones(1), by=5).item() == 105


def test_an_unavailable_kernel_is_never_asked_whether_it_supports(double):
    def supports(*args) -> bool:
        raise AssertionError

    double.kernel("cpu", "absent", available=lambda: False, supports=supports)(lambda x, by=2: x)
    assert double(torch.ones(1)).item() == 2


def test_kernels_of_equal_priority_are_asked_in_the_order_of_their_registration(double):
    for name in ("first", "second"):
        double.kernel("cpu", name)(lambda x, by=2: x)
    double.kernel("cpu", "third", priority=1)(lambda x, by=2: x)
    assert [kernel.provider for kernel in double.kernels["cpu"]] == ["third", "first", "second"]


def test_each_backend_has_its_own_kernels_and_the_specification_where_it_has_none(double):
    double.kernel("abacus", "beads")(lambda x, by=2: x * by + 100)
    assert double(torch.ones(1)).item() == 2
    with use_backend("abacus"):
        assert double(torch.ones(1)).item() == 102
        with use_backend("nobody"):
            assert double(torch.ones(1)).item() == 2
        assert double(torch.ones(1)).item() == 102
    assert double(torch.ones(1)).item() == 2


def test_the_backend_returns_when_a_block_fails():
    with pytest.raises(KeyError), use_backend("abacus"):
        raise KeyError
    assert active_backend() == "cpu"


def test_the_active_backend_is_that_of_the_process_in_every_thread():
    """Autograd runs backward in threads of its own on devices."""

    def square(x: Tensor) -> Tensor:
        return x * x

    def slope(grad: Tensor, x: Tensor) -> Tensor:
        return 2 * x * grad

    forward, backward = op_of(square), op_of(slope)
    forward.backward(lambda ctx, inputs, output: ctx.save_for_backward(*inputs))(
        lambda ctx, grad: backward(grad, *ctx.saved_tensors)
    )
    backward.kernel("abacus", "beads")(lambda grad, x: 2 * x * grad + 100)
    x = torch.tensor([3.0], requires_grad=True)
    y = forward(x)
    with use_backend("abacus"):
        seen: list[str] = []
        thread = threading.Thread(target=lambda: (seen.append(active_backend()), y.backward()))
        thread.start()
        thread.join()
    assert seen == ["abacus"] and x.grad.tolist() == [106.0]


# --- overrides of single roles ---


def test_the_specification_is_rule_oracle_and_decomposition_unless_told_otherwise(double):
    assert double.oracle is double.spec and double.__doc__ == "x * by."
    assert decompositions_of(double) is double.spec
    with FakeTensorMode():
        y = double(torch.empty(3, 4, dtype=torch.bfloat16))
    assert (y.shape, y.dtype) == ((3, 4), torch.bfloat16)


def decompositions_of(made: Op, target: str = ""):
    OPS[made.name] = made
    try:
        return decompositions(target)[made.overload]
    finally:
        del OPS[made.name]


def test_fake_replaces_the_rule_of_shapes_and_strides_alone():
    def column_major(x: Tensor) -> Tensor:
        return x + 1

    def fake(x: Tensor) -> Tensor:
        return x.new_empty_strided(x.shape, (1, x.shape[0]))

    made = op_of(column_major, fake=fake)
    with FakeTensorMode():
        assert made(torch.empty(3, 4)).stride() == (1, 3)
    assert made.oracle is made.spec
    assert made(torch.zeros(3, 4)).sum() == 12


def test_oracle_replaces_what_kernels_are_held_to_alone():
    def rounded(x: Tensor) -> Tensor:
        return x.bfloat16().to(x.dtype)

    made = op_of(rounded, oracle=lambda x: x)
    x = torch.tensor([1 + 2.0**-20])
    assert made.oracle(x).item() != made(x).item() == 1.0


def test_lowering_replaces_the_decomposition_for_one_target_alone():
    def plus(x: Tensor) -> Tensor:
        return x + 1

    def minus(x: Tensor) -> Tensor:
        return x - -1

    made = op_of(plus, lowering={"onnx": minus})
    assert decompositions_of(made, "onnx") is minus
    assert decompositions_of(made, "tensorrt") is decompositions_of(made) is made.spec


def test_an_op_that_writes_says_so_in_its_schema():
    def store(cache: list[Tensor], x: Tensor) -> None:
        cache[0].copy_(x)

    made = op_of(store, mutates=("cache",), tolerance=0.0)
    assert "Tensor(a0!)[] cache" in str(made.overload._schema)
    cache = [torch.zeros(2)]
    made(cache, torch.ones(2))
    assert cache[0].tolist() == [1, 1]
    torch.library.opcheck(made.overload, (cache, torch.ones(2)), test_utils=["test_schema", "test_faketensor"])


def test_a_result_is_never_an_alias_of_its_argument_on_fake_tensors():
    def keep(x: Tensor) -> Tensor:
        return x  # wrong for a specification, and harmless where only shapes count

    made = op_of(keep)
    with FakeTensorMode():
        x = torch.empty(3)
        assert made(x) is not x


def test_tolerances_are_near_exact_or_per_output():
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x.argmax()

    assert op_of(both, tolerance=(1e-5, 0.0)).tolerance == (Near(1e-5, mechanism.BF16_ROUNDING), EXACT)

    def one(x: Tensor) -> Tensor:
        return x + 1

    assert op_of(one, tolerance=0.1).tolerance == Near(0.1, 0.1)
    assert op_of(one, tolerance=Near(1e-6, 1.0)).tolerance == Near(1e-6, 1.0)


# --- who registers ---

PLUGIN = """
from dsv3.backends import Backend
ABACUS = Backend("abacus", "cpu", probe=lambda: None, kernels=("abacus_kernels",))
"""
KERNELS = """
from dsv3.ops.general import swiglu
@swiglu.kernel("abacus", "beads", priority=3, checked="compiled")
def beads(gate_up, weight):
    return swiglu.spec(gate_up, weight) * 0 + 7
"""
PROGRAM = """
import torch
from dsv3 import backends
from dsv3.ops.general import swiglu
from dsv3.ops.op import OPS, active_backend
assert not any(op.kernels for op in OPS.values()), "kernels come with a backend, not with the ops"
x = torch.ones(1, 4)
before = swiglu(x, None).tolist()
backends.activate("abacus")
assert active_backend() == "abacus" and swiglu.choose(x, None).provider == "beads"
assert swiglu(x, None).tolist() == [[7.0, 7.0]] != before
try:
    backends.activate("cpu")
except backends.UserError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_package_of_others_registers_kernels_by_its_entry_point(tmp_path: Path):
    (tmp_path / "abacus.py").write_text(PLUGIN)
    (tmp_path / "abacus_kernels.py").write_text(KERNELS)
    info = tmp_path / "abacus-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: abacus\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dsv3.backends]\nabacus = abacus:ABACUS\n")
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert "backend 'abacus' is active in this process and stays so" in run.stdout


@pytest.fixture
def no_backend_yet(monkeypatch: pytest.MonkeyPatch):
    before = active_backend()
    monkeypatch.setattr(backends, "_active", None)
    yield
    mechanism.set_backend(before)


def test_loading_a_model_activates_the_backend_that_is_asked_for(no_backend_yet, tmp_path):
    config = PRESETS["dsv3-2m"].replace(vocab_size=50, num_hidden_layers=1)
    save_pretrained(random_model(config, 0), config, tmp_path / "m")
    DeepseekV3.from_pretrained(tmp_path / "m")
    assert backends._active is None
    model = DeepseekV3.from_pretrained(tmp_path / "m", backend="cpu", dtype=torch.bfloat16)
    assert active_backend() == "cpu" and backends._active.name == "cpu"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with pytest.raises(UserError, match="'cpu' is active in this process"):
        DeepseekV3.from_pretrained(tmp_path / "m", backend="ascend")
    with pytest.raises(UserError, match=r"unknown backend 'cdua'; did you mean 'cuda'\?"):
        DeepseekV3.from_pretrained(tmp_path / "m", backend="cdua")


def test_a_call_that_cannot_be_computed_names_the_op_what_came_and_what_it_expects():
    with pytest.raises(OpError) as caught:
        OPS["quantize_tiles"](torch.zeros(2, 3, 4))
    said = str(caught.value)
    assert "dsv3.quantize_tiles(x=float32 [2, 3, 4] on cpu)" in said
    assert "x [T, K] -> values [T, K]" in said and "too many values to unpack" in said


def test_out_of_memory_names_the_op_and_the_size(monkeypatch):
    def starve(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setitem(OPS["swiglu"].kernels, "cpu", [Kernel("hungry", starve)])
    with pytest.raises(torch.OutOfMemoryError, match=r"dsv3.swiglu\(gate_up=float32 \[1024, 512\].*2.0 MiB.*2.00 GiB"):
        OPS["swiglu"](torch.zeros(1024, 512), None)
