"""The energy of any window [t0, t1], with its uncertainty. Pure: readings in, a figure out.

What a power sample is, measured on an H200 by bursts of known work: the GPU's power behind a low pass of 13 ms, 4 ms
late, *read at the stamp*. (The mean over 20 ms that the rest of energyd assumes is the same thing over a second, but a
24 ms burst read that way can be wrong by 30 %.) A change of power is therefore still arriving 40 ms after it happened, and
the energy of a short window lies mostly in samples after its end.

So the power is *solved for* and not read off: cells of about 10 ms, cut at the window's edges, such that

- the samples come out as they were seen, each within its noise (level, and the jitter of its stamp times the slope);
- the counter's differences come out, each within what the placing of its anchors leaves open (see `anchors`);
- power changes seldom and then much: the variance of each change is learned (sparse Bayesian learning, a few rounds).

The window's energy is the sum of its cells, and the solution's covariance is its error bar. Nothing needs to be told
whether other work overlaps: an isolated burst is pinned by the counter, since nothing else in the interval could have
drawn the energy; in a steady load the samples decide. What the samples cannot show stays unknown: work that alternates as
fast as they come (10 ms on, 10 ms off) looks steady, and a window on one of its halves errs by half. A long window is
solved at its two ends only; the counter, which cannot drift, is exact in between.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from .anchors import Floats, Placed, integral_mj, place
from .errors import UsageError
from .records import Counter, Samples
from .units import MW_PER_W, NS_PER_MS, NS_PER_US, UJ_PER_MJ, ns_from_s, seconds

GAIN_REL_U: Final = 0.05
"""What NVIDIA states for the sensor: ±5 %, the same in every reading of one GPU. Absolute only."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How a GPU's sensor follows its power; defaults measured on an H200 (driver 580).

    A sample is the power `delay_ns` earlier behind a low pass of time constant `lag_ns`; the counter changes every
    `step_ns`. `edge_ns`: one standard deviation of when work begins or ends against the times that the caller states;
    set so that two standard deviations cover repeats of the same work, which differ by the GPU's clock as well (±2.6 %
    at 118 ms, seen by the counter alone too).
    """

    delay_ns: int = 4 * NS_PER_MS
    lag_ns: int = 13_000 * NS_PER_US
    step_ns: int = 100 * NS_PER_MS
    edge_ns: int = 1_800 * NS_PER_US


_LEARN_S: Final = 120.0
"""Anchors this far from the window teach the phase of the counter's steps: the grid drifts by 10 ppm."""
_REACH_S: Final = 2.0
"""Anchors further than this from an edge of the window do not help; solving for what lies between would cost."""
_LONG_S: Final = 2.5
_END_S: Final = 0.5
"""A window longer than `_LONG_S` is solved at its ends, up to the first anchor at least `_END_S` inside."""
_PAD_S: Final = 0.06
_CELL_S: Final = 0.010
_TAIL_LAGS: Final = 4.5
"""After so many time constants 1 % of a change is still to come: then the sensor is quiet again."""
_BEFORE_S: Final = 0.008
"""Stamps of caller and driver agree to a few ms: an isolated burst may seem to begin before its window."""
_ROUNDS: Final = 4
_FIRST_STEP_MW: Final = 200_000.0
_EDGE_STEP_MW: Final = 1_200_000.0
_LEAST_STEP_MW: Final = 3_000.0
_NOISE_MW: Final = 1_000.0
_NOISE_REL: Final = 0.003
_STAMP_S: Final = 0.0008
_ANCHOR_SHAPE_S: Final = 0.015
"""Doubt about an anchor among changing power: how the counter's own filter weighs the change is not known."""
_FLOOR_U_MW: Final = 1_000.0
_FLOOR_RANGES_S: Final = (2.0, 5.0, 15.0, 60.0)
_DRIFT_REL: Final = 0.01
"""Samples against counter over a second or more, where no counter interval pins them (0.03 % over minutes)."""


@dataclass(frozen=True, slots=True)
class Recording:
    """Readings of one GPU in s after `origin_ns`; made by `recording`."""

    counters: Sequence[Counter]
    origin_ns: int
    counter_s: Floats
    stamp_s: Floats
    power_mw: Floats
    shape: Shape

    @property
    def start_ns(self) -> int:
        """The first instant that is covered, unix ns."""
        return self.origin_ns + ns_from_s(min([float(self.counter_s[0]), *self.stamp_s[:1]]))

    @property
    def end_ns(self) -> int:
        """The last instant that is covered, unix ns."""
        return self.origin_ns + ns_from_s(max([float(self.counter_s[-1]), *self.stamp_s[-1:]]))


def recording(counters: Sequence[Counter], samples: Samples, shape: Shape | None = None) -> Recording:
    """Readings of one GPU, ready for any number of windows.

    `counters` ascend in time, at least two; `samples` ascend, and may be empty. Raises UsageError without two counters.
    """
    if len(counters) < 2:
        raise UsageError("a window's energy needs two readings of the counter; record for longer")
    origin_ns = counters[0].before_ns
    return Recording(
        counters=counters,
        origin_ns=origin_ns,
        counter_s=np.array([seconds((c.before_ns + c.after_ns) // 2 - origin_ns) for c in counters]),
        stamp_s=np.array([seconds(t - origin_ns) for t in samples.end_ns]),
        power_mw=np.array(samples.power_mw, dtype=np.float64),
        shape=shape or Shape(),
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """Energy of one end of a window, or of all of it: mJ above nothing, its variance, and whether its edges were quiet."""

    energy_mj: float
    var: float
    quiet: tuple[bool, bool]
    anchored: bool
    past_s: float
    """How much longer than the window the summed stretch is: the floor of that does not belong to it."""


@dataclass(frozen=True, slots=True)
class _Scene:
    """What all parts of one window share."""

    stamp_s: Floats
    power_mw: Floats
    placed: Placed
    floor_mw: float
    shape: Shape


@dataclass(frozen=True, slots=True)
class WindowEnergy:
    """What a window drew.

    `energy_uj`: floor × duration + `net_uj`. `net_uj`: what the work in the window drew above the idle floor, µJ; with
    quiet around it, what the sensor saw late is included; may be slightly negative for idle windows. `floor_mw`: the
    idle level near the window. `rel_u`: one standard deviation, relative to `energy_uj`, for comparing figures of one
    GPU: sample noise, stamp jitter and placing of anchors (the solution's covariance), the window's edges (1.8 ms each
    times the change of power there), the floor. `abs_uj`: one standard deviation in µJ with the sensor's gain (±5 %).
    `method`: `isolated` (quiet on both sides), `shape` (other work near), `samples` (no counter interval in reach),
    `counter` (no samples: straight lines between anchors).
    """

    energy_uj: int
    net_uj: int
    rel_u: float
    abs_uj: int
    method: str
    floor_mw: int


def window_energy(of: Recording, start_ns: int, end_ns: int) -> WindowEnergy:
    """The energy of [start_ns, end_ns] (unix ns); see `WindowEnergy` for the terms.

    Raises UsageError if the window is empty, not within the recording, or holds a restart of the counter.
    """
    if end_ns <= start_ns:
        raise UsageError(f"the window ends at {end_ns}, not after its start {start_ns}; give `start_ns end_ns`")
    if start_ns < of.start_ns or end_ns > of.end_ns:
        raise UsageError(
            f"the window {start_ns} {end_ns} is not within the recording, which covers {of.start_ns} to {of.end_ns}"
        )
    start_s, end_s = seconds(start_ns - of.origin_ns), seconds(end_ns - of.origin_ns)
    near = np.flatnonzero((of.counter_s > start_s - _LEARN_S) & (of.counter_s < end_s + _LEARN_S))
    first, last = (int(near[0]), int(near[-1]) + 1) if len(near) else (0, len(of.counters))
    seen = (of.stamp_s > start_s - _LEARN_S - 1) & (of.stamp_s < end_s + _LEARN_S + 1)
    stamp_s, power_mw = of.stamp_s[seen], of.power_mw[seen]
    placed = place(of.counters[first:last], of.origin_ns, of.shape.step_ns, stamp_s, power_mw)
    placed = _unbroken(placed, start_s, end_s)
    close = (stamp_s > start_s - _PAD_S) & (stamp_s < end_s + 3 * _PAD_S)
    if close.sum() < 3:
        return _from_counter(placed, start_s, end_s)
    scene = _Scene(stamp_s, power_mw, placed, _floor_mw(stamp_s, power_mw, start_s, end_s), of.shape)
    parts, middle_mj, middle_var = _parts(scene, start_s, end_s)
    duration_s = end_s - start_s
    total_mj = middle_mj + sum(p.energy_mj - scene.floor_mw * p.past_s for p in parts)
    net_mj = total_mj - scene.floor_mw * duration_s
    # A burst shorter than the sensor's lag arrives as one hump: where in it the work lay moves little of it out.
    edge_mj = max(0.0, net_mj) * math.sqrt(2) * seconds(of.shape.edge_ns) / (duration_s + seconds(of.shape.lag_ns))
    floor_mj = _FLOOR_U_MW * sum(p.past_s for p in parts)
    u_mj = math.sqrt(middle_var + sum(p.var for p in parts) + edge_mj**2 + floor_mj**2)
    method = "isolated" if parts[0].quiet[0] and parts[-1].quiet[1] else "shape"
    return _result(total_mj, net_mj, u_mj, method if any(p.anchored for p in parts) else "samples", scene.floor_mw)


def _unbroken(placed: Placed, start_s: float, end_s: float) -> Placed:
    """The anchors around the window between which the counter did not restart; refuses one that did so within it."""
    falls = np.flatnonzero(np.diff(placed.counter_mj) < 0)
    if np.any((placed.at_s[falls + 1] > start_s) & (placed.at_s[falls] < end_s)):
        raise UsageError(
            "the counter restarted within the window: its energy is not known; ask for the parts around it"
        )
    first = max((int(i) + 1 for i in falls if placed.at_s[i + 1] <= start_s), default=0)
    last = min((int(i) + 1 for i in falls if placed.at_s[i] >= end_s), default=len(placed.at_s))
    return Placed(placed.at_s[first:last], placed.counter_mj[first:last], placed.u_s)


def _result(total_mj: float, net_mj: float, u_mj: float, method: str, floor_mw: float) -> WindowEnergy:
    total_mj = max(0.0, total_mj)
    return WindowEnergy(
        energy_uj=round(total_mj * UJ_PER_MJ),
        net_uj=round(net_mj * UJ_PER_MJ),
        rel_u=u_mj / total_mj if total_mj else 1.0,
        abs_uj=round(math.hypot(u_mj, GAIN_REL_U * total_mj) * UJ_PER_MJ),
        method=method,
        floor_mw=round(floor_mw),
    )


def _parts(scene: _Scene, start_s: float, end_s: float) -> tuple[list[_Part], float, float]:
    """The parts to solve, and the energy (mJ) between them with its variance: 0 for a short window."""
    if end_s - start_s <= _LONG_S:
        return [_solved(scene, start_s, end_s, (True, True))], 0.0, 0.0
    at_s, counter_mj = scene.placed.at_s, scene.placed.counter_mj
    inside = np.flatnonzero((at_s >= start_s + _END_S) & (at_s <= end_s - _END_S))
    low_s, high_s = (float(at_s[inside[0]]), float(at_s[inside[-1]])) if len(inside) else (end_s, end_s)
    first_s = low_s if low_s <= start_s + _REACH_S else start_s + _END_S
    last_s = high_s if len(inside) and high_s >= end_s - _REACH_S else end_s - _END_S
    low_s, high_s = min(low_s, last_s), min(high_s, last_s)
    counted_mj = float(counter_mj[inside[-1]] - counter_mj[inside[0]]) if len(inside) else 0.0
    ends_mj = integral_mj(scene.stamp_s, scene.power_mw, np.array([first_s, low_s, high_s, last_s]))
    sampled_mj = float(ends_mj[1] - ends_mj[0] + ends_mj[3] - ends_mj[2])  # where the counter was not read
    middle_mj = counted_mj + sampled_mj
    powers_mw = np.interp([first_s, last_s], scene.stamp_s, scene.power_mw)
    var = float(((powers_mw * scene.placed.u_s) ** 2).sum()) + (_DRIFT_REL * sampled_mj) ** 2
    parts = [_solved(scene, start_s, first_s, (True, False)), _solved(scene, last_s, end_s, (False, True))]
    return parts, middle_mj, var


def _floor_mw(stamp_s: Floats, power_mw: Floats, start_s: float, end_s: float) -> float:
    """The idle level near the window, mW.

    The lowest tenth of the samples within 2 s, or further away if that is a load (1.6 times what a minute shows: idle
    levels of one GPU differ by 1.7); then the mean of the sixty nearest samples of about that level.
    """
    power = power_mw
    away_s = np.maximum(np.maximum(start_s - stamp_s, stamp_s - end_s), 0.0)
    wide = power[away_s < _FLOOR_RANGES_S[-1]]
    lowest_mw = float(np.quantile(wide if len(wide) else power, 0.1))
    level_mw = lowest_mw
    for reach_s in _FLOOR_RANGES_S:
        local = power[away_s < reach_s]
        if len(local) >= 20 and (found := float(np.quantile(local, 0.1))) <= 1.6 * lowest_mw:
            level_mw = found
            break
    quiet = np.flatnonzero((power <= 1.08 * level_mw) & (power >= 0.8 * level_mw))
    nearest = np.minimum(np.abs(stamp_s[quiet] - start_s), np.abs(stamp_s[quiet] - end_s)).argsort(kind="stable")[:60]
    return float(power[quiet[nearest]].mean()) if len(quiet) else level_mw


def _is_quiet(scene: _Scene, from_s: float, until_s: float) -> bool:
    """Samples were seen in this stretch and none of them is above the floor."""
    power_mw = scene.power_mw[(scene.stamp_s > from_s) & (scene.stamp_s <= until_s)]
    return len(power_mw) > 0 and float(power_mw.max()) < scene.floor_mw + max(4.0 * MW_PER_W, 0.05 * scene.floor_mw)


def _solved(scene: _Scene, start_s: float, end_s: float, is_edge: tuple[bool, bool]) -> _Part:
    """Solve for the power around [start_s, end_s] and sum it; an end that is no edge of the window lies on an anchor."""
    delay_s, lag_s = seconds(scene.shape.delay_ns), seconds(scene.shape.lag_ns)
    tail_s = _TAIL_LAGS * lag_s
    first_s, last_s = start_s + delay_s * is_edge[0], end_s + delay_s * is_edge[1]
    quiet = (
        is_edge[0] and _is_quiet(scene, first_s - _PAD_S, first_s),
        is_edge[1] and _is_quiet(scene, last_s + tail_s, last_s + tail_s + _PAD_S),
    )
    sum_from_s = first_s - _BEFORE_S * quiet[0]
    sum_until_s = last_s + tail_s * quiet[1]
    at = _anchors_near(scene.placed.at_s, start_s, end_s, is_edge)
    anchor_s, anchor_mj = scene.placed.at_s[at], scene.placed.counter_mj[at]
    from_s = min([start_s - 0.2, *anchor_s[:1]]) - _PAD_S
    until_s = max([end_s + 0.2, *anchor_s[-1:]]) + _PAD_S
    seen = (scene.stamp_s > from_s) & (scene.stamp_s < until_s)
    stamp_s, power_mw = scene.stamp_s[seen], scene.power_mw[seen]
    cuts_s = _cuts(stamp_s, from_s, until_s, (sum_from_s, first_s, last_s, sum_until_s))
    begin_s, stop_s = cuts_s[:-1], cuts_s[1:]

    def filtered(at_s: Floats) -> Floats:
        """What the sensor says at `at_s` of each cell's power: one row an instant."""
        t = at_s[:, None]
        rows = np.exp((np.minimum(stop_s, t) - t) / lag_s) - np.exp((np.minimum(begin_s, t) - t) / lag_s)
        rows[:, 0] += np.exp((cuts_s[0] - at_s) / lag_s)
        return np.asarray(rows)

    def counted(at_s: Floats) -> Floats:
        """What the counter has gained at `at_s`, mJ: it adds up what the sensor says."""
        lengths = np.clip(np.minimum(stop_s, at_s[:, None]) - begin_s, 0.0, None)
        return np.asarray(lengths - lag_s * filtered(at_s))

    swing = np.maximum(np.abs(np.diff(power_mw, prepend=power_mw[:1])), np.abs(np.diff(power_mw, append=power_mw[-1:])))
    noise = np.sqrt(_NOISE_MW**2 + (_NOISE_REL * power_mw) ** 2 + (_STAMP_S * swing / 0.020) ** 2)
    rows, told = [filtered(stamp_s) / noise[:, None]], [power_mw / noise]
    if len(anchor_s) > 1:
        u_mj = _anchor_u(anchor_s, scene.placed.u_s, stamp_s, power_mw) + 1.0
        share = u_mj**-2 / (u_mj**-2).sum()  # where the counter began is nobody's energy: only differences count
        gains_s = counted(anchor_s)
        rows.append((gains_s - share @ gains_s) / u_mj[:, None])
        told.append((anchor_mj - share @ anchor_mj) / u_mj)
    edges = [
        int(np.abs(cuts_s[1:-1] - e).argmin()) for e, real in ((first_s, is_edge[0]), (last_s, is_edge[1])) if real
    ]
    solution, covariance = _sparse(np.vstack(rows), np.concatenate(told), edges)
    weights = np.clip(np.minimum(stop_s, sum_until_s) - np.maximum(begin_s, sum_from_s), 0.0, None)
    if not is_edge[0]:
        weights = weights + lag_s * filtered(np.array([sum_from_s]))[0]
    if not is_edge[1]:
        weights = weights - lag_s * filtered(np.array([sum_until_s]))[0]
    return _Part(
        energy_mj=float(weights @ solution),
        var=float(weights @ covariance @ weights),
        quiet=quiet,
        anchored=len(anchor_s) > 1,
        past_s=(sum_until_s - sum_from_s) - (last_s - first_s),
    )


def _anchors_near(at_s: Floats, start_s: float, end_s: float, is_edge: tuple[bool, bool]) -> slice:
    """The anchors that enclose [start_s, end_s] with room for the sensor's tail, as far as there are any in reach."""
    low = int(np.searchsorted(at_s, start_s - _PAD_S * is_edge[0], side="right")) - 1
    high = int(np.searchsorted(at_s, end_s + (0.14 if is_edge[1] else -1e-9)))
    low, high = max(low, 0), min(high, len(at_s) - 1)
    while low < high and at_s[low] < start_s - _REACH_S:
        low += 1
    while high > low and at_s[high] > end_s + _REACH_S:
        high -= 1
    return slice(low, high + 1)


def _cuts(stamp_s: Floats, from_s: float, until_s: float, edges_s: Sequence[float]) -> Floats:
    """Where the cells begin and end: the stamps, about every 10 ms between them, and the edges, at which none is tiny."""
    posts = np.unique(np.concatenate([[from_s, until_s], stamp_s]))
    counts = np.maximum(1, np.round(np.diff(posts) / _CELL_S)).astype(int)
    cuts = [np.linspace(a, b, n, endpoint=False) for a, b, n in zip(posts[:-1], posts[1:], counts, strict=True)]
    regular = np.concatenate([*cuts, [until_s]])
    for edge_s in edges_s:
        regular = regular[np.abs(regular - edge_s) > 0.0005]
    return np.unique(np.concatenate([regular, edges_s]))


def _anchor_u(anchor_s: Floats, u_s: float, stamp_s: Floats, power_mw: Floats) -> Floats:
    """One standard deviation of the counter at each anchor, mJ, from when its step was, given the power around it."""
    found = []
    for at_s in anchor_s:
        around = power_mw[np.abs(stamp_s - at_s) < 0.045]
        around = around if len(around) else power_mw
        found.append(math.hypot(float(around.max()) * u_s, float(np.ptp(around)) * _ANCHOR_SHAPE_S))
    return np.array(found)


def _sparse(rows: Floats, told: Floats, edges: Sequence[int]) -> tuple[Floats, Floats]:
    """Powers of the cells (mW) with their covariance: rows x power = told ± 1, and few changes between cells.

    The variance of each change is what the last round found it to be (expectation maximisation); a change at an edge of
    the window costs little, because work begins and ends there.
    """
    count = rows.shape[1]
    normal, right = rows.T @ rows, rows.T @ told
    variances = np.full(count - 1, _FIRST_STEP_MW**2)
    at = np.arange(count - 1)
    solution: Floats = np.zeros(count)
    covariance: Floats = np.zeros((count, count))
    for _ in range(_ROUNDS):
        variances[edges] = np.maximum(variances[edges], _EDGE_STEP_MW**2)
        precision = normal.copy()
        precision[at, at] += 1 / variances
        precision[at + 1, at + 1] += 1 / variances
        precision[at, at + 1] -= 1 / variances
        precision[at + 1, at] -= 1 / variances
        covariance = np.asarray(np.linalg.inv(precision), dtype=np.float64)
        solution = np.asarray(covariance @ right, dtype=np.float64)
        own = np.diag(covariance)
        change_var = own[1:] + own[:-1] - 2 * np.diag(covariance, 1)
        variances = np.maximum(np.diff(solution) ** 2 + change_var, _LEAST_STEP_MW**2)
    return solution, covariance


def _from_counter(placed: Placed, start_s: float, end_s: float) -> WindowEnergy:
    """Straight lines between anchors: all that is known without samples."""
    at_s, counter_mj = placed.at_s, placed.counter_mj
    powers_mw = np.diff(counter_mj) / np.maximum(np.diff(at_s), 1e-9)
    floor_mw = float(powers_mw[powers_mw >= 0].min(initial=float(powers_mw.max())))
    first_mj, last_mj = np.interp([start_s, end_s], at_s, counter_mj)
    low, high = np.searchsorted(at_s, [start_s, end_s])
    var = 0.0
    for i in {int(low), int(high)}:
        inside = 0 < i < len(at_s)
        length_s = float(at_s[i] - at_s[i - 1]) if inside else end_s - start_s
        open_mj = (float(powers_mw[i - 1]) - floor_mw) * length_s if inside else floor_mw * length_s
        var += (open_mj / math.sqrt(12)) ** 2
    total_mj = float(last_mj - first_mj)
    edges_mj = math.sqrt(2) * placed.u_s * total_mj / (end_s - start_s)
    net_mj = total_mj - floor_mw * (end_s - start_s)
    return _result(total_mj, net_mj, math.sqrt(var + edges_mj**2), "counter", floor_mw)
