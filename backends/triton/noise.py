"""The noise of sampling, bit for bit that of ops/sampling.py, and the logarithms that it needs.

The logarithm is made of products and sums that every chip rounds alike: what a GPU calls log is an approximation that
has no correct digit left near 1, and whose last digits differ from chip to chip, and with them the sampled tokens.
"""

import triton.language as tl

from ...ops.sampling import FACTORS, LARGEST_UNIFORM
from .runtime import device_function

FACTOR_1 = tl.constexpr(FACTORS[0])
FACTOR_2 = tl.constexpr(FACTORS[1])
LARGEST = tl.constexpr(LARGEST_UNIFORM)
UNIT = tl.constexpr(2.0**-31)

SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
LN2_HIGH = tl.constexpr(0.693359375)  # ln 2 in two pieces: the first has few digits, so that its multiples are exact
LN2_LOW = tl.constexpr(-2.12194440e-4)


@device_function
def _mixed(word):
    """`ops.sampling._mix` of uint32."""
    word = (word ^ (word >> 15)) * FACTOR_1
    word = (word ^ (word >> 12)) * FACTOR_2
    return word ^ (word >> 15)


@device_function
def noise_keys(seed, position):
    """`ops.sampling.noise_keys`: seed, position i64 -> two uint32 [1]."""
    seed = seed + tl.zeros((1,), tl.int64)  # numbers of the interpreter warn when they wrap, blocks do not
    low, high = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    place = (position & 0xFFFFFFFF).to(tl.uint32)
    first = _mixed(_mixed(_mixed(low + 0x9E3779B9) ^ high) ^ place)
    second = _mixed(_mixed(_mixed(high + 0x7F4A7C15) ^ low) + place)
    return first, second


@device_function
def natural_log(x):
    """ln of normal float32 x > 0 within one unit in the last place, near 1 too: 2^k (1 + f), and a polynomial of f."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0  # in [sqrt(1/2) - 1, sqrt(2) - 1)
    k = exponent.to(tl.float32)
    y = tl.fma(f, 7.0376836292e-2, -1.1514610310e-1)
    y = tl.fma(y, f, 1.1676998740e-1)
    y = tl.fma(y, f, -1.2420140846e-1)
    y = tl.fma(y, f, 1.4249322787e-1)
    y = tl.fma(y, f, -1.6668057665e-1)
    y = tl.fma(y, f, 2.0000714765e-1)
    y = tl.fma(y, f, -2.4999993993e-1)
    y = tl.fma(y, f, 3.3333331174e-1)
    square = f * f
    y = tl.fma(k, LN2_LOW, y * f * square)
    return tl.fma(k, LN2_HIGH, f + tl.fma(square, -0.5, y))


@device_function
def log_of_one_plus(x):
    """ln(1 + x) of x >= 0, to full relative precision near 0: what 1 + x loses to rounding is added back."""
    sum = 1.0 + x
    lost = tl.where(x < 1, x - (sum - 1.0), 1.0 - (sum - x))
    return natural_log(sum) + lost / sum


@device_function
def gumbel(first, second, token):
    """Keys uint32 [1] and token ids i32 [..] -> standard Gumbel noise f32: `ops.sampling.gumbel` of `noise_bits`."""
    bits = _mixed(_mixed(token.to(tl.uint32) ^ first) + second) >> 1
    uniform = tl.minimum((bits.to(tl.int32).to(tl.float32) + 0.5) * UNIT, LARGEST)
    # -log1p(-u) as in log_of_one_plus. Where 1 - u is rounded, it is above 1/2: no need to divide by it.
    rest = 1.0 - uniform
    exponential = -(natural_log(rest) + ((1.0 - rest) - uniform))
    return -natural_log(exponential)
