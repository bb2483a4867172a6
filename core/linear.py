"""Matrix products of the model: modules that hold a weight in whatever format it was loaded."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from ..ops.fp8 import dequantize_blocks, fp8_gemm, quantize_tiles
from ..ops.grouped_fp8 import grouped_fp8_gemm
from ..ops.weight import Quantized, Weight, grouped_linear, linear, masked_linear, pack

Stamp = tuple[tuple[Tensor, int], ...]  # tensors, and the version in which each was read


def version(tensor: Tensor) -> int:
    """How often it was written in place. Not of an inference tensor, nor through `.data`: those writes do not count."""
    return 0 if tensor.is_inference() else tensor._version


def same(a: Stamp, b: Stamp) -> bool:
    """Are these the same tensors in the same versions?"""
    return len(a) == len(b) and all(x is y and m == n for (x, m), (y, n) in zip(a, b, strict=True))


class _FrozenFp8(Function):
    """The product with an FP8 weight that does not train, and the gradient of its input as the report has it (section
    3.3.2, Dgrad): gradients in tiles of 1 x 128. Nothing is kept for backward but the weight, which is there anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, plain: Weight, offsets: Tensor | None) -> Tensor:
        ctx.plain, ctx.offsets = plain, offsets
        return linear(x, weight) if offsets is None else grouped_linear(x, weight, offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        w, scale, offsets = ctx.plain.data, ctx.plain.scale, ctx.offsets
        rows = grad.reshape(-1, grad.shape[-1])
        values, scales = quantize_tiles(rows, w.dtype, ctx.plain.format == "fp8_ue8m0")
        if offsets is None:
            of_x = fp8_gemm(values, scales, w.T, scale.T, grad.dtype)
        else:
            of_x = grouped_fp8_gemm(values, scales, w.mT, scale.mT, offsets, grad.dtype)
        return of_x.view(*grad.shape[:-1], of_x.shape[-1]), None, None, None


class Linear(nn.Module):
    """x [..., K] -> [..., N] without bias. `weight` is [N, K]; with `experts`, [E, N, K] (see GroupedLinear)."""

    weight_scale_inv: Tensor | None

    def __init__(
        self, shape: tuple[int, ...], device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.register_buffer("weight_scale_inv", None)
        self.power_of_two_scales = False
        self._packed: tuple[Weight, Tensor, int] | None = None  # and what it was packed from

    def load_fp8(self, weight: Tensor, scale_inv: Tensor, power_of_two_scales: bool = False) -> None:
        """Take FP8 values [.., N, K] and their block scales f32 [.., ceil(N/128), ceil(K/128)] in place of the weight.

        They stay FP8 in memory and are multiplied by the FP8 ops; they do not train.
        """
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("weight_scale_inv", scale_inv)
        self.power_of_two_scales = power_of_two_scales
        self._packed = None

    def pack(self) -> None:
        """Bring the weight into the layout that the active backend's kernel wants. For inference, after loading."""
        plain = self._plain(self.weight.dtype)
        packed = pack(plain)
        self._packed = None if packed is plain else (packed, self.weight, version(self.weight))

    def refresh(self) -> None:
        """Pack again what was packed from an earlier state of the weight."""
        if self._packed is not None:
            self.pack()

    def derived(self) -> tuple[Tensor, ...]:
        """What was made of the weight and is kept."""
        return () if self._packed is None else (self._packed[0].data,)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight as an ordinary matrix."""
        if self.weight_scale_inv is None:
            return self.weight.to(dtype)
        return dequantize_blocks(self.weight, self.weight_scale_inv, dtype)

    def merged(self) -> Tensor:
        """The weight as a checkpoint stores it, in the dtype of `weight` or, where an adapter was added, float32."""
        return self.weight

    def stamp(self) -> Stamp:
        """What `dequantized` is made of, for whoever keeps something derived from it."""
        return ((self.weight, version(self.weight)),)

    def _plain(self, dtype: torch.dtype) -> Weight:
        weight, scale = self.weight, self.weight_scale_inv  # once: a look-up in a module takes half a microsecond
        if scale is not None:
            return Weight(weight, scale, "fp8_ue8m0" if self.power_of_two_scales else "fp8")
        return Weight(weight if weight.dtype == dtype else weight.to(dtype))

    def fp8_input(self, x: Tensor) -> tuple[torch.dtype, bool] | None:
        """How `forward` would quantise x, for whoever does it before: the FP8 format, and whether scales are powers of
        two. None where it reads real numbers."""
        if self.weight_scale_inv is None:
            return None
        return self.for_input(x).data.dtype, self.power_of_two_scales

    def for_input(self, x: Tensor | Quantized) -> Weight:
        """The weight as the op takes it.

        Float weights follow the activations' dtype: float32 masters train in bfloat16.
        A packed weight that is no longer this weight, or not for this dtype, or asked for a gradient, is passed over.
        """
        if self._packed is not None and not self._differentiates(x):
            packed, source, written = self._packed
            same_dtype = self.weight_scale_inv is not None or self.weight.dtype == x.dtype
            if source is self.weight and written == version(source) and same_dtype:
                return packed
        return self._plain(x.dtype)

    def _differentiates(self, x: Tensor | Quantized) -> bool:
        return torch.is_grad_enabled() and (self.weight.requires_grad or x.requires_grad)

    def forward(self, x: Tensor | Quantized) -> Tensor:
        if self.weight_scale_inv is not None and self._differentiates(x):
            return _FrozenFp8.apply(x, self.for_input(x), self._plain(x.dtype), None)
        return linear(x, self.for_input(x))


class GroupedLinear(Linear):
    """One matrix per expert [E, N, K]: x [R, K], sorted by expert at `offsets` i32 [E + 1] -> [R, N]."""

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:  # type: ignore[override]
        if self.weight_scale_inv is not None and self._differentiates(x):
            return _FrozenFp8.apply(x, self.for_input(x), self._plain(x.dtype), offsets)
        return grouped_linear(x, self.for_input(x), offsets)

    def masked(self, x: Tensor, counts: Tensor) -> Tensor:
        """x [E, C, K], an expert's rows in front, counts i32 [E] of them -> [E, C, N]. For inference (decoding)."""
        weight = self.for_input(x)
        return masked_linear(x, weight if weight.layout == "plain" else self._plain(x.dtype), counts)


class Embedding(nn.Module):
    """tokens i64 [...] -> rows of `weight` [V, D]. nn.Embedding would fill itself with random numbers, on meta even."""

    def __init__(
        self, count: int, size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, size, device=device, dtype=dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.embedding(tokens, self.weight)
