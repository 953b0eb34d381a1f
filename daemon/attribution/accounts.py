"""A window divided among its accounts, in whole microjoules that sum to the meter.

::

    energy of the window = idle floor × duration          + what was drawn above it
                           ├─ standing (while served)       ├─ active, shared by the policy
                           └─ idle (nobody was served)      └─ unattributed (nobody was near)

Equal-time sharing of the standing part; the active part goes by the policy's weights. What was drawn above the floor in
slices that no query came near is `unattributed(unknown)` if it is more than noise, else it stays idle: a foreign job that
runs beside a short query is not billed to it.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from energyd.daemon.apportion import apportion, scaled
from energyd.daemon.records import Charge, Service, Settlement, Unattributed, Window, WindowKind
from energyd.daemon.units import NS_PER_MS, energy_uj

from . import Overlap, Policy
from .floor import IdleFloor

LEAD_NS = 20 * NS_PER_MS
"""A slice may begin before the query that fills it: one sample slot of jitter in the driver's stamps."""
TAIL_NS = 100 * NS_PER_MS
"""After a query ends, the power reading decays for about 50 ms (H200); twice that still counts as its work."""
_NOISE_SD = 3.0


def overlaps(window: Window, services: Sequence[Service]) -> Overlap:
    """How long each service was in flight in each slice, ns, shape (slices, services).

    Slices that no service touches are given to those whose lead or tail reaches them.
    """
    starts = np.array([c.start_ns - window.start_ns for c in window.slices], dtype=np.float64)
    ends = np.array([c.end_ns - window.start_ns for c in window.slices], dtype=np.float64)
    begin = np.array([s.start_ns - window.start_ns for s in services], dtype=np.float64)
    finish = np.array([max(s.end_ns, s.start_ns + 1) - window.start_ns for s in services], dtype=np.float64)
    inner = _intersect(starts, ends, begin, finish)
    outer = _intersect(starts, ends, begin - LEAD_NS, finish + TAIL_NS)
    lonely = inner.sum(axis=1) == 0
    inner[lonely] = outer[lonely]
    return inner


def _intersect(
    starts: NDArray[np.float64], ends: NDArray[np.float64], begin: NDArray[np.float64], finish: NDArray[np.float64]
) -> Overlap:
    lengths: Overlap = np.minimum(ends[:, None], finish[None, :]) - np.maximum(starts[:, None], begin[None, :])
    return np.maximum(lengths, 0.0)


def divide(
    window: Window, services: Sequence[Service], floor: IdleFloor, policy: Policy, rival: Policy | None = None
) -> Settlement:
    """Settle one window of known energy among `services` (those whose span, lead or tail reaches it).

    `rival` is another policy whose charges are compared for the uncertainty of the split. The result balances exactly.
    """
    if window.energy_uj is None:
        raise ValueError("a gap has no energy to divide")
    if window.kind is not WindowKind.METERED or not window.slices:
        return _outage(window, services, floor, policy)
    energy = window.energy_uj
    floor_mw = floor.mw or 0
    floor_uj = min(energy, energy_uj(floor_mw, window.end_ns - window.start_ns))
    above_uj = energy - floor_uj
    if not services:
        band_uj = energy_uj(round(_NOISE_SD * floor.sd_mw), window.end_ns - window.start_ns)
        stray_uj = above_uj if above_uj > band_uj else 0
        return _settled(window, floor, policy, energy - stray_uj, stray_uj, ())
    overlap = overlaps(window, services)
    active = _active_uj(window, floor_mw)
    touched = overlap.sum(axis=1) > 0
    stray_uj, quiet_uj = _stray(window, active, touched, above_uj, floor)
    in_flight = _in_flight_ns(window, services)
    # in integers: a float could round to more than the floor and leave idle below zero
    standing_uj = floor_uj * _covered_ns(window, services) // (window.end_ns - window.start_ns)
    active_uj = above_uj - stray_uj - quiet_uj
    if not overlap.any():
        active_uj, quiet_uj = 0, above_uj - stray_uj
    keys = [s.query_id for s in services]
    present = overlap.sum(axis=0) > 0
    standing = _shared(standing_uj, in_flight, present, keys)
    own = _shared(active_uj, policy.weights(window, services, overlap, active), present, keys)
    other = _shared(active_uj, rival.weights(window, services, overlap, active), present, keys) if rival else own
    charges = tuple(Charge(key, a, s, spread_uj=b - a) for key, a, s, b in zip(keys, own, standing, other, strict=True))
    return _settled(window, floor, policy, floor_uj - standing_uj + quiet_uj, stray_uj, charges)


def _active_uj(window: Window, floor_mw: int) -> NDArray[np.float64]:
    """Energy above the floor in each slice, µJ; negative where a slice lies below it."""
    return np.array([c.energy_uj - energy_uj(floor_mw, c.end_ns - c.start_ns) for c in window.slices], dtype=np.float64)


def _in_flight_ns(window: Window, services: Sequence[Service]) -> NDArray[np.float64]:
    """Time in flight of each service within the window, ns; lead and tail do not count: no part in the idle watts."""
    spans = (_clip(window, s) for s in services)
    return np.array([max(0, end_ns - start_ns) for start_ns, end_ns in spans], dtype=np.float64)


def _covered_ns(window: Window, services: Sequence[Service]) -> int:
    """How long at least one query was in flight within the window, ns."""
    covered_ns, reached_ns = 0, window.start_ns
    for start_ns, end_ns in sorted(_clip(window, s) for s in services):
        if end_ns > max(start_ns, reached_ns):  # one that only leads into the window ends before it starts here
            covered_ns += end_ns - max(start_ns, reached_ns)
            reached_ns = end_ns
    return covered_ns


def _clip(window: Window, service: Service) -> tuple[int, int]:
    return max(service.start_ns, window.start_ns), min(max(service.end_ns, service.start_ns + 1), window.end_ns)


def _stray(
    window: Window, active: NDArray[np.float64], touched: NDArray[np.bool_], above_uj: int, floor: IdleFloor
) -> tuple[int, int]:
    """Energy above the floor that no query was near to: (unattributed, too little to be more than noise: idle), µJ."""
    if touched.all():
        return 0, 0
    lonely_uj = min(above_uj, max(0, round(float(active[~touched].sum()))))
    lonely_ns = sum(c.end_ns - c.start_ns for c, t in zip(window.slices, touched, strict=True) if not t)
    if lonely_uj > energy_uj(round(_NOISE_SD * floor.sd_mw), lonely_ns):
        return lonely_uj, 0
    return 0, lonely_uj


def _shared(total_uj: int, weights: NDArray[np.float64], present: NDArray[np.bool_], keys: Sequence[str]) -> list[int]:
    """Parts by weight; if no weight is usable, equal parts of those present (the rule for joint cost, too)."""
    integers, _ = scaled(weights.tolist())
    return apportion(total_uj, integers if any(integers) else present.astype(int).tolist(), keys)


def _outage(window: Window, services: Sequence[Service], floor: IdleFloor, policy: Policy) -> Settlement:
    """An interval without shape: queries get at most what the policy predicts, the rest is `unattributed(outage)`."""
    energy = window.energy_uj or 0
    predicted = policy.predict_uj(window, services) if services and window.kind is WindowKind.OUTAGE else None
    charges: tuple[Charge, ...] = ()
    if predicted is not None:
        whole = sum(predicted)
        parts = predicted if whole <= energy else apportion(energy, predicted, [s.query_id for s in services])
        charges = tuple(Charge(s.query_id, part, 0) for s, part in zip(services, parts, strict=True))
    rest = energy - sum(c.active_uj for c in charges)
    return Settlement(
        gpu=window.gpu,
        epoch=window.epoch,
        seq=window.seq,
        energy_uj=energy,
        idle_uj=0,
        unattributed_uj={Unattributed.OUTAGE: rest} if rest else {},
        charges=charges,
        policy=policy.name,
        coefficients_version=policy.coefficients_version,
        idle_floor_mw=floor.mw,
    )


def _settled(
    window: Window, floor: IdleFloor, policy: Policy, idle_uj: int, stray_uj: int, charges: tuple[Charge, ...]
) -> Settlement:
    return Settlement(
        gpu=window.gpu,
        epoch=window.epoch,
        seq=window.seq,
        energy_uj=window.energy_uj or 0,
        idle_uj=idle_uj,
        unattributed_uj={Unattributed.UNKNOWN: stray_uj} if stray_uj else {},
        charges=charges,
        policy=policy.name,
        coefficients_version=policy.coefficients_version,
        idle_floor_mw=floor.mw,
    )
