"""Launching a Triton kernel: what is refused, what is noted instead, and what every thread needs."""

import threading

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from triton.runtime import _allocation

from dsv3.backends.triton import runtime
from dsv3.backends.triton.runtime import launch, power_of_two, recording


class Kernel:
    """Remembers how it was launched, and with which allocator."""

    arg_names = ("x", "n", "BLOCK")

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args, **named: self.launches.append((grid, args, named, _allocation._allocator.get()))


def test_every_thread_that_launches_has_memory_for_tensor_descriptors():
    """Autograd runs backward in threads of its own, and Triton keeps the allocator per thread."""
    kernel = Kernel()
    for run in (lambda work: work(), lambda work: (thread := threading.Thread(target=work)).start() or thread.join()):
        run(lambda: launch(kernel, (1,), torch.zeros(1), 1, BLOCK=16))
    assert [allocator for *_, allocator in kernel.launches] == [runtime._scratch] * 2


def test_products_and_sums_are_not_fused_unless_the_launch_says_so():
    kernel = Kernel()
    launch(kernel, (1,), torch.zeros(1), 1, BLOCK=16)
    launch(kernel, (1,), torch.zeros(1), 1, BLOCK=16, enable_fp_fusion=True)
    assert [named["enable_fp_fusion"] for _, _, named, _ in kernel.launches] == [False, True]


def test_tensors_of_two_devices_are_refused():
    with pytest.raises(ValueError, match="on cpu and meta; bring them to one device"):
        launch(Kernel(), (1,), torch.zeros(1), torch.zeros(1, device="meta"), BLOCK=16)


def test_a_grid_without_programs_launches_nothing():
    kernel = Kernel()
    launch(kernel, (4, 0), torch.zeros(0), 0, BLOCK=16)
    assert kernel.launches == []


def test_a_recorded_launch_is_not_made_and_keeps_the_chip_options_apart():
    kernel, x = Kernel(), torch.zeros(2, device="meta")
    with recording() as launches:
        launch(kernel, (3,), x, 2, BLOCK=16, num_warps=8)
    assert kernel.launches == []
    (noted,) = launches
    assert noted.arguments == {"x": x, "n": 2, "BLOCK": 16} and noted.grid == (3,)
    assert noted.options == {"enable_fp_fusion": False, "num_warps": 8}


def test_blocks_measure_powers_of_two():
    assert [power_of_two(size) for size in (1, 2, 3, 16, 17)] == [1, 2, 4, 16, 32]
    assert power_of_two(3, least=16) == 16
