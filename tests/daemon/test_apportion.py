"""Laws of dividing whole microjoules."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from energyd.daemon.apportion import apportion, scaled

LAW = settings(deadline=None, derandomize=True)
"""No timing decides, and the same code passes or fails every time."""
TOTALS = st.integers(0, 2**62)
WEIGHTS = st.lists(st.integers(0, 2**40), min_size=1, max_size=60).filter(any)
ANY_FLOAT = st.floats(allow_nan=True, allow_infinity=True)


def keys_of(weights: list[int]) -> list[str]:
    """One id a weight, not in order of place."""
    return [f"{(7 * i + 3) % 101:03d}-{i}" for i in range(len(weights))]


@LAW
@given(total=TOTALS, weights=WEIGHTS)
def test_parts_sum_to_the_total(total: int, weights: list[int]) -> None:
    """Conservation: nothing left, nothing made, no part below 0, whatever the totals (to 2^62 µJ)."""
    parts = apportion(total, weights)
    assert sum(parts) == total
    assert min(parts) >= 0


@LAW
@given(total=TOTALS, weights=WEIGHTS)
def test_each_part_is_within_one_microjoule_of_its_exact_share(total: int, weights: list[int]) -> None:
    """Largest remainder: each part is its exact share rounded down or up, and a weight of 0 gets nothing."""
    whole = sum(weights)
    for part, weight in zip(apportion(total, weights), weights, strict=True):
        assert abs(part - Fraction(total * weight, whole)) < 1
        assert weight or not part


@LAW
@given(total=TOTALS, weights=WEIGHTS, data=st.data())
def test_order_does_not_matter_with_keys(total: int, weights: list[int], data: st.DataObject) -> None:
    """The same queries in another order get the same parts, ties included."""
    keys = keys_of(weights)
    order = data.draw(st.permutations(range(len(weights))))
    straight = dict(zip(keys, apportion(total, weights, keys), strict=True))
    shuffled = apportion(total, [weights[i] for i in order], [keys[i] for i in order])
    assert [straight[keys[i]] for i in order] == shuffled


@LAW
@given(total=TOTALS, weights=WEIGHTS, factor=st.integers(1, 2**20))
def test_scale_does_not_matter(total: int, weights: list[int], factor: int) -> None:
    """All weights times a constant: the same split to the microjoule."""
    assert apportion(total, weights) == apportion(total, [w * factor for w in weights])


@LAW
@given(total=TOTALS, weights=WEIGHTS)
def test_equal_weights_differ_by_one_at_most(total: int, weights: list[int]) -> None:
    """Symmetry: parts of equal weights differ by at most 1 µJ, and a larger weight never gets less than a smaller."""
    ranked = sorted(zip(weights, apportion(total, weights), strict=True))
    for (w1, p1), (w2, p2) in pairwise(ranked):
        assert p2 >= p1 or w1 == w2
        assert w1 != w2 or p2 - p1 <= 1


def test_ties_go_to_the_smaller_key() -> None:
    """2 µJ over three equals: the two smallest ids get one each; without ids the first two places do."""
    # place  0    1    2
    # key    c    a    b
    # part   0    1    1
    assert apportion(2, [5, 5, 5], ["c", "a", "b"]) == [0, 1, 1]
    assert apportion(2, [5, 5, 5]) == [1, 1, 0]


def test_a_worked_example() -> None:
    """10 µJ over 1:2:4 are 1.43, 2.86, 5.71: 1, 2, 5 and one more to each of the remainders .86 and .71."""
    assert apportion(10, [1, 2, 4]) == [1, 3, 6]


def test_nothing_to_divide_over_is_refused() -> None:
    """Energy without a weight is the caller's to book: a ValueError, not a silent loss; 0 µJ over nobody is fine."""
    with pytest.raises(ValueError, match="7 µJ"):
        apportion(7, [0, 0])
    with pytest.raises(ValueError, match="1 µJ"):
        apportion(1, [])
    assert apportion(0, [0, 0]) == [0, 0]
    assert apportion(0, []) == []


@LAW
@given(st.lists(ANY_FLOAT, max_size=40))
def test_scaled_weights_are_whole_bounded_and_count_what_is_broken(weights: list[float]) -> None:
    """The largest becomes 2^40, any weight > 0 at least 1, all else 0; NaN, infinite and negative ones are counted."""
    integers, broken = scaled(weights)
    good = [math.isfinite(w) and w > 0 for w in weights]
    assert [i > 0 for i in integers] == good
    assert max(integers, default=0) == (2**40 if any(good) else 0)
    assert broken == sum(1 for w in weights if not (math.isfinite(w) and w >= 0))


def test_extreme_weights_keep_their_neighbours() -> None:
    """1e-300 beside 1e300, a NaN and an infinity: the sane ones share, the smallest still counts, two are broken."""
    assert scaled([1e300, 1e-300, math.nan, math.inf, 5e299]) == ([2**40, 1, 0, 0, 2**39], 2)
    assert scaled([5e-324]) == ([2**40], 0)
    assert scaled([]) == ([], 0)


@LAW
@given(weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=30), power=st.integers(-30, 30), total=TOTALS)
def test_scaled_forgets_the_unit_of_the_weights(weights: list[float], power: int, total: int) -> None:
    """Weights in other units (× 2^k, exact in floats as long as none is subnormal) divide alike."""
    weights = [w if w > 1e-290 else 0.0 for w in weights]
    one, _ = scaled(weights)
    other, _ = scaled([math.ldexp(w, power) for w in weights])
    assert one == other
    if any(one):
        assert apportion(total, one) == apportion(total, other)


@LAW
@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=30))
def test_scaling_keeps_twelve_digits(weights: list[float]) -> None:
    """A weight keeps its ratio to the largest within half of 2^-40 (or it is the least weight there is: 1)."""
    integers, _ = scaled(weights)
    top = max(weights)
    for w, i in zip(weights, integers, strict=True):
        assert abs(Fraction(i, 2**40) - Fraction(w) / Fraction(top)) <= Fraction(1, 2**40)
