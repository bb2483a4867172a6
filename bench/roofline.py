"""What this device can do at most, measured now: the ceiling that an op's time is held against."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..ops.formats import E4M3, E4M3_FNUZ
from .timing import seconds

SIZES = {"cpu": (1024, 64 << 20), "cuda": (8192, 1 << 30)}  # side of the products, bytes of the copy


@dataclass(frozen=True)
class Peaks:
    """bandwidth: bytes/s, of a copy. products: FLOP/s of torch's matrix product by width of its operands in bytes."""

    bandwidth: float
    products: dict[int, float]

    def least_seconds(self, flops: int, moved: int, width: int) -> tuple[float, str]:
        """The time that cannot be beaten, and what sets it: "memory" or "compute". width: bytes of an operand."""
        peak = self.products.get(width) or self.products[2]
        by = {"memory": moved / self.bandwidth, "compute": flops / peak}
        bound = max(by, key=lambda name: by[name])
        return by[bound], bound


def operand_width(args: Any) -> int:
    """Bytes of the narrowest float among an op's arguments: which unit could compute it."""
    floats = (
        leaf.element_size() for leaf in tree_leaves(args) if isinstance(leaf, Tensor) and leaf.is_floating_point()
    )
    return min(floats, default=4)


def measure_peaks(device: str) -> Peaks:
    side, size = SIZES.get(device, SIZES["cuda"])
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * size / seconds(partial(target.copy_, source), device)
    products = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        products[dtype.itemsize] = 2 * side**3 / seconds(partial(torch.mm, a, b), device)
    fp8 = _fp8_product(side, device)
    if fp8 is not None:
        products[1] = 2 * side**3 / fp8
    return Peaks(bandwidth, products)


def _fp8_product(side: int, device: str) -> float | None:
    """Seconds of torch's FP8 product with one scale per tensor; None where there is none."""
    if device == "cpu":
        return None
    for dtype in (E4M3, E4M3_FNUZ):
        a, b = (torch.ones(side, side, device=device).to(dtype) for _ in range(2))
        one = torch.ones((), device=device)
        try:
            product = partial(torch._scaled_mm, a, b.T, one, one, out_dtype=torch.bfloat16)
            return seconds(product, device)
        except (RuntimeError, ValueError):  # not this format, or not this chip
            continue
    return None
