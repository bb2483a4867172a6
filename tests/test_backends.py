"""Backends: which there are, which can run here, and what is said about those that cannot."""

import re
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dsv3 import UserError, backends
from dsv3.backends import Backend, activate, ascend, cuda, discover, rocm, triton, use_backend
from dsv3.backends.triton import target
from dsv3.ops.cache_layout import cache_layout, fused_layout
from dsv3.ops.general import rms_norm
from dsv3.ops.op import OPS, active_backend
from dsv3.ops.op import use_backend as op_backend

V3 = SimpleNamespace(kv_lora_rank=512, qk_rope_head_dim=64)


@pytest.fixture(autouse=True)
def process_of_its_own(monkeypatch: pytest.MonkeyPatch):
    """No backend is active at first, and none stays so."""
    before = active_backend()
    monkeypatch.setattr(backends, "_active", None)
    discover.cache_clear()
    yield
    discover.cache_clear()
    target.forget_device()
    backends.set_backend(before)


def distribution(place: Path, name: str, version: str, entry_points: str = "") -> None:
    """An installed distribution, as far as importlib.metadata sees it."""
    folder = place / f"{name}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "entry_points.txt").write_text(entry_points)


# --- choosing ---


def test_auto_takes_the_first_usable_backend(monkeypatch):
    usable = {"cuda": False, "rocm": True, "ascend": True, "cpu": True}
    for name, yes in usable.items():
        monkeypatch.setitem(discover(), name, Backend(name, "cpu", probe=lambda yes=yes: None if yes else "no"))
    assert activate("auto").name == "rocm" == active_backend()


def test_auto_ends_at_the_cpu(monkeypatch):
    for name in ("cuda", "rocm", "ascend"):
        monkeypatch.setitem(discover(), name, Backend(name, "cpu", probe=lambda: "no"))
    assert activate().name == "cpu"


def test_a_process_has_one_backend():
    assert activate("cpu") is activate("auto") is activate("cpu")
    with pytest.raises(UserError, match="'cpu' is active in this process"):
        activate("cuda")


def test_an_unusable_backend_leaves_the_process_without_one(monkeypatch):
    monkeypatch.setitem(discover(), "cuda", Backend("cuda", "cuda", probe=lambda: "no driver; install one"))
    line = r"^backend 'cuda' is not usable: no driver; install one; or use --backend cpu$"
    with pytest.raises(UserError, match=line):
        activate("cuda")
    assert activate("cpu").name == "cpu"


def test_a_probe_that_fails_is_a_reason_of_one_line(monkeypatch):
    def probe() -> None:
        raise OSError("driver says\nmany\nthings")

    monkeypatch.setitem(discover(), "cuda", Backend("cuda", "cuda", probe))
    assert discover()["cuda"].why_not() == "looking for it failed: driver says"


def test_use_backend_returns_to_what_was(monkeypatch):
    monkeypatch.setitem(discover(), "ascend", Backend("ascend", "cpu", probe=lambda: None))
    cpu = activate("cpu")
    with use_backend("ascend"):
        assert active_backend() == "ascend"
    assert active_backend() == "cpu"
    assert activate() is cpu
    with pytest.raises(UserError, match="nowhere"), use_backend("nowhere"):
        pass
    assert activate() is cpu


SUMS = """
from dataclasses import replace
import torch
from dsv3.backends import activate, discover
switches = torch.backends.cuda.matmul
def narrow():
    return [switches.allow_bf16_reduced_precision_reduction, switches.allow_fp16_reduced_precision_reduction]
for backend in discover().values():
    backend.load()
assert narrow() == [True, True]
discover()["%s"] = replace(discover()["%s"], probe=lambda: None)
activate("%s")
assert narrow() == [False, False]
"""


@pytest.mark.parametrize("name", ["cuda", "rocm"])
def test_torch_is_told_how_to_sum_by_activation_and_not_by_loading(name):
    """`doctor` and tests load kernels of backends that their process does not run on."""
    run = subprocess.run([sys.executable, "-c", SUMS.replace("%s", name)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_the_cpu_has_kernels_after_its_import():
    assert discover()["cpu"].name == "cpu"
    assert any(op.kernels.get("cpu") for op in OPS.values())


# --- other people's backends ---

PLUGIN = """
from dsv3.backends import Backend
NEW = Backend("abacus", "cpu", probe=lambda: None, kernels=("abacus_kernels",))
MORE = Backend("cpu", "cpu", probe=lambda: None, kernels=("abacus_kernels",))
WRONG = "not a backend"
"""
KERNELS = """
from dsv3.ops.general import rms_norm
BACKENDS = ("abacus", "cpu")
for name in BACKENDS:
    rms_norm.kernel(name, "abacus", priority=100)(lambda x, w, eps: x + 1)
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Install a distribution with the given entry points of group dsv3.backends."""
    (tmp_path / "abacus.py").write_text(PLUGIN)
    (tmp_path / "abacus_kernels.py").write_text(KERNELS)

    def install(*entries: str) -> None:
        distribution(tmp_path, "abacus", "1.0", "[dsv3.backends]\n" + "\n".join(entries))
        discover.cache_clear()

    monkeypatch.syspath_prepend(str(tmp_path))
    registered = {name: list(kernels) for name, kernels in rms_norm.kernels.items()}
    yield install
    rms_norm.kernels = registered
    for module in ("abacus", "abacus_kernels"):
        sys.modules.pop(module, None)


def test_a_package_adds_a_backend(plugin):
    plugin("abacus = abacus:NEW")
    assert activate("abacus").name == "abacus"
    assert rms_norm(torch.ones(1, 2), torch.ones(2), 1e-6).tolist() == [[2.0, 2.0]]


def test_a_package_adds_kernels_to_a_backend_that_is_there(plugin):
    plugin("anything = abacus:MORE")
    activate("cpu")
    assert rms_norm(torch.ones(1, 2), torch.ones(2), 1e-6).tolist() == [[2.0, 2.0]]


def test_auto_never_takes_a_backend_of_another_package(plugin):
    plugin("abacus = abacus:NEW")
    assert activate("auto").name != "abacus"


@pytest.mark.parametrize("target", ["abacus:WRONG", "abacus:MISSING", "no_such_module:X"])
def test_a_broken_package_is_told_of_and_harms_nobody(plugin, target):
    plugin(f"broken = {target}")
    assert "mend or uninstall" in (discover()["broken"].why_not() or "")
    with pytest.raises(UserError, match="'broken' is not usable"):
        activate("broken")
    assert activate("cpu").name == "cpu"


# --- why not ---


HOPPER = SimpleNamespace(
    major=9, minor=0, shared_memory_per_block_optin=232_448, multi_processor_count=132, warp_size=32
)
TURING = SimpleNamespace(major=7, minor=5, shared_memory_per_block_optin=65_536, multi_processor_count=40, warp_size=32)
MI300X = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-", multi_processor_count=304, warp_size=64)
RDNA = SimpleNamespace(gcnArchName="gfx1100", multi_processor_count=96, warp_size=32)


def build(monkeypatch, cuda: str | None = None, hip: str | None = None, device: SimpleNamespace | None = None) -> None:
    """Let torch be built for something, and see a device or not."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device is not None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    target.forget_device()


@pytest.mark.parametrize(
    ("probe", "built", "reason"),
    [
        (cuda.probe, {"cuda": "13.0", "device": HOPPER}, None),
        (cuda.probe, {"cuda": "13.0", "device": TURING}, "sm_75 is older than sm_80; choose another"),
        (cuda.probe, {}, "built without CUDA; install"),
        (cuda.probe, {"hip": "7.0", "device": MI300X}, "use --backend rocm"),
        (rocm.probe, {"hip": "7.0", "device": MI300X}, None),
        (rocm.probe, {"hip": "7.0", "device": RDNA}, "gfx1100 is not one of gfx942, gfx950; choose another"),
        (rocm.probe, {}, "built without ROCm; install"),
        (rocm.probe, {"cuda": "13.0", "device": HOPPER}, "built without ROCm; install"),
    ],
)
def test_a_gpu_backend_needs_its_own_build_of_torch(monkeypatch, probe, built, reason):
    build(monkeypatch, **built)
    answer = probe()
    assert answer is None if reason is None else reason in answer and "\n" not in answer


@pytest.mark.parametrize("probe, built", [(cuda.probe, {"cuda": "13.0"}), (rocm.probe, {"hip": "7.0"})])
def test_a_gpu_backend_needs_triton(monkeypatch, probe, built):
    build(monkeypatch, **built, device=HOPPER)
    monkeypatch.setattr(triton, "find_spec", lambda name: None)
    assert re.match(r"Triton is not installed; pip install 'dsv3\[(cuda|rocm)\]'$", probe() or "")


@pytest.mark.parametrize(
    ("driver", "visible", "reason"),
    [
        (False, None, "no NVIDIA driver is loaded; install one that runs CUDA 13.0"),
        (True, None, "check that nvidia-smi lists one"),
        (True, "", "CUDA_VISIBLE_DEVICES is ''; unset it"),
    ],
)
def test_cuda_tells_a_missing_driver_from_a_hidden_gpu(monkeypatch, driver, visible, reason):
    build(monkeypatch, cuda="13.0")
    monkeypatch.setattr(Path, "exists", lambda path: driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert reason in (cuda.probe() or "")


@pytest.fixture
def npu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A torch_npu of some version, with CANN or without, and some devices."""

    def install(version="2.13.0", cann=True, devices=1, soc=223, broken=False) -> None:
        distribution(tmp_path, "torch_npu", version)
        monkeypatch.setattr(ascend, "_has_cann", lambda: cann)
        module = types.ModuleType("torch_npu")
        module.npu = SimpleNamespace(device_count=lambda: devices, get_soc_version=lambda: soc)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "torch_npu", None if broken else module)

    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    real = ascend._version
    monkeypatch.setattr(ascend, "_version", lambda name: (2, 13) if name == "torch" else real(name))
    build(monkeypatch)
    monkeypatch.syspath_prepend(str(tmp_path))
    return install


def test_ascend_without_torch_npu_says_which_one_to_install(monkeypatch):
    def missing(name: str) -> str:
        raise ascend.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(ascend, "_version", lambda name: (2, 13))
    monkeypatch.setattr(ascend.metadata, "version", missing)
    assert "torch_npu is not installed" in (ascend.probe() or "")
    assert "torch-npu==2.13.*" in (ascend.probe() or "")


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        ({"version": "2.9.0"}, "torch_npu 2.9.0 is not supported; install one from 2.10 to 2.14"),
        ({"version": "2.12.0"}, "torch_npu 2.12.0 does not fit torch 2.13.0; install torch-npu==2.13.*"),
        ({"cann": False}, "CANN runtime not found (libascendcl.so)"),
        ({"broken": True}, "cannot be imported"),
        ({"devices": 0}, "sees no NPU; check npu-smi info"),
        ({"soc": 202}, "310P"),
    ],
)
def test_ascend_names_what_is_missing(npu, machine, reason):
    npu(**machine)
    answer = ascend.probe() or ""
    assert reason in answer
    assert "\n" not in answer


def test_ascend_is_usable_with_everything_there(npu):
    npu()
    assert ascend.probe() is None


def test_ascend_refuses_a_torch_built_for_gpus(npu, monkeypatch):
    npu()
    build(monkeypatch, cuda="13.0")
    assert "install a CPU build of torch" in (ascend.probe() or "")


@pytest.mark.slow
def test_a_torch_npu_that_breaks_the_import_of_torch_does_not_break_the_command_line(tmp_path):
    distribution(tmp_path, "torch_npu", "2.13.0", "[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')\n")
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
        )

    assert run("-c", "import torch").returncode != 0
    doctor = run("-m", "dsv3", "doctor", "--backend", "cpu")
    assert doctor.returncode == 0, doctor.stderr
    assert "ascend   not usable: torch_npu" in doctor.stdout


# --- the cache ---


@pytest.mark.parametrize("name", ["cpu", "cuda", "rocm"])
def test_the_cache_is_one_tensor_of_64_token_pages(monkeypatch, name):
    monkeypatch.setitem(discover(), name, Backend(name, "cpu", probe=lambda: None, layout=discover()[name].layout))
    activate(name)
    assert cache_layout(V3, torch.bfloat16).tensors == (((64, 576), torch.bfloat16),)
    assert cache_layout(V3, torch.float8_e4m3fn).tensors == (((64, 656), torch.uint8),)
    assert cache_layout(V3, torch.float8_e4m3fn).bytes_per_token == 656
    assert cache_layout(V3, torch.bfloat16).rope_order == "interleaved"


def test_ascend_keeps_latent_and_rotary_key_apart_in_pages_of_128():
    discover()["ascend"].load()
    with op_backend("ascend"):
        layout = cache_layout(V3, torch.bfloat16)
        assert layout.tensors == (((1, 128, 512), torch.bfloat16), ((1, 128, 64), torch.bfloat16))
        assert (layout.page_size, layout.rope_order, layout.bytes_per_token) == (128, "halves", 1152)
        with pytest.raises(UserError, match="no FP8 cache"):
            cache_layout(V3, torch.float8_e4m3fn)


def test_a_latent_that_is_no_multiple_of_128_still_has_a_scale_for_its_last_part():
    dims = SimpleNamespace(kv_lora_rank=200, qk_rope_head_dim=8)
    assert fused_layout(dims, torch.float8_e4m3fn).bytes_per_token == 200 + 2 * 4 + 2 * 8


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_an_op_without_a_kernel_runs_its_specification_on_the_gpu():
    x, w = torch.randn(5, 64), torch.randn(64)
    with use_backend("rocm" if torch.version.hip else "cuda"):
        y = rms_norm(x.cuda(), w.cuda(), 1e-6)
    assert y.is_cuda
    torch.testing.assert_close(y.cpu(), rms_norm.spec(x, w, 1e-6))
