"""The idle floor: what a GPU draws while nobody asks it anything, as a recent level, not a constant.

An H200 idles at 81 W deep, 122 W after work, 138 W with two servers loaded, within minutes. The floor is the 10 %
quantile of recent quiet stretches (never the median: hidden work must not become "idle"), capped at 1.2 times the lowest
floor since the set of compute processes last changed.
"""

from bisect import insort
from collections import deque
from collections.abc import Sequence

from energyd.daemon.records import Service, Slice, Window
from energyd.daemon.units import NS_PER_MS, NS_PER_S, mean_power_mw

QUIET_DISTANCE_NS = 300 * NS_PER_MS
"""A slice this far from any query is quiet: the sensor's tail (about 50 ms) and the clocks' slack are over by then."""
_SHORTEST_QUIET_NS = 200 * NS_PER_MS
_MEMORY_NS = 3600 * NS_PER_S
_QUANTILE = 0.1
_CAP = 1.2
_SPREAD_FLOOR_MW = 2_000
"""Least spread of quiet power assumed, mW: what single quiet seconds of an H200 scatter by."""


class IdleFloor:
    """Tracks the idle floor of one GPU.

    `prior_mw` (configured, or None) stands until the first quiet stretch was seen.
    """

    def __init__(self, prior_mw: int | None = None) -> None:
        self._prior_mw = prior_mw
        self._recent: deque[tuple[int, int]] = deque()
        self._sorted: list[int] = []
        self._lowest_mw: int | None = None

    def processes_changed(self) -> None:
        """Another server was loaded or left: levels seen so far say nothing about the new one."""
        self._recent.clear()
        if self._sorted:
            self._prior_mw = self.mw
        self._sorted.clear()
        self._lowest_mw = None

    def see(self, window: Window, services: Sequence[Service]) -> None:
        """Learn from the quiet part of a metered window; `services`: all that came within 0.3 s of it."""
        quiet = quiet_slices(window, services)
        duration_ns = sum(s.end_ns - s.start_ns for s in quiet)
        if duration_ns < _SHORTEST_QUIET_NS:
            return
        power_mw = mean_power_mw(sum(s.energy_uj for s in quiet), duration_ns)
        self._recent.append((window.end_ns, power_mw))
        insort(self._sorted, power_mw)
        while self._recent and self._recent[0][0] < window.end_ns - _MEMORY_NS:
            self._sorted.remove(self._recent.popleft()[1])
        quantile_mw = self._quantile(_QUANTILE)
        if quantile_mw is not None:
            self._lowest_mw = quantile_mw if self._lowest_mw is None else min(self._lowest_mw, quantile_mw)

    def _quantile(self, q: float) -> int | None:
        return self._sorted[int(q * (len(self._sorted) - 1))] if self._sorted else None

    @property
    def mw(self) -> int | None:
        """The floor, mW; None if nothing quiet was seen and nothing is configured."""
        quantile_mw = self._quantile(_QUANTILE)
        if quantile_mw is None or self._lowest_mw is None:
            return self._prior_mw
        return min(quantile_mw, int(self._lowest_mw * _CAP))

    @property
    def sd_mw(self) -> int:
        """Scatter of quiet power (one standard deviation, from the middle half), at least 2 W."""
        low, high = self._quantile(0.25), self._quantile(0.75)
        return max(_SPREAD_FLOOR_MW, round((high - low) / 1.35)) if low is not None and high is not None else 2_000


def quiet_slices(window: Window, services: Sequence[Service]) -> tuple[Slice, ...]:
    """Slices of the window that lie at least 0.3 s from every service."""
    near = [(s.start_ns - QUIET_DISTANCE_NS, s.end_ns + QUIET_DISTANCE_NS) for s in services]
    return tuple(c for c in window.slices if all(c.end_ns <= a or c.start_ns >= b for a, b in near))
