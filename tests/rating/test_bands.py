"""Equal-width bands: the formula, its edges, and what holds for any cohort."""

import math
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from energyd.rating.bands import Bands, NoBands, Side, equal_width

_QUICK = settings(max_examples=200, deadline=None, database=None, derandomize=True)
# Decimal figures as tables hold them: these lie on edges often, which random floats never do.
_FIGURES = st.lists(st.integers(0, 3_000_000).map(lambda k: k / 1000), min_size=2, max_size=40)


def _exact_stars(value: float, best: float, worst: float) -> int:
    """The formula in rational numbers, from the decimals that people wrote."""
    figure, low, high = (Fraction(Decimal(repr(x))) for x in (value, best, worst))
    return 5 - min(max(math.ceil((figure - low) / ((high - low) / 5)) - 1, 0), 4)


def _bands(figures: list[float]) -> Bands:
    found = equal_width(figures)
    assert isinstance(found, Bands)
    return found


@pytest.mark.parametrize(
    ("value", "stars"),
    # best 0, worst 10: a band is 2 wide
    [(0.0, 5), (2.0, 5), (2.001, 4), (4.0, 4), (4.001, 3), (6.0, 3), (6.001, 2), (8.0, 2), (8.001, 1), (10.0, 1)],
)
def test_an_edge_gets_the_better_star(value: float, stars: int) -> None:
    """A figure on an edge has the better star, one just above it the worse."""
    assert _bands([0.0, 10.0]).stars(value) == stars


def test_edges_survive_binary_floats() -> None:
    """0.1 + k x 0.2 lies on an edge of 0.1 to 1.1 although no binary float does exactly."""
    bands = _bands([0.1, 1.1])
    assert [bands.stars(v) for v in (0.1, 0.3, 0.5, 0.7, 0.9, 1.1)] == [5, 5, 4, 3, 2, 1]


@_QUICK
@given(_FIGURES)
def test_bands_agree_with_the_formula_in_rational_numbers(figures: list[float]) -> None:
    """Every star equals the published formula evaluated without rounding."""
    found = equal_width(figures)
    if isinstance(found, NoBands):
        assert min(figures) == max(figures)
        return
    best, worst = min(figures), max(figures)
    assert [found.stars(f) for f in figures] == [_exact_stars(f, best, worst) for f in figures]


@_QUICK
@given(_FIGURES)
def test_less_energy_never_gets_fewer_stars(figures: list[float]) -> None:
    """Stars fall monotonically with energy; equal figures have equal stars."""
    found = equal_width(figures)
    if isinstance(found, Bands):
        stars = [found.stars(f) for f in sorted(figures)]
        assert stars == sorted(stars, reverse=True)


@_QUICK
@given(st.lists(st.floats(0, 1e300), min_size=2, max_size=20))
def test_the_best_has_five_stars_and_the_worst_one(figures: list[float]) -> None:
    """Whatever floats a cohort holds, its best gets 5 and its worst 1, if it has bands at all."""
    found = equal_width(figures)
    if isinstance(found, Bands):
        assert (found.stars(min(figures)), found.stars(max(figures))) == (5, 1)
        assert found.side(min(figures)) is None
        assert found.side(max(figures)) is None


@_QUICK
@given(_FIGURES, st.floats(1e-6, 1e6))
def test_the_unit_does_not_matter(figures: list[float], scale: float) -> None:
    """Figures in another unit (a factor) get the same stars."""
    there, scaled = equal_width(figures), equal_width([f * scale for f in figures])
    if isinstance(there, Bands):
        assert isinstance(scaled, Bands)
        assert [scaled.stars(f * scale) for f in figures] == [there.stars(f) for f in figures]
    else:
        assert scaled is there


@pytest.mark.parametrize(
    ("figures", "why"),
    [
        ([], NoBands.EMPTY),
        ([4.2], NoBands.ALONE),
        ([4.2, 4.2, 4.2], NoBands.EQUAL),
        ([0.0, 0.0], NoBands.EQUAL),
        ([0.3, 0.1 + 0.2], NoBands.EQUAL),
    ],
)
def test_no_bands_where_nothing_differs(figures: list[float], why: NoBands) -> None:
    """A cohort of none, one or equal figures (up to binary rounding) has no bands, and says which."""
    assert equal_width(figures) is why


def test_a_figure_outside_is_clamped_and_said_so() -> None:
    """Beyond a frozen range the star stays 5 or 1, and the side is told."""
    bands = _bands([10.0, 20.0])
    assert (bands.stars(9.0), bands.side(9.0)) == (5, Side.BELOW)
    assert (bands.stars(21.0), bands.side(21.0)) == (1, Side.ABOVE)
    assert (bands.stars(15.0), bands.side(15.0)) == (3, None)


def test_the_star_within_the_uncertainty() -> None:
    """A figure near an edge may be one star more or less within its uncertainty."""
    bands = _bands([0.0, 10.0])
    assert bands.stars_within(2.1, 0.2) == (4, 5)
    assert bands.stars_within(3.0, 0.2) == (4, 4)
