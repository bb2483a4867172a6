"""How long a call takes: medians of many, on GPUs by events on the stream and with a cold L2 cache."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

REPEATS, LEAST_SECONDS = 20, 0.2
FLUSHED_BYTES = 256 << 20  # more than any L2 holds


def seconds(call: Callable[[], Any], device: str) -> float:
    """Median seconds of `call`. Raises what `call` raises."""
    return _on_gpu(call) if device != "cpu" else _on_cpu(call)


def _on_cpu(call: Callable[[], Any]) -> float:
    call()
    taken: list[float] = []
    while len(taken) < 3 or (len(taken) < REPEATS and sum(taken) < LEAST_SECONDS):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def _on_gpu(call: Callable[[], Any]) -> float:
    cache = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(3):
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPEATS)]
    for began, ended in events:
        cache.zero_()  # also keeps the GPU busy while the host prepares the launch
        began.record()
        call()
        ended.record()
    torch.cuda.synchronize()
    return statistics.median(began.elapsed_time(ended) for began, ended in events) / 1e3
