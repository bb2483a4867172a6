"""What crosses between a program and its tests: data as it is, and no behaviour."""

import contextlib
import json
from collections import Counter, OrderedDict, deque
from datetime import date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.grading.wire import WireError, pack, unpack

LEAVES = (
    st.none() | st.booleans() | st.integers() | st.integers(-(10**40), 10**40) | st.floats(allow_nan=False) | st.text()
    | st.binary() | st.fractions() | st.dates() | st.timedeltas() | st.complex_numbers(allow_nan=False)
)  # fmt: skip
HASHABLE = st.recursive(LEAVES, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=5)
DATA = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.sets(HASHABLE, max_size=3)
        | st.dictionaries(HASHABLE, inner, max_size=3)
    ),
    max_leaves=12,
)


def nothing(value: Any) -> Any:
    raise AssertionError(f"{value!r} is no data")


def crossed(value: Any) -> Any:
    return unpack(json.loads(json.dumps(pack(value, nothing))), nothing)


@given(DATA)
@settings(max_examples=150, deadline=None)
def test_data_crosses_as_it_is(value: Any):
    again = crossed(value)
    assert again == value and type(again) is type(value)


@pytest.mark.parametrize(
    "value",
    [
        Counter("aab"), OrderedDict(a=1), deque([1, 2]), Decimal("1.50"), Fraction(1, 3), datetime(2020, 1, 2, 3, 4, 5),
        date(2020, 1, 2), timedelta(days=-1, microseconds=3), range(1, 9, 2), "\ud800", b"\xff", bytearray(b"ab"),
        10**4000, -(2**53), 1e400, {(1, 2): {3}, None: [True]},
    ],
)  # fmt: skip
def test_other_data_crosses_too(value: Any):
    again = crossed(value)
    assert again == value and type(again) is type(value)


def test_nothing_that_behaves_crosses():
    class Liar(int):
        def __eq__(self, other: object) -> bool:
            return True

        def __int__(self) -> int:
            return 7

        __index__ = __hash__ = __int__

    class Text(str):
        def __str__(self) -> str:
            return "other"

    class Items(list):
        def __iter__(self) -> Any:
            return iter("no")

    assert (type(crossed(Liar(3))), crossed(Liar(3))) == (int, 3)
    assert (type(crossed(Text("a"))), crossed(Text("a"))) == (str, "a")
    assert (type(crossed(Items([1]))), crossed(Items([1]))) == (list, [1])


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=8), lambda i: st.lists(i, max_size=4)))
def test_what_is_no_value_is_refused(tree: Any):
    def resolve(tree: list[Any]) -> Any:
        raise WireError

    with contextlib.suppress(WireError):
        unpack(tree, resolve)
