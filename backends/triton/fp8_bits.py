"""E4M3 by its bits, for chips whose compiler does not know it (A100): one byte is sign, 4 bits of exponent (bias 7), 3
of mantissa; 0x7F and 0xFF are NaN."""

import triton.language as tl

from .runtime import device_function


@device_function
def half_of_e4m3(byte):
    """uint8 -> float16, exact: shifted into the exponent and mantissa of a float16 it is its value / 256. NaN becomes
    480: for products of quantised values, where a NaN has its scale NaN."""
    wide = byte.to(tl.int16)
    return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0


@device_function
def decode_e4m3(byte):
    """uint8 -> float32, exact, NaN too."""
    return tl.where((byte & 0x7F) == 0x7F, float("nan"), half_of_e4m3(byte).to(tl.float32))


@device_function
def encode_e4m3(x):
    """float32 within +-448 -> uint8, rounded to nearest even."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = bits & 0x7FFFFFFF
    rounded = size + 0x7FFFF + ((size >> 20) & 1)
    normal = (rounded >> 20) - (120 << 3)
    # Below 2**-6 values are multiples of 2**-9: adding 2**23 rounds to them, and leaves the count in the last bits.
    shifted = size.to(tl.float32, bitcast=True) * 512.0 + 8388608.0
    subnormal = shifted.to(tl.int32, bitcast=True) & 0xFF
    code = tl.where(size < 0x3C800000, subnormal, normal)
    return (tl.where(size > 0x7F800000, 0x7F, code) | sign).to(tl.uint8)


@device_function
def read_fp8(pointer, mask, DECODE: tl.constexpr):
    """FP8 values as float32; DECODE: the pointer is to the bytes of e4m3fn."""
    raw = tl.load(pointer, mask=mask, other=0.0 if not DECODE else 0)
    return decode_e4m3(raw) if DECODE else raw.to(tl.float32)


@device_function
def as_fp8(x, pointer, DECODE: tl.constexpr):
    """float32 within the format's range -> what `pointer` points to: FP8 or, DECODE, the bytes of e4m3fn."""
    return encode_e4m3(x) if DECODE else x.to(pointer.dtype.element_ty)


@device_function
def write_fp8(pointer, x, mask, DECODE: tl.constexpr):
    """Store float32 values within the format's range; see `as_fp8`."""
    tl.store(pointer, as_fp8(x, pointer, DECODE), mask=mask)
