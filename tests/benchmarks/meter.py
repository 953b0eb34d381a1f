"""How right the energy of a window is: recordings of known work on an H200, ours beside the plain counter difference.

Run: python tests/benchmarks/meter.py [--most 40] [--recording tests/data/h200_bursts.json.gz ...]

Prints one JSON object. Truth of a burst: what the counter gained over the whole series of its label, less the idle between,
shared by the matrix products that each did, plus idle for the burst's own duration. Bursts of one label do the same work but
do not draw the same energy: a GPU at its power limit that clocks lower takes longer and draws less. The counter alone shows
that (`spread_seen_by_counter`), so each error is given twice: `rms`, against the series' mean, and `rms_trend_free`, less
what is linear in the burst's duration.

`plain` is E(end) - E(start) with the last value of the counter seen before each instant, as zeus and codecarbon take it. The
bursts' recording read the counter once a second, the other one at each of its steps; ours gets one reading a second of both.
"""

import argparse
import gzip
import json
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from energyd.daemon.records import Counter, Samples
from energyd.daemon.trace import read_trace
from energyd.daemon.units import NS_PER_MS, UJ_PER_MJ, energy_uj
from energyd.daemon.window import WindowEnergy, recording, window_energy

DATA = Path(__file__).parent.parent / "data"
RECORDINGS = (DATA / "h200_bursts.json.gz", DATA / "h200_metrology.json.gz", DATA / "h200_bursts_held_out.json.gz")
"""The first two served to set the constants of `daemon/window.py`; the third was recorded afterwards."""
SINGLE = frozenset({"steady"})
"""Labels with one burst only: nothing to average."""
QUIET_NS = 150 * NS_PER_MS
"""The sensor's tail is over so long after a burst."""
SHORT_QUIET_NS = 60 * NS_PER_MS
BEFORE_NS = 500 * NS_PER_MS
AFTER_NS = 320 * NS_PER_MS
Burst = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Series:
    """The bursts of one label: (start, end, products), unix ns; idle level; what a product drew above it on average, µJ."""

    label: str
    bursts: tuple[Burst, ...]
    floor_mw: int
    product_uj: float

    def truth_uj(self, burst: Burst) -> float:
        """The energy of one of the bursts."""
        return self.product_uj * burst[2] + energy_uj(self.floor_mw, burst[1] - burst[0])


def series(path: Path) -> list[Series]:
    """The series of a recording with known work, and their truths."""
    raw = json.loads(gzip.decompress(path.read_bytes()))
    trace = read_trace(path, thin_ns=0)
    found: dict[str, list[Burst]] = {}
    for label, start_ns, end_ns, products in raw["work"]:
        if label not in SINGLE:
            found.setdefault(label, []).append((start_ns, end_ns, products))
    return [_series(label, bursts, trace.anchors[0], trace.samples[0]) for label, bursts in found.items()]


def _series(label: str, bursts: list[Burst], counters: Sequence[Counter], samples: Samples) -> Series:
    gaps = [(a[1], b[0]) for a, b in pairwise(bursts)]
    wide = min(b - a for a, b in gaps) > 200 * NS_PER_MS
    quiet = [_between(samples, a + (QUIET_NS if wide else SHORT_QUIET_NS), b) for a, b in gaps]
    idle_mw = (
        np.concatenate(quiet) if sum(map(len, quiet)) else _between(samples, bursts[0][0] - BEFORE_NS, bursts[0][0])
    )
    floor_mw = round(float(idle_mw.mean() if sum(map(len, quiet)) else np.median(idle_mw)))
    first = counters[bisect_left(counters, bursts[0][0] - 20 * NS_PER_MS, key=lambda c: c.after_ns) - 1]
    last = counters[bisect_left(counters, bursts[-1][1] + AFTER_NS, key=lambda c: c.before_ns)]
    gained_uj = (last.counter_mj - first.counter_mj) * UJ_PER_MJ
    net_uj = gained_uj - energy_uj(floor_mw, last.before_ns - first.before_ns)
    return Series(label, tuple(bursts), floor_mw, net_uj / sum(products for _, _, products in bursts))


def _between(samples: Samples, start_ns: int, end_ns: int) -> np.ndarray:
    low, high = bisect_right(samples.end_ns, start_ns), bisect_right(samples.end_ns, end_ns)
    return np.array(samples.power_mw[low:high], dtype=float)


def plain_uj(counters: Sequence[Counter], start_ns: int, end_ns: int) -> int:
    """E(end) - E(start), each the last value seen."""
    at = [max(0, bisect_right(counters, t, key=lambda c: c.after_ns) - 1) for t in (start_ns, end_ns)]
    return (counters[at[1]].counter_mj - counters[at[0]].counter_mj) * UJ_PER_MJ


def enclosed_uj(counters: Sequence[Counter], one: Series, burst: Burst) -> float | None:
    """A burst's energy by the counter alone: the readings around it, less idle; None if they enclose another burst too."""
    low = bisect_left(counters, burst[0], key=lambda c: c.before_ns) - 1
    high = bisect_left(counters, burst[1] + 160 * NS_PER_MS, key=lambda c: c.before_ns)
    start_ns, end_ns = counters[low].before_ns - 100 * NS_PER_MS, counters[high].before_ns
    if sum(a < end_ns and b > start_ns for a, b, _ in one.bursts) > 1:
        return None
    gained_uj = (counters[high].counter_mj - counters[low].counter_mj) * UJ_PER_MJ
    idle_ns = counters[high].before_ns - counters[low].before_ns - (burst[1] - burst[0])
    return gained_uj - energy_uj(one.floor_mw, idle_ns)


def errors(figures: Sequence[float], truths: Sequence[float]) -> np.ndarray:
    """Relative errors."""
    return np.asarray(np.array(figures) / np.array(truths) - 1)


def trend_free(values: np.ndarray, durations: Sequence[int]) -> np.ndarray:
    """`values` less what is linear in the duration, their mean kept; as they are if the durations do not differ."""
    away = np.array(durations, dtype=float)
    away -= away.mean()
    if len(values) < 8 or away.std() < 0.8 * NS_PER_MS:
        return values
    return np.asarray(values - away * float(away @ values) / float(away @ away))


def rms(values: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt((values**2).mean()))


def measured(path: Path, bursts: Sequence[Burst]) -> list[WindowEnergy]:
    """Ours, from samples and one reading of the counter a second."""
    trace = read_trace(path)
    readings = recording(trace.anchors[0], trace.samples[0])
    return [window_energy(readings, a, b) for a, b, _ in bursts]


def compare(path: Path, most: int) -> tuple[list[dict[str, object]], np.ndarray]:
    """One row a label; and for all windows (error, trend-free error, stated u), one row each."""
    counters = read_trace(path, thin_ns=0).anchors[0]
    rows: list[dict[str, object]] = []
    pooled = []
    for one in series(path):
        bursts = one.bursts[:: -(-len(one.bursts) // most)]
        truths = [one.truth_uj(b) for b in bursts]
        durations = [b - a for a, b, _ in bursts]
        ours = measured(path, bursts)
        off = errors([w.energy_uj for w in ours], truths)
        free = trend_free(off, durations)
        stated = np.array([w.rel_u for w in ours])
        plain = errors([plain_uj(counters, a, b) for a, b, _ in bursts], truths)
        alone = [
            (e, t) for e, t in ((enclosed_uj(counters, one, b), t) for b, t in zip(bursts, truths, strict=True)) if e
        ]
        rows.append({
            "label": one.label, "n": len(bursts), "mean_ms": round(float(np.mean(durations)) / NS_PER_MS, 2),
            "truth_j": round(float(np.mean(truths)) / 1e6, 3), "floor_w": round(one.floor_mw / 1000, 2),
            "ours": {
                "bias": round(float(off.mean()), 5), "rms": round(rms(off), 5), "rms_trend_free": round(rms(free), 5),
                "median_rel_u": round(float(np.median(stated)), 5),
                "inside_2u": round(float((abs(off) <= 2 * stated).mean()), 3),
                "inside_2u_trend_free": round(float((abs(free) <= 2 * stated).mean()), 3),
                "zero_readings": sum(w.energy_uj == 0 for w in ours),
                "methods": sorted({w.method for w in ours}),
            },
            "plain": {
                "bias": round(float(plain.mean()), 5), "rms": round(rms(plain), 5),
                "zero_readings": int((plain == -1).sum()),
            },
            "spread_seen_by_counter": round(float(errors(*zip(*alone, strict=True)).std()), 5) if len(alone) > 2 else None,
        })  # fmt: skip
        pooled.append(np.stack([off, free, stated], axis=1))
    return rows, np.concatenate(pooled)


def main() -> None:
    """Print the comparison of all recordings."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--most", type=int, default=40, help="windows taken of one label")
    parser.add_argument(
        "--recording", type=Path, action="append", help="a recording with `work`; default: both of ours"
    )
    arguments = parser.parse_args()
    result: dict[str, object] = {}
    pooled = []
    for path in arguments.recording or RECORDINGS:
        result[path.name], windows = compare(path, arguments.most)
        pooled.append(windows)
    off, free, stated = np.concatenate(pooled).T
    result["pooled"] = {
        "n": len(off), "rms": round(rms(off), 5), "median_rel_u": round(float(np.median(stated)), 5),
        "inside_2u": round(float((abs(off) <= 2 * stated).mean()), 4),
        "inside_2u_trend_free": round(float((abs(free) <= 2 * stated).mean()), 4),
    }  # fmt: skip
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
