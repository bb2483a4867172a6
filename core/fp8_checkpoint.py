"""FP8 weights of checkpoints: E4M3 values beside the float32 scales of their 128 x 128 blocks.

`X.weight` [N, K] has `X.weight_scale_inv` [ceil(N/128), ceil(K/128)], a multiplier; the last blocks of a dimension may
be cut short (kv_a_proj_with_mqa has 576 rows). Work goes in bands of rows, so that nothing of the size of a matrix in
float32 is ever allocated.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..ops.formats import BLOCK, E4M3, num_blocks
from ..ops.fp8 import dequantize_blocks, quantize_blocks
from .config import ModelConfig

BAND = 2 * BLOCK


def dequantize_into(out: Tensor, weight: Tensor, scale: Tensor) -> None:
    """out [N,K] (any float dtype) = weight [N,K] (E4M3) times scale [ceil(N/128), ceil(K/128)], block by block."""
    for rows, blocks in _bands(weight.shape[0]):
        out[rows].copy_(dequantize_blocks(weight[rows], scale[blocks], torch.float32))


def quantize(weight: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """weight [N,K] -> (E4M3 [N,K], float32 scales [ceil(N/128), ceil(K/128)]).

    power_of_two: UE8M0 scales, as in V3.1. A weight that is not finite gives scales that are not finite either.
    """
    values = torch.empty(weight.shape, dtype=E4M3)
    scale = torch.empty([num_blocks(size) for size in weight.shape])
    for rows, blocks in _bands(weight.shape[0]):
        values[rows], scale[blocks] = quantize_blocks(weight[rows], E4M3, power_of_two)
    return values, scale


def require_block_edges(what: str, size: int, start: int, length: int) -> None:
    """UserError unless elements `start` to `start + length` of a dimension of `size` are whole blocks."""
    if start % BLOCK or ((start + length) % BLOCK and start + length < size):
        raise UserError(
            f"{what} is FP8 in blocks of {BLOCK} x {BLOCK}, which a piece of {length} cuts through; "
            "spread the model over fewer processes, or convert it to bfloat16"
        )


def all_finite(tensor: Tensor) -> bool:
    """Without a temporary of the tensor's size, at the speed of the memory."""
    if not tensor.numel():
        return True
    if tensor.dtype == E4M3:  # no infinities; NaN is 0x7F, the largest as int8, and 0xFF, the largest as uint8
        return bool(tensor.view(torch.int8).max() < 0x7F and tensor.view(torch.uint8).max() < 0xFF)
    low, high = torch.aminmax(tensor)  # both are NaN if any element is
    return bool(torch.isfinite(low) and torch.isfinite(high))


def quantization_config(config: ModelConfig, not_converted: list[str]) -> dict[str, Any]:
    """The entry of config.json that transformers, vLLM and SGLang read. not_converted: modules that stay as they
    were."""
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
        **({"scale_fmt": "ue8m0"} if wants_power_of_two(config) else {}),
        **({"modules_to_not_convert": not_converted} if not_converted else {}),
    }


def wants_power_of_two(config: ModelConfig) -> bool:
    """Does the configuration ask for UE8M0 scales (V3.1 and later)?"""
    return (config.quantization_config or {}).get("scale_fmt") == "ue8m0"


def _bands(rows: int) -> Iterator[tuple[slice, slice]]:
    """Slices of the rows of a weight, and of the rows of its scales."""
    for start in range(0, rows, BAND):
        yield slice(start, start + BAND), slice(start // BLOCK, (start + BAND) // BLOCK)
