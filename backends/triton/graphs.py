"""Capture and replay of a step by CUDA graphs (HIP graphs on AMD; torch has one name for both)."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ...ops.capture import CAPTURERS, Function, require_same_shapes

WARM_UPS = 2  # Triton compiles, BLAS allocates its workspace, tables are made: nothing of that may be captured


class Graph:
    """One launch for a whole step. Inputs are copied into the captured ones before it, results copied out after it.

    What a step computes from tensors of the host (mla_decode's lens_cpu) is frozen, as ops/capture.py says.
    """

    def __init__(self, step: Function, inputs: tuple[Tensor, ...]):
        self.inputs = tuple(tensor.clone() for tensor in inputs)
        self.graph = torch.cuda.CUDAGraph()
        with torch.no_grad():
            aside = torch.cuda.Stream()  # a capture may not begin on the default stream's pending work
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(WARM_UPS):
                    step(*self.inputs)
            torch.cuda.current_stream().wait_stream(aside)
            with torch.cuda.graph(self.graph):
                self.result = step(*self.inputs)

    def replay(self, *inputs: Tensor) -> Any:
        require_same_shapes(self.inputs, inputs)
        for captured, tensor in zip(self.inputs, inputs, strict=True):
            captured.copy_(tensor)
        self.graph.replay()
        return tree_map_only(Tensor, torch.clone, self.result)


for _backend in ("cuda", "rocm"):
    CAPTURERS[_backend] = Graph
