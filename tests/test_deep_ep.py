"""DeepEP's adapter: when it is taken. What it brings back is checked between two processes, in test_expert_parallel."""

import pytest
import stand_ins
import torch
from arguments.collectives import world
from stand_ins import adapter
from stand_ins import deep_ep as library
from walk import load_everything

from dsv3.backends import probing
from dsv3.backends.cuda import deep_ep
from dsv3.ops.collectives import ep_combine_masked, ep_dispatch_masked

load_everything()
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def here(monkeypatch):
    stand_ins.install(monkeypatch, deep_ep=library)
    monkeypatch.setattr(deep_ep, "_buffers", {})
    monkeypatch.delenv("NVSHMEM_QP_DEPTH", raising=False)


def takes(
    T: int = 4, D: int = 2048, k: int = 2, capacity: int = 4, experts: int = 8, dtype: torch.dtype = BF16
) -> bool:
    idx = torch.zeros(T, k, dtype=torch.int32)
    return adapter(ep_dispatch_masked, "deep_ep").supports(
        torch.zeros(T, D, dtype=dtype), idx, experts, capacity, world()
    )


def test_it_takes_bf16_of_the_sizes_that_its_kernels_are_made_for():
    assert takes() and takes(D=7168) and takes(T=0)
    assert not takes(D=2176)
    assert not takes(dtype=torch.float32) and not takes(dtype=torch.float64)
    assert not takes(T=5)
    assert not takes(k=1, capacity=5)  # rows of an expert have to be a multiple of 4
    assert not takes(experts=2048)


def test_the_bound_fits_into_the_queues_and_the_buffer(monkeypatch):
    assert takes(k=7, capacity=72) and not takes(k=8, capacity=64)
    monkeypatch.setenv("NVSHMEM_QP_DEPTH", "1026")
    assert takes(k=8, capacity=64)
    monkeypatch.setattr(deep_ep, "MOST_BYTES", 2**20)
    assert not takes(k=8, capacity=64)


def test_no_buffer_is_made_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(deep_ep, "is_capturing", lambda: True)
    assert not takes()
    needed = library.Buffer.get_low_latency_rdma_size_hint(8, 2048, 1, 8)
    monkeypatch.setattr(deep_ep, "_buffers", {world(): deep_ep._Made(None, needed, 8)})
    assert takes() and takes(T=3)
    assert not takes(capacity=8) and not takes(experts=16)
    deep_ep._buffers[world()].open = 1  # its combine went elsewhere: the library's counter would be off in replays
    assert not takes()


def test_the_handle_says_who_combines():
    y, place, slots = torch.zeros(8, 4, 2048, dtype=BF16), torch.zeros(4, 2), torch.zeros(32)
    source, layout = torch.zeros(8, 8, dtype=torch.int32), torch.zeros(8, 1, dtype=torch.int64)
    supports = adapter(ep_combine_masked, "deep_ep").supports
    assert supports(y, [place, slots, source, layout], world())
    assert not supports(y, [place, slots], world())
    assert not supports(y.float(), [place, slots, source, layout], world())


def hopper(monkeypatch, capability=(9, 0)) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


def test_it_is_available_on_hopper_with_its_own_functions(monkeypatch):
    hopper(monkeypatch)
    pytest.importorskip("triton", reason="needs triton")
    for op in (ep_dispatch_masked, ep_combine_masked):
        kernel = adapter(op, "deep_ep")
        assert kernel.available() and kernel.checked == "emulated" and kernel is op.kernels["cuda"][0]
    other = stand_ins.module("deep_ep", Buffer=type("Buffer", (), {"dispatch": len}))
    stand_ins.install(monkeypatch, deep_ep=other)
    assert not adapter(ep_dispatch_masked, "deep_ep").available()
    assert "deep_ep.Buffer has no low_latency_dispatch" in probing.REASONS["deep_ep"]
    hopper(monkeypatch, (8, 0))
    assert not adapter(ep_dispatch_masked, "deep_ep").available()
    assert probing.REASONS["deep_ep"] == "made for Hopper (sm_90), this GPU is sm_80"
