"""Star bands: where one star ends and the next begins. Pure.

The published stars are five equal-width bands between the best and the worst figure of a cohort, which this formula
reproduces for every published row::

    stars = 5 - clamp(ceil((E - best) / ((worst - best) / 5)) - 1, 0, 4)

      E      the figure to rate, Wh per 1,000 queries; less is better
      best   the lowest figure of the cohort
      worst  the highest figure of the cohort

The prose of the method also speaks of "the highest 20 % of models"; stars by rank reproduce fewer than half of the
published rows. Bands are closed on the right: a figure that lies on an edge gets the better star. The published data
cannot tell that from the opposite choice (no figure lies on an edge); it is what `pandas.cut` does by default.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

BEST_STARS = 5
WORST_STARS = 1
METHOD_RANGE = "range"
"""The name of this method in options, tables and files."""

_EDGE_SLACK = 1e-9
"""Share of a band below which a figure counts as lying on the edge: decimal figures such as 0.1 + 2 x 0.2 miss an edge
that they lie on by the rounding of binary floats. The nearest published figure is 4.5e-4 of a band from an edge."""
_ROUNDING_STEPS = 8
"""Roundings of the largest figure that an edge or a figure can have gone through."""
_SAME = 1e-12
"""Relative difference below which two figures are the same figure."""


class NoBands(StrEnum):
    """Why a cohort has no bands; the text is shown to people."""

    EMPTY = "no model with a figure"
    ALONE = "the only model of its cohort: a star compares at least two"
    EQUAL = "all models of the cohort have the same figure: there is no best and no worst"


class Side(StrEnum):
    """On which side of a frozen range a figure lies."""

    BELOW = "below"
    ABOVE = "above"


@dataclass(frozen=True, slots=True)
class Bands:
    """Five bands by their six edges, ascending, Wh per 1,000 queries; `inner` are the four between best and worst."""

    best: float
    inner: tuple[float, float, float, float]
    worst: float

    @property
    def edges(self) -> tuple[float, ...]:
        """Best, the edges 5/4, 4/3, 3/2, 2/1, worst."""
        return (self.best, *self.inner, self.worst)

    def stars(self, value: float) -> int:
        """1 to 5; never more for a higher `value`. Outside the range it is clamped: see `side`."""
        slack = self._slack()
        return BEST_STARS - sum(value > edge + slack for edge in self.inner)

    def stars_within(self, value: float, u: float) -> tuple[int, int]:
        """The lowest and highest star within `value` ± `u` (u ≥ 0, same unit)."""
        return self.stars(value + u), self.stars(value - u)

    def side(self, value: float) -> Side | None:
        """The side on which `value` lies outside the range; None inside it, where the cohort's own figures are."""
        slack = self._slack()
        if value < self.best - slack:
            return Side.BELOW
        return Side.ABOVE if value > self.worst + slack else None

    def _slack(self) -> float:
        band = (self.worst - self.best) / 5
        return _EDGE_SLACK * band + _ROUNDING_STEPS * sys.float_info.epsilon * max(abs(self.best), abs(self.worst))


def equal_width(values: Iterable[float]) -> Bands | NoBands:
    """The five equal-width bands of a cohort's figures (finite, any order), or why there are none."""
    figures = sorted(values)
    if len(figures) < 2:
        return NoBands.ALONE if figures else NoBands.EMPTY
    best, worst = figures[0], figures[-1]
    if worst - best <= _SAME * max(abs(best), abs(worst)):
        return NoBands.EQUAL
    first, second, third, fourth = (best + k * ((worst - best) / 5) for k in (1, 2, 3, 4))
    return Bands(best, (first, second, third, fourth), worst)
