"""The C++ kernels of the cpu backend. That each computes its op, the walk says (`test_walk.py`); here: that they are
there, what they refuse, and that a step recorded from them is the step."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import random_model

import dsv3.backends.cpu  # noqa: F401  (its kernels are what runs)
from dsv3.backends.cpu import native
from dsv3.core.cache import PagedCache, PagedStep
from dsv3.core.presets import PRESETS
from dsv3.ops.capture import Program, capture, capture_for_speed
from dsv3.ops.gemm import grouped_gemm
from dsv3.ops.general import add_rms_norm, rope
from dsv3.ops.mla_cache import mla_cache_write, mla_decode
from dsv3.ops.moe import permute, unpermute
from dsv3.ops.op import OpError

SMALL = PRESETS["dsv3-2m"].replace(vocab_size=50, num_hidden_layers=2, max_position_embeddings=256)
BLOCKS, PAGE = 6, 64
COMPILES = shutil.which("g++") and Path(sysconfig.get_path("include"), "Python.h").exists()
missing = pytest.mark.skipif(not native.built(), reason="the C++ kernels are not built: no compiler, or no Python.h")


@pytest.mark.skipif(not COMPILES, reason="there is no g++, or no Python.h")
def test_whoever_has_a_compiler_has_the_kernels():
    assert native.built()


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


CACHE = [torch.zeros(2, 4, 6)]
LENS = i32(4)
OUTSIDE = {
    "position": lambda: rope(torch.zeros(1, 4), torch.tensor([9]), torch.zeros(8, 4)),
    "slot": lambda: mla_cache_write(CACHE, torch.tensor([8]), torch.zeros(1, 6)),
    "page": lambda: mla_decode(torch.zeros(1, 1, 2, 6), CACHE, i32(2)[None], LENS, LENS, [LENS], 1.0, 4),
    "length": lambda: mla_decode(torch.zeros(1, 1, 2, 6), CACHE, i32(0)[None], i32(5), i32(5), [LENS], 1.0, 4),
    "expert": lambda: permute(torch.zeros(1, 4), i32(3)[None], 3, 1),
    "row": lambda: unpermute(torch.zeros(2, 4), i32(2)[None], None),
    "segment": lambda: grouped_gemm(torch.zeros(2, 4), torch.zeros(1, 3, 4), i32(0, 3)),
    "end": lambda: grouped_gemm(torch.zeros(2, 4), torch.zeros(1, 3, 4), i32(0, -9)),
}


@missing
@pytest.mark.parametrize("index", OUTSIDE)
def test_an_index_outside_of_memory_is_an_error_and_not_a_crash(index):
    with torch.inference_mode(), pytest.raises((OpError, IndexError), match=r"outside|no such|longer"):
        OUTSIDE[index]()


class Decoding:
    """A decoding step of `size` sequences as a function of tensors, over a cache full of noise."""

    def __init__(self, size: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.model, self.size = random_model(SMALL, seed), size
        self.cache = PagedCache(SMALL, BLOCKS, torch.float32)
        for layer in self.cache.layers:
            layer[0].normal_(generator=generator)
        self.bounds = torch.arange(size + 1, dtype=torch.int32)
        self.generator = generator

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """Of sequences in pages of their own, of any length."""

        def draw(low: int, high: int) -> torch.Tensor:
            return torch.randint(low, high, (self.size,), generator=self.generator)

        table = torch.randperm(BLOCKS, generator=self.generator)[: self.size, None].int()
        places = draw(0, PAGE)
        lens = (places + 1).int()
        return draw(0, 50), places, table[:, 0].long() * PAGE + places, table, lens, lens.clone()

    def step(self, tokens, positions, slots, table, lens, host):
        cache = PagedStep(self.cache, slots, table, lens, host, self.size * PAGE, PAGE, True)
        described = self.model.step(positions, self.bounds, 1, cache, None, PAGE)
        hidden = self.model.model.norm(self.model.blocks(self.model.embed(tokens), described))
        return hidden, self.model.head(hidden)


@missing
@settings(deadline=None, max_examples=10, derandomize=True)
@given(st.integers(1, BLOCKS), st.integers(0, 9))
def test_a_recorded_step_does_to_other_inputs_what_the_step_does(size, seed):
    decoding = Decoding(size, seed)
    with torch.inference_mode():
        captured = capture_for_speed(decoding.step, *decoding.inputs())
        assert captured is not None and len(captured.program) > 40
        for _ in range(3):
            inputs = decoding.inputs()
            before = [layer[0].clone() for layer in decoding.cache.layers]
            wanted = decoding.step(*inputs)
            written = [layer[0].clone() for layer in decoding.cache.layers]
            for layer, earlier in zip(decoding.cache.layers, before, strict=True):
                layer[0].copy_(earlier)
            for got, want in zip(captured.replay(*inputs), wanted, strict=True):
                assert torch.equal(got, want)
            assert all(torch.equal(layer[0], want) for layer, want in zip(decoding.cache.layers, written, strict=True))


X, W = torch.ones(2, 4), torch.ones(4)


@missing
@pytest.mark.parametrize(
    "step",
    [
        lambda x: x.mul_(2.0),  # in place
        lambda x: add_rms_norm(x, x, W, 1e-6)[0] * 2,  # no kernel here
        lambda x: x + 1,
        lambda x: torch.add(x, x, alpha=2),
        lambda x: torch.cat([torch.zeros(0), x.view(-1), x.view(-1).double()]),
        lambda x: add_rms_norm(x.double(), x.double(), W.double(), 1e-6)[0],
        lambda x: (x, x.sum().item())[0],  # read on the host
    ],
)
def test_a_step_with_anything_else_in_it_is_not_recorded_natively(step):
    with torch.inference_mode():
        assert capture_for_speed(step, X.clone()) is None


@missing
def test_it_is_recorded_as_a_program_then():
    program = capture(lambda x: add_rms_norm(x, x, W, 1e-6)[0] * 2, X)
    assert isinstance(program, Program)
    assert torch.allclose(program.replay(3 * X), 2 * X)


@missing
@pytest.mark.slow
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="the best module is the one tested here"
)
def test_the_module_for_older_cpus_computes_the_same():
    tests = Path(__file__).parent
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(tests / "test_walk.py"),
        "-k",
        "cpu-native",
    ]
    older = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    ran = subprocess.run(command, capture_output=True, text=True, env=older, cwd=tests.parent)
    assert ran.returncode == 0, ran.stdout[-2000:]
    check = "from dsv3.backends.cpu import native; print(native.extension.__name__)"
    named = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, env=older)
    assert named.stdout.strip().endswith("._avx2"), named.stderr
