"""`dsv3 doctor`: the machine, the kernel of every op, a model and its cache."""

import json

import pytest
import torch

from dsv3 import backends, cli, doctor
from dsv3.backends.cpu import native
from dsv3.core.cache_size import cache_bytes_per_token, kv_bytes, latent_bytes
from dsv3.core.config import ModelConfig
from dsv3.ops.op import OPS, Kernel, use_backend


@pytest.fixture(autouse=True)
def process_of_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backends, "_active", None)
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")


def report(capsys: pytest.CaptureFixture[str], *argv: str):
    assert cli.main(["doctor", *argv, "--backend", "cpu", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def text(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(["doctor", *argv, "--backend", "cpu"]) == 0
    return capsys.readouterr().out


def test_the_machine_is_described(capsys):
    machine = report(capsys)
    assert machine["libraries"]["torch"] == torch.__version__
    assert machine["cpu"]["cores"] >= 1
    assert {backend["name"]: backend["selected"] for backend in machine["backends"]}.items() >= {
        ("cpu", True),
        ("cuda", False),
        ("rocm", False),
        ("ascend", False),
    }


def test_every_backend_has_one_line_and_an_unusable_one_its_reason(capsys):
    lines = text(capsys).splitlines()
    for backend in report(capsys)["backends"]:
        (line,) = (line for line in lines if line[4:].startswith(backend["name"] + " "))
        assert ("not usable: " in line) == (not backend["usable"])
        assert backend["usable"] or backend["why_not"] in line
        assert line.endswith(backend["remark"])


def test_missing_cpp_kernels_are_told_with_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(native, "extension", None)
    assert "install g++" in text(capsys)


def test_a_missing_library_comes_with_the_extra_that_brings_it(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "library_version", lambda name: None if name == "onnx" else "1.0")
    assert "not installed: onnx (pip install 'dsv3[export]')" in text(capsys)


def test_for_every_op_the_rows_end_with_a_kernel_that_takes_every_call(capsys):
    rows = report(capsys, "--ops")
    assert {row["op"] for row in rows} == set(OPS)
    for row in rows:
        assert row.keys() >= {"op", "backend", "kernel", "provider", "available", "checked"}
        assert row["backend"] == "cpu"
    for name in OPS:
        last = [row for row in rows if row["op"] == name][-1]
        assert last["available"] and last["takes"] == "all"


def test_the_order_of_the_rows_is_the_order_in_which_a_call_asks(monkeypatch):
    backend = backends.discover()["cpu"]
    doctor.op_rows(backend)
    name = "rms_norm"
    kernels = [
        Kernel("absent", len, priority=9, available=lambda: False),
        Kernel("picky", len, priority=8, supports=lambda *args: False),
        Kernel("willing", len, priority=7),
        Kernel("never asked", len, priority=6),
    ]
    monkeypatch.setitem(OPS[name].kernels, "cpu", kernels)
    rows = [row for row in doctor.op_rows(backend) if row["op"] == name]
    assert [(row["provider"], row["available"], row["takes"]) for row in rows] == [
        ("absent", False, "all"),
        ("picky", True, "some"),
        ("willing", True, "all"),
    ]
    with use_backend("cpu"):
        assert OPS[name].choose().provider == rows[-1]["provider"]


def test_a_backend_without_kernels_runs_specifications_and_claims_no_check():
    rows = doctor.op_rows(backends.discover()["ascend"])
    assert {(row["provider"], row["checked"]) for row in rows} == {("specification", "reference")}


def test_deepseek_v3_is_described_by_its_published_numbers(capsys):
    model = report(capsys, "deepseek-v3-671b")
    assert model["parameters"] == {"main": 671_026_419_200, "mtp": 11_610_068_224}
    assert model["cache_bytes_per_token"] == {
        "latent_bf16": 70_272,
        "latent_fp8": 40_016,
        "mha_bf16": 3_997_696,
        "gqa8_bf16": 249_856,
    }
    assert "671,026,419,200 parameters" in text(capsys, "deepseek-v3-671b")


def test_the_fp8_cache_of_a_layer_is_656_bytes_per_token():
    config = ModelConfig.from_pretrained("deepseek-v3-671b")
    assert cache_bytes_per_token(config).latent_fp8 == config.num_hidden_layers * 656


def test_the_93_3_percent_of_the_v2_report_are_mla_at_6_bits_beside_gqa_at_16():
    """Against DeepSeek 67B (95 layers, 8 KV heads of 128, bfloat16), with V2's cache quantised to 6 bits an element.

    V2 report, sections 1 and 3.2.3. By elements alone it is 82.2 %.
    """
    v2 = ModelConfig.from_pretrained("deepseek-v2-236b")
    dims = (v2.num_hidden_layers, v2.kv_lora_rank, v2.qk_rope_head_dim)
    dense_67b = kv_bytes(95, 8, 128, 128)
    assert (latent_bytes(*dims, bits=6), dense_67b) == (25_920, 389_120)
    assert round(100 * (1 - latent_bytes(*dims, bits=6) / dense_67b), 1) == 93.3
    assert round(100 * (1 - latent_bytes(*dims) / dense_67b), 1) == 82.2
