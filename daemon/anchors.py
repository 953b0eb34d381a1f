"""Anchors in time: at which instant a reading of the energy counter was true. Pure.

The counter of a GPU changes in steps (100 ms on an H200), so a reading holds the value of the last step before it: read
at 700 W, half a step of doubt is 35 J. The steps lie on a regular grid; its phase is what makes the counter's
differences agree best with the power samples, and a load that comes and goes shows it within a few milliseconds. Two
hypotheses are tried and the better one is kept:

`grid`      readings fall anywhere on the grid: each is placed at the last step before it
`locked`    readings come at one place of the grid (a poll each second; a poll for each new value): all are moved back by
            one offset, then to the nearest step. Without it a reading that straddles a step could be placed a step wrong.

Where the load never changes nothing can be learned: anchors then stand half a step back, ± step/√12.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from .records import Counter
from .units import seconds

Floats = NDArray[np.float64]

_TRIES: Final = 100
"""Phases tried over one step: 1 ms apart at 100 ms."""
_OUTLIER_MJ: Final = 5_000.0
"""Disagreements beyond this count as this: one hole in the samples must not choose the phase of all anchors."""
_FEWEST: Final = 8
_LEAST_U_S: Final = 0.002
"""What steps scatter by on an H200, s."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Anchors at their steps: `at_s` (s after the origin), `counter_mj`, and `u_s`, one standard deviation of `at_s`."""

    at_s: Floats
    counter_mj: Floats
    u_s: float


def place(counters: Sequence[Counter], origin_ns: int, step_ns: int, stamp_s: Floats, power_mw: Floats) -> Placed:
    """The readings placed at their steps; times in s after `origin_ns`.

    `stamp_s` and `power_mw` are the power samples near them, ascending; without enough of them, or of readings, or of
    change in the load, nothing is learned and `u_s` is step/√12.
    """
    step_s = seconds(step_ns)
    mid_s = np.array([seconds((c.before_ns + c.after_ns) // 2 - origin_ns) for c in counters])
    counter_mj = np.array([c.counter_mj for c in counters], dtype=np.float64)
    unlearned = Placed(mid_s - step_s / 2, counter_mj, step_s / math.sqrt(12))
    if len(stamp_s) < 2:
        return unlearned
    seen = (mid_s - step_s > stamp_s[0]) & (mid_s < stamp_s[-1])
    if int(seen.sum()) < _FEWEST:
        return unlearned
    tries_s = np.arange(_TRIES) * step_s / _TRIES
    told_mj = np.diff(counter_mj[seen])

    def costs(at_s: Floats) -> Floats:
        """Mean square disagreement of counter and samples for each row of placements, mJ²; falls of the counter aside."""
        off_mj = told_mj - np.diff(integral_mj(stamp_s, power_mw, at_s), axis=1)
        return np.asarray(np.minimum(off_mj[:, told_mj >= 0] ** 2, _OUTLIER_MJ**2).mean(axis=1))

    on_grid = np.floor((mid_s - tries_s[:, None]) / step_s) * step_s + tries_s[:, None]
    moved = mid_s - tries_s[:, None]
    grid_costs, moved_costs = costs(on_grid[:, seen]), costs(moved[:, seen])
    locked = float(moved_costs.min()) <= float(grid_costs.min())
    u_s = _spread_s(moved_costs if locked else grid_costs, step_s, int((told_mj >= 0).sum()))
    if u_s > unlearned.u_s / 2:  # hardly better than knowing nothing: a spurious phase would be worse
        return unlearned
    if not locked:
        return Placed(on_grid[int(grid_costs.argmin())], counter_mj, u_s)
    at_s = moved[int(moved_costs.argmin())]
    snapped = _snapped(at_s, step_s)
    best = snapped if float(costs(snapped[None, seen])[0]) <= float(moved_costs.min()) else at_s
    return Placed(best, counter_mj, u_s)


def integral_mj(stamp_s: Floats, power_mw: Floats, at_s: Floats) -> Floats:
    """Energy from the first sample until `at_s` (any shape), mJ: straight lines between the samples."""
    steps_s = np.diff(stamp_s)
    until_mj = np.concatenate([[0.0], np.cumsum(steps_s * (power_mw[1:] + power_mw[:-1]) / 2)])
    left = np.clip(np.searchsorted(stamp_s, at_s, side="right") - 1, 0, len(stamp_s) - 2)
    past_s = at_s - stamp_s[left]
    slope = (power_mw[left + 1] - power_mw[left]) / steps_s[left]
    return np.asarray(until_mj[left] + power_mw[left] * past_s + slope * past_s**2 / 2)


def _snapped(at_s: Floats, step_s: float) -> Floats:
    """`at_s` moved to the nearest point of the grid that suits them best."""
    turns = np.exp(2j * np.pi * at_s / step_s)
    phase_s = float(np.angle(turns.mean())) / (2 * math.pi) * step_s
    return np.asarray(np.round((at_s - phase_s) / step_s) * step_s + phase_s)


def _spread_s(costs: Floats, step_s: float, count: int) -> float:
    """One standard deviation of the phase: how far the tries that do about as well lie from the best, s."""
    best = int(costs.argmin())
    away = (np.arange(len(costs)) - best + len(costs) // 2) % len(costs) - len(costs) // 2
    weights = np.exp(-count / 2 * (costs / max(float(costs[best]), 1.0) - 1))
    return max(_LEAST_U_S, math.sqrt(float((weights * away**2).sum() / weights.sum())) * step_s / len(costs))
