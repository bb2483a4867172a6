"""Which vendor's libraries are taken for what they say they are, and which adapters are listed."""

import json
import subprocess
import sys
import warnings

import pytest
import stand_ins
import torch
from stand_ins import adapter
from stand_ins import aiter as aiter_library
from stand_ins import deep_gemm as deep_gemm_library
from stand_ins import flash_mla as flash_mla_library
from stand_ins import flashinfer as flashinfer_library

from dsv3 import backends
from dsv3.backends import probing
from dsv3.backends.probing import Unavailable, available, find
from dsv3.backends.rocm import aiter
from dsv3.ops.fp8 import fp8_gemm, fp8_gemm_wgrad
from dsv3.ops.grouped_fp8 import grouped_fp8_gemm, masked_fp8_gemm
from dsv3.ops.mla import mla_attention, mla_attention_backward
from dsv3.ops.mla_cache import mla_decode


def reason(*args) -> str:
    with pytest.raises(Unavailable) as caught:
        find(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_library_that_is_not_here(monkeypatch):
    stand_ins.install(monkeypatch)
    assert reason("surely_not_installed", ("anything",)) == "surely_not_installed is not installed"


@pytest.mark.parametrize(
    ("name", "attributes"),
    [("aiter", ("gemm_a8w8_blockscale",)), ("deep_gemm", ("fp8_gemm_nt", "m_grouped_fp8_gemm_nt_contiguous"))],
)
def test_a_package_of_the_same_name_is_not_taken(monkeypatch, name, attributes):
    """PyPI's `aiter` is about asyncio; PyPI's `deep-gemm` has the functions of 2025."""
    other = stand_ins.module(name, __version__="9.9", gemm_fp8_fp8_bf16_nt=len, anext=next)
    stand_ins.install(monkeypatch, **{name: other})
    assert f"{name} has no {', '.join(attributes)}" in reason(name, attributes)


@pytest.mark.parametrize(
    ("version", "taken"), [("0.4.9", False), ("0.5.0", True), ("0.10.1rc2+cu130", True), (None, False)]
)
def test_versions_are_compared_as_numbers(monkeypatch, version, taken):
    top = stand_ins.module("flashinfer", **({"__version__": version} if version else {}))
    stand_ins.install(monkeypatch, flashinfer=top, flashinfer__mla=flashinfer_library)
    if taken:
        assert find("flashinfer.mla", ("BatchMLAPagedAttentionWrapper",), "0.5") is flashinfer_library
    else:
        assert "older than 0.5" in reason("flashinfer.mla", ("BatchMLAPagedAttentionWrapper",), "0.5")


@pytest.mark.parametrize(
    "failure",
    ["raise ImportError('libcuda.so.1: cannot open shared object file\\nand more')", "raise SystemExit(3)", "1 / 0"],
)
def test_a_library_that_breaks_on_import_is_not_available(monkeypatch, tmp_path, failure):
    (tmp_path / "broken_library.py").write_text(failure)
    monkeypatch.syspath_prepend(str(tmp_path))
    stand_ins.install(monkeypatch)
    asked = available("broken", lambda: find("broken_library", ("anything",)))
    assert asked() is False
    assert probing.REASONS["broken"].startswith("importing broken_library failed: ")
    assert "\n" not in probing.REASONS["broken"]


def test_a_library_that_greets_does_not_write_to_standard_output(monkeypatch, tmp_path, capsys):
    (tmp_path / "greeting_library.py").write_text("print('welcome')\nanything = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    stand_ins.install(monkeypatch)
    assert find("greeting_library", ("anything",)).anything == 1
    assert capsys.readouterr().out == ""
    sys.modules.pop("greeting_library")


def test_an_adapter_asks_for_its_chip_before_it_imports(monkeypatch):
    """Also where the library is installed."""
    stand_ins.install(monkeypatch, deep_gemm=deep_gemm_library, aiter=aiter_library)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for op, provider, backend in ((fp8_gemm, "deep_gemm", "cuda"), (fp8_gemm, "aiter", "rocm")):
        assert adapter(op, provider, backend).available() is False
        assert "GPU here" in probing.REASONS[provider]
    assert probing._found == {}


def hopper(monkeypatch, capability=(9, 0), cuda="13.0") -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


def test_on_hopper_with_everything_there_all_are_available(monkeypatch):
    hopper(monkeypatch)
    top = stand_ins.module("flashinfer", __version__="0.6.7")
    stand_ins.install(monkeypatch, deep_gemm=deep_gemm_library, flashinfer=top, flashinfer__mla=flashinfer_library)
    monkeypatch.setitem(sys.modules, "flash_mla", stand_ins.module("flash_mla"))
    monkeypatch.setitem(sys.modules, "flash_mla.flash_mla_interface", flash_mla_library)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    kernels = [
        (fp8_gemm, ["deep_gemm", "cublaslt"]),
        (fp8_gemm_wgrad, ["deep_gemm"]),
        (masked_fp8_gemm, ["deep_gemm"]),
        (grouped_fp8_gemm, ["deep_gemm"]),
        (mla_decode, ["flash_mla", "flashinfer"]),
        (mla_attention, ["cudnn"]),
        (mla_attention_backward, ["cudnn"]),
    ]
    for op, providers in kernels:
        ranked = [kernel for kernel in op.kernels["cuda"] if kernel.priority > 0]
        assert [kernel.provider for kernel in ranked] == providers
        assert all(kernel.available() and kernel.checked == "emulated" for kernel in ranked), probing.REASONS
    hopper(monkeypatch, (10, 0))
    assert not adapter(fp8_gemm, "deep_gemm").available()
    assert probing.REASONS["deep_gemm"] == "made for Hopper (sm_90), this GPU is sm_100"


@pytest.mark.parametrize(("cuda", "version", "missing"), [("12.8", 91900, "cublaslt"), ("13.0", 91002, "cudnn")])
def test_what_torch_brings_counts_from_a_version_on(monkeypatch, cuda, version, missing):
    hopper(monkeypatch, cuda=cuda)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    for op, provider in ((fp8_gemm, "cublaslt"), (mla_attention, "cudnn")):
        assert adapter(op, provider).available() == (provider != missing)


def test_on_mi300_aiter_is_available_with_the_right_release(monkeypatch):
    mla = stand_ins.module("aiter.mla", mla_decode_fwd=aiter_library.mla_decode_fwd)
    stand_ins.install(monkeypatch, aiter=aiter_library, aiter__mla=mla)
    monkeypatch.setattr(aiter, "_chip", lambda: "gfx942")
    kernels = adapter(fp8_gemm, "aiter", "rocm"), adapter(mla_decode, "aiter", "rocm")
    assert all(kernel.available() for kernel in kernels)
    old = stand_ins.module("aiter.mla", mla_decode_fwd=lambda q, kv_buffer, o, *rest: None)
    stand_ins.install(monkeypatch, aiter=aiter_library, aiter__mla=old)
    assert [kernel.available() for kernel in kernels] == [True, False]


def test_the_adapters_are_listed_and_say_no_here():
    """What `dsv3 doctor --ops` shows of a backend."""
    from dsv3 import doctor

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if torch.cuda.is_available():
            pytest.skip("a GPU is here")
    for name, providers in {
        "cuda": {"cublaslt", "cudnn", "deep_gemm", "flash_mla", "flashinfer"},
        "rocm": {"aiter"},
    }.items():
        backend = backends.discover()[name]
        backend.load()
        rows = [row for row in doctor.op_rows(backend) if row["provider"] in providers]
        assert {row["provider"] for row in rows} == providers
        assert all(not row["available"] and row["checked"] == "emulated" and row["takes"] == "some" for row in rows)


def test_registering_imports_no_library(tmp_path):
    """Not even one that is installed: only the question whether it is available does."""
    names = ("deep_gemm", "flash_mla", "flashinfer", "aiter")
    for name in names:
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('imported')")
    script = (
        "import json, sys\nfrom dsv3.backends import discover\n"
        "for name in ('cuda', 'rocm'):\n    discover()[name].load()\n"
        f"print(json.dumps([name for name in {names} if name in sys.modules]))"
    )
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == []
