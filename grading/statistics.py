"""How sure a measured share or mean is: intervals for benchmark scores, and unbiased pass@k.

Intervals are (low, high). They say how far the score would move with other questions of the same kind; samples of one
question are not new questions, which is what `clustered_interval` is for.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist, fmean

Interval = tuple[float, float]

UNKNOWN: Interval = (-math.inf, math.inf)
"""What one value says about where the mean of many would lie."""


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for a share: stays within 0..1 and says something at 0 and n successes. n = 0: (0, 1)."""
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}")
    if n == 0:
        return 0.0, 1.0
    z, share = NormalDist().inv_cdf((1 + confidence) / 2), successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # At the ends the interval touches 0 or 1; rounding must not carry it past them, nor past the share.
    low = 0.0 if successes == 0 else max(0.0, middle - half)
    high = 1.0 if successes == n else min(1.0, middle + half)
    return low, high


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's t interval for the mean of independent values. Fewer than two: UNKNOWN."""
    return clustered_interval([[value] for value in values], confidence)


def paired_interval(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Interval:
    """Interval for mean(a) - mean(b), two scores of the same items in the same order: the items' own spread cancels."""
    return mean_interval([x - y for x, y in zip(a, b, strict=True)], confidence)


def clustered_interval(values_per_item: Sequence[Sequence[float]], confidence: float = 0.95) -> Interval:
    """Interval for the mean over all samples of all items, where samples of one item resemble each other.

    The standard error sums the residuals of an item before it squares them, so more samples of the same items make the
    interval no narrower than the spread between items allows. t with (items - 1) degrees of freedom.
    """
    items = [values for values in values_per_item if len(values)]
    if len(items) < 2:
        return UNKNOWN
    count = sum(len(values) for values in items)
    mean = fmean(value for values in items for value in values)
    spread = sum(math.fsum(value - mean for value in values) ** 2 for values in items)
    error = math.sqrt(spread * len(items) / (len(items) - 1)) / count
    half = t_quantile(confidence, len(items) - 1) * error
    return mean - half, mean + half


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that at least one of k samples passes, unbiased from c passes in n samples (Codex paper, equation 1)."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} needs at least {k} samples, of which 0..n pass; got {c} passes of n = {n}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


@lru_cache
def t_quantile(confidence: float, freedom: int) -> float:
    """The t that a t-distributed value of `freedom` >= 1 degrees stays below in magnitude with this probability."""
    if freedom > 1000:  # Cornish-Fisher; the next term is below 1e-8
        z = NormalDist().inv_cdf((1 + confidence) / 2)
        return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    low, high = 0.0, math.pi / 2  # of atan(t / sqrt(freedom)), in which the probability is a finite series
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """P(|T| < sqrt(freedom) tan(angle)); Abramowitz and Stegun 26.7.3 and 26.7.4."""
    odd = freedom % 2
    term, total = (math.cos(angle), 0.0) if odd else (1.0, 0.0)
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * math.cos(angle) ** 2
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
