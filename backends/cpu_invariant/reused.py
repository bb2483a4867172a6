"""Kernels of the cpu backend that serve here as they are: they move rows, or round numbers one by one."""

from ...ops import fp8, mla_cache, moe, norm_quantize
from ...ops.op import Op
from .. import cpu
from . import NAME

ROW_BY_ROW: tuple[Op, ...] = (
    fp8.dequantize_blocks,
    fp8.dequantize_tiles,
    fp8.quantize_blocks,
    fp8.quantize_tiles,
    fp8.quantize_tiles_both,
    mla_cache.mla_cache_gather,
    moe.permute,
    moe.permute_quantize,
    norm_quantize.add_rms_norm_quantize,
    norm_quantize.rms_norm_quantize,
)

for op in ROW_BY_ROW:
    for kernel in op.kernels[cpu.BACKEND.name]:
        options = {name: getattr(kernel, name) for name in ("priority", "available", "supports", "checked")}
        op.kernel(NAME, kernel.provider, **options)(kernel.run)
