"""Triton's interpreter, repaired.

As of 3.9 it truncates float32 to bfloat16, loses the carry of float32 to FP8, does not saturate there, and multiplies
the bits of bfloat16 matrices as integers. Here torch's exact casts take over, and arithmetic on narrow floats, which
has no meaning in the interpreter, is an error: kernels widen to float32 first.
"""

from typing import Any

import numpy as np
import torch

from ...ops.formats import FP8_MAX

_repaired = False
_UNSIGNED = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32, 64: torch.uint64}


def repair() -> None:
    """Patch the interpreter of this process, once."""
    global _repaired
    if _repaired:
        return
    _repaired = True
    import triton.language as tl
    from triton.runtime import interpreter

    types = {
        tl.float64: torch.float64,
        tl.float32: torch.float32,
        tl.float16: torch.float16,
        tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float8e4b8: torch.float8_e4m3fnuz,
        tl.float8e5: torch.float8_e5m2,
    }
    native = (tl.float64, tl.float32, tl.float16)  # what numpy computes with
    theirs = interpreter._convert_float

    def convert(x: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
        if source not in types or target not in types:
            return theirs(x, source, target, rounding_mode)
        bits = np.frombuffer(x.tobytes(), dtype=f"uint{source.primitive_bitwidth}").copy()
        values = torch.from_numpy(bits).view(types[source])
        largest = FP8_MAX.get(types[target])
        if largest is not None:  # GPUs saturate
            values = torch.where(values.isnan(), values, values.clamp(-largest, largest))
        return values.to(types[target]).view(_UNSIGNED[target.primitive_bitwidth]).numpy().reshape(x.shape)

    def as_numbers(handle: Any) -> np.ndarray:
        scalar = handle.dtype.scalar
        if scalar in types and scalar not in native:
            return convert(handle.data, scalar, tl.float32, None).view(np.float32)
        return handle.data

    def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        product = np.matmul(as_numbers(a), as_numbers(b), dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot
    for name in ("create_fadd", "create_fsub", "create_fmul", "create_fdiv"):
        _guard(interpreter.InterpreterBuilder, name)


def _guard(builder: Any, name: str) -> None:
    compute = getattr(builder, name)

    def guarded(self: Any, left: Any, right: Any) -> Any:
        if left.dtype.scalar.primitive_bitwidth < 32 and left.data.dtype.kind == "u":
            raise TypeError(f"{name} of {left.dtype}: widen to float32 first")
        return compute(self, left, right)

    setattr(builder, name, guarded)
