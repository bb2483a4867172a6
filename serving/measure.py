"""What steps cost here, measured before the first request: the coefficients of `CostModel`."""

import time

from ..core.sampling_params import SamplingParams
from .cost import CostModel
from .request import Request
from .runner import Runner
from .scheduler import Plan, Work

CHUNK, DEPTH = 128, 2048  # tokens of a measured chunk, and the context of the deeper one
TINY = 1e-9  # seconds: what a clock calls nothing


def measure(runner: Runner, context: int, row: int = 0) -> CostModel:
    """Runs a few steps over blocks that nobody holds yet, in row `row`, which is left as it was."""
    capacity = min(runner.num_blocks * runner.page_size, context)
    depth = max(min(DEPTH, capacity - CHUNK), 0)
    chunk = min(CHUNK, max(capacity - 1, 1))
    request = Request(-1, [0] * min(depth + chunk, capacity), SamplingParams(temperature=0.0), capacity, 0)
    request.row, request.blocks = row, list(range(-(-len(request.tokens) // runner.page_size)))
    seconds(runner, request, 0, chunk)  # what is made once is made now
    one = seconds(runner, request, 0, 1)
    many = seconds(runner, request, 0, chunk)
    deep = seconds(runner, request, depth, chunk) if depth else many
    token = max((many - one) / max(chunk - 1, 1), TINY)
    return CostModel(max(one - token, 0.0), token, max(deep - many, 0.0) / (chunk * depth) if depth else 0.0)


def seconds(runner: Runner, request: Request, start: int, count: int, times: int = 3) -> float:
    """Of a step that computes these tokens, at best."""
    best = float("inf")
    for _ in range(times):
        begun = time.perf_counter()
        runner.resolve(runner.launch(Plan([Work(request, start, count, start + count == len(request.tokens))])))
        best = min(best, time.perf_counter() - begun)
    request.synced = 0
    return best
