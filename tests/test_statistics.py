"""Intervals contain what they should, and pass@k is what drawing k samples would give."""

import math
from itertools import combinations
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.grading.statistics import (
    UNKNOWN,
    clustered_interval,
    mean_interval,
    paired_interval,
    pass_at_k,
    t_quantile,
    wilson,
)

VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=20)


@given(st.integers(0, 500), st.integers(0, 500), st.sampled_from([0.5, 0.9, 0.95, 0.999]))
def test_wilson_contains_the_share_and_stays_a_share(successes: int, failures: int, confidence: float):
    n = successes + failures
    low, high = wilson(successes, n, confidence)
    assert 0 <= low <= high <= 1
    if n:
        assert low <= successes / n <= high
        assert wilson(failures, n, confidence) == pytest.approx((1 - high, 1 - low))


def test_wilson_has_the_published_values():
    # Newcombe (1998), table I, method 3.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


@pytest.mark.parametrize(
    ("confidence", "freedom", "t"),
    [
        (0.95, 1, 12.7062),
        (0.95, 2, 4.3027),
        (0.95, 9, 2.2622),
        (0.9, 30, 1.6973),
        (0.99, 120, 2.6174),
        (0.95, 9**9, 1.96),
    ],
)
def test_t_has_the_tabulated_values(confidence: float, freedom: int, t: float):
    assert t_quantile(confidence, freedom) == pytest.approx(t, abs=5e-5)


def test_both_ways_to_compute_t_meet():
    assert t_quantile(0.95, 1000) == pytest.approx(t_quantile(0.95, 1001), rel=1e-5)


def test_the_interval_of_a_mean():
    low, high = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (low + high) / 2 == pytest.approx(3.0)
    assert (high - low) / 2 == pytest.approx(2.7764 * math.sqrt(2.5 / 5), rel=1e-4)
    assert mean_interval([3.0]) == mean_interval([]) == UNKNOWN
    assert mean_interval([2.0, 2.0]) == (2.0, 2.0)


@given(VALUES, st.integers(1, 5))
def test_repeating_samples_of_the_same_items_teaches_nothing(values: list[float], times: int):
    assert clustered_interval([[value] * times for value in values]) == pytest.approx(
        mean_interval(values), abs=1e-6, rel=1e-6
    )


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=2, max_size=10))
def test_with_equally_many_samples_the_items_are_the_observations(items: list[list[float]]):
    assert clustered_interval(items) == pytest.approx(mean_interval([fmean(item) for item in items]), abs=1e-9)


def test_items_without_samples_do_not_count():
    assert clustered_interval([[0.0, 1.0], [], [1.0]]) == clustered_interval([[0.0, 1.0], [1.0]])


def test_pairing_cancels_what_both_share():
    a = [0.0, 10.0, 20.0, 30.0]
    low, high = paired_interval([value + 1 for value in a], a)
    assert (low, high) == (1.0, 1.0)
    with pytest.raises(ValueError):
        paired_interval([1.0], [1.0, 2.0])


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_draws_that_hold_a_pass(case: tuple[int, int, int]):
    n, c, k = case
    draws = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_needs_k_samples():
    with pytest.raises(ValueError, match="pass@5"):
        pass_at_k(4, 1, 5)
    with pytest.raises(ValueError):
        wilson(5, 4)
