"""Norms that quantise: the same bytes as the two steps, made once for all readers, and only where nobody needs more."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from parity import random_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dsv3.backends.cpu  # noqa: F401  (its kernels are what runs)
from dsv3 import backends
from dsv3.backends.triton.target import TARGETS, interpreted, use_target
from dsv3.core import linear
from dsv3.core.generate import SamplingParams, SimpleRollout
from dsv3.core.linear import Linear
from dsv3.core.model import DeepseekV3
from dsv3.core.norm import RMSNorm
from dsv3.core.presets import PRESETS
from dsv3.ops.formats import E4M3, E4M3_FNUZ, fn_to_fnuz
from dsv3.ops.fp8 import quantize_blocks, quantize_tiles
from dsv3.ops.general import add_rms_norm, rms_norm
from dsv3.ops.norm_quantize import add_rms_norm_quantize, rms_norm_quantize
from dsv3.ops.op import Op, use_backend
from dsv3.ops.weight import Quantized, Weight
from dsv3.training.lora import LoraLinear

EPS = 1e-6
CONFIG = PRESETS["dsv3-2m"].replace(
    vocab_size=50, num_hidden_layers=3, first_k_dense_replace=1, num_nextn_predict_layers=0
)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same_bytes(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
        assert torch.equal(*(tensor.flatten().clone().view(torch.uint8) for tensor in (one, other)))


def hold_to_the_two_steps(D: int, dtype: torch.dtype, fp8: torch.dtype, power_of_two: bool, run) -> None:
    """run(op, *args): how ops are computed. Rows lie 64 numbers apart; the second is zero, the third not finite."""
    x, residual = randn(5, D + 64, dtype=dtype)[:, :D] * 3, randn(5, D, seed=1, dtype=dtype)
    x[1], residual[1], x[2, 0] = 0.0, 0.0, torch.inf
    w = randn(D, seed=2, dtype=dtype)
    want = run(quantize_tiles, run(rms_norm, x, w, EPS), fp8, power_of_two)
    assert_same_bytes(run(rms_norm_quantize, x, w, EPS, fp8, power_of_two), want)
    normed, total = run(add_rms_norm, x, residual, w, EPS)
    want = (normed, total, *run(quantize_tiles, normed, fp8, power_of_two))
    assert_same_bytes(run(add_rms_norm_quantize, x, residual, w, EPS, fp8, power_of_two), want)


both_scales = pytest.mark.parametrize("power_of_two", [False, True], ids=["any_scale", "power_of_two"])
both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


@both_scales
@both_types
@pytest.mark.parametrize("fp8", [E4M3, E4M3_FNUZ], ids=["fn", "fnuz"])
@pytest.mark.parametrize("kind", ["specification", "cpu"])
def test_its_bytes_are_those_of_norm_and_quantisation(kind, fp8, dtype, power_of_two):
    for D in (64, 200, 384):
        run = (lambda op, *args: op.spec(*args)) if kind == "specification" else (lambda op, *args: op(*args))
        hold_to_the_two_steps(D, dtype, fp8, power_of_two, run)


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # of the row that is not finite, by numpy
@both_scales
@both_types
@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "gfx942"])
def test_kernels_give_the_bytes_of_the_kernels_of_norm_and_quantisation(chip, dtype, power_of_two):
    backend = TARGETS[chip].backend
    backends.discover()[backend].load()

    def run(op: Op, *args):
        (kernel,) = (kernel for kernel in op.kernels[backend] if kernel.provider == "triton")
        return kernel.run(*args)

    for D in (48, 200, 7168):
        with use_backend(backend), use_target(chip):
            hold_to_the_two_steps(D, dtype, TARGETS[chip].fp8 or E4M3, power_of_two, run)


# --- in a model ---


def fp8_model(q_lora_rank: int | None, power_of_two: bool, dtype: torch.dtype) -> DeepseekV3:
    """A dense layer and two of experts, every matrix in FP8, as a published checkpoint has them."""
    model = random_model(CONFIG.replace(q_lora_rank=q_lora_rank), 0).to(dtype)
    for module in model.model.layers.modules():
        if isinstance(module, Linear):
            module.load_fp8(*quantize_blocks(module.weight.detach().float(), E4M3, power_of_two), power_of_two)
    return model


def without_fused_norms(model: DeepseekV3) -> DeepseekV3:
    for module in model.modules():
        if isinstance(module, Linear):
            module.fp8_input = lambda x: None
    return model


TOKENS = torch.arange(24)[None]


def numbers(model: DeepseekV3) -> tuple[Tensor, list[float]]:
    """Logits of a pass, and log-probabilities of text that was decoded."""
    with torch.no_grad():
        logits = model(TOKENS).logits
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    return logits, SimpleRollout(model).generate([TOKENS[0, :9].tolist()], params)[0].logprobs


@pytest.mark.parametrize("q_lora_rank", [None, 64])
@both_scales
@both_types
def test_a_model_gives_the_same_bits_as_one_whose_readers_quantise(q_lora_rank, dtype, power_of_two):
    fused = numbers(fp8_model(q_lora_rank, power_of_two, dtype))
    apart = numbers(without_fused_norms(fp8_model(q_lora_rank, power_of_two, dtype)))
    assert torch.equal(fused[0], apart[0]) and fused[1] == apart[1]


class Calls(TorchDispatchMode):
    """Counts the calls of ops."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.name().removeprefix("dsv3::")] += 1
        return function(*args, **(kwargs or {}))


def calls(model: DeepseekV3) -> Counter[str]:
    with Calls() as seen:
        model(TOKENS)
    return seen.counts


def test_activations_are_quantised_once_in_the_norm():
    model = fp8_model(64, False, torch.bfloat16)
    with torch.no_grad():
        fused, apart = calls(model), calls(without_fused_norms(model))
    assert fused["rms_norm_quantize"] == 2 * 3  # attention's input and the query's latent
    assert fused["add_rms_norm_quantize"] == 3 and fused["add_rms_norm"] == 0
    # q_a, kv_a, q_b, and a dense layer's or the shared expert's gate_up have nothing left to quantise.
    assert apart["quantize_tiles"] - fused["quantize_tiles"] == 4 * 3
    assert fused["fp8_gemm"] == apart["fp8_gemm"]


def test_a_pass_that_wants_gradients_keeps_real_rows():
    model = fp8_model(64, False, torch.bfloat16)
    model(TOKENS).logits.float().sum().backward()
    norms = [module for module in model.model.layers.modules() if isinstance(module, RMSNorm)]
    assert norms and all(norm.weight.grad.abs().sum() > 0 for norm in norms)
    assert calls(model.requires_grad_(False))["rms_norm_quantize"] == 6  # nothing wants one: as without grad mode


def fp8_linear(power_of_two: bool = False) -> Linear:
    made = Linear((128, 256))
    made.load_fp8(*quantize_blocks(randn(128, 256), E4M3, power_of_two), power_of_two)
    return made


@torch.no_grad()
def test_a_norm_quantises_only_where_all_readers_take_the_same():
    norm, x, plain = RMSNorm(256, EPS), randn(4, 256), Linear((128, 256))
    torch.nn.init.normal_(plain.weight)
    adapted = LoraLinear(fp8_linear(), 1, 4, 8.0, torch.float32)
    for readers in ((), (plain,), (fp8_linear(), plain), (fp8_linear(), fp8_linear(True)), (fp8_linear(), adapted)):
        assert torch.equal(norm.for_readers(x, readers), norm(x))
        normed, for_readers, total = norm.after_adding(x, x, readers)
        assert for_readers is normed and torch.equal(total, x + x) and torch.equal(normed, norm(x + x))
    readers = fp8_linear(True), fp8_linear(True)
    shared = norm.for_readers(x, readers)
    assert isinstance(shared, Quantized)
    assert all(torch.equal(reader(shared), reader(norm(x))) for reader in readers)


@torch.no_grad()
def test_activations_meet_packed_weights_in_the_packed_format(monkeypatch):
    """On gfx942 weights are brought into another FP8 when they are packed."""
    reader, norm, x = fp8_linear(), RMSNorm(256, EPS), randn(4, 256)

    def as_fnuz(weight: Weight) -> Weight:
        data, scale = fn_to_fnuz(weight.data, weight.scale)
        return replace(weight, data=data, scale=scale)

    monkeypatch.setattr(linear, "pack", as_fnuz)
    reader.pack()
    assert norm.for_readers(x, (reader,)).values.dtype == E4M3_FNUZ
    assert torch.equal(reader(norm.for_readers(x, (reader,))), reader(norm(x)))
