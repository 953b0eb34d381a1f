"""The readings of `energyd doctor`: a few seconds of each GPU, a part of them polled hard; no judgement.

One GPU after the other::

    |-- hard: 1.5 s --|---------- once a second, as the daemon does ----------|-- hard: 0.5 s --|
     the counter's grid      sample cadence, costs                              a second edge

Between an edge of the first part and one of the last, samples and counter are compared: both ends are then known to a
few ms, where two reads at any time would leave 100 ms open. Polling hard costs the CPU of a read every few ms for those
seconds; it disturbs no daemon beside it, but it makes the driver's sample stamps jitter.
"""

import math
import os
import statistics
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Protocol

from . import paths
from .clock import Clock
from .doctor import Cost, Daemon, GpuFacts, HostFacts, Node, Ratio, Ring, Steps
from .errors import EndOfTrace, EnergydError, LostGpu, RetryReading
from .localclient import ask_status
from .records import Counter, Gpu, Reading
from .sensors import Sensor
from .units import NS_PER_MS, NS_PER_S, UJ_PER_MJ, energy_uj, mean_power_mw, seconds

FIRST_HARD_NS: Final = 1500 * NS_PER_MS
LAST_HARD_NS: Final = 500 * NS_PER_MS
CALM_NS: Final = NS_PER_S
HARD_PAUSE_S: Final = 0.002
"""Between hard reads: an edge is known to about this, and a driver whose calls cost nothing is not hammered."""
HUNG_S: Final = 10.0
"""How much longer than planned a GPU's probe may take before its driver is said to hang."""
_WELL: Final = frozenset({"ok", "starting"})
_LEAST_EDGES: Final = 4
_LAG_NS: Final = 30 * NS_PER_MS
"""How far samples and counter may be apart in time, one standard deviation: a reading decays over 50 ms after work ends."""
_NEAR_NS: Final = 100 * NS_PER_MS


class Instants(Protocol):
    """Ledger time that remembers how much CPU time the thread had used at each instant it told."""

    def now_ns(self) -> int:
        """Ledger time, unix ns."""
        ...

    def cpu_at_ns(self, told_ns: int) -> int | None:
        """CPU time of the thread when `told_ns` was told, ns; None if it never was."""
        ...

    def forget(self) -> None:
        """Drop what was remembered."""
        ...


@dataclass(frozen=True, slots=True)
class CostClock(Clock):
    """A clock for sensors to read, which tells afterwards what the calls between two of its instants cost.

    A sensor brackets its counter read with two looks at the clock; so the parts of one poll can be priced from outside,
    without a second way to the driver. For one reading thread at a time.
    """

    used: dict[int, int] = field(default_factory=dict)

    def now_ns(self) -> int:
        """Ledger time, unix ns."""
        now_ns = Clock.now_ns(self)
        self.used[now_ns] = time.thread_time_ns()
        return now_ns

    def cpu_at_ns(self, told_ns: int) -> int | None:
        """CPU time of the thread when `told_ns` was told, ns; None if it never was."""
        return self.used.get(told_ns)

    def forget(self) -> None:
        """Drop what was remembered."""
        self.used.clear()


@dataclass(frozen=True, slots=True)
class Shot:
    """One reading and what its two parts cost: durations and CPU times, ns (None: not told, or that part is missing)."""

    reading: Reading
    samples_wall_ns: int | None
    samples_cpu_ns: int | None
    counter_wall_ns: int | None
    counter_cpu_ns: int | None


@dataclass(frozen=True, slots=True)
class Edge:
    """The counter was seen to move to `counter_mj` between two reads: at `at_ns`, give or take half of `width_ns`."""

    at_ns: int
    width_ns: int
    counter_mj: int


@dataclass(slots=True)
class _Film:
    """All that was read of one GPU: the three parts, and the failures."""

    first: list[Shot] = field(default_factory=list)
    calm: list[Shot] = field(default_factory=list)
    last: list[Shot] = field(default_factory=list)
    failed: int = 0
    trouble: str | None = None
    lost: bool = False

    @property
    def shots(self) -> list[Shot]:
        return [*self.first, *self.calm, *self.last]


def probe_host(
    sensor: Sensor, clock: CostClock, *, per_gpu_s: float, db: Path | None, dev: Path = Path("/dev"),
    on_gpu: Callable[[Gpu], None] = lambda _: None, patience_s: float = HUNG_S,
) -> HostFacts:  # fmt: skip
    """Everything that doctor judges; takes about `per_gpu_s` a GPU (at least 3 are sensible).

    `db`: the ledger beside whose socket a daemon may run (None: the default). A GPU whose driver hangs is given up
    `patience_s` after its probe should have ended; the others are still looked at.
    """
    gpus = []
    for gpu in sensor.gpus():
        on_gpu(gpu)
        gpus.append(_guarded(sensor, clock, gpu, round(per_gpu_s * NS_PER_S), patience_s))
    return HostFacts(
        nodes=device_nodes(dev), wall_step_ns=clock.wall_step_ns(), daemon=running_daemon(db), gpus=tuple(gpus)
    )


def _guarded(sensor: Sensor, clock: CostClock, gpu: Gpu, probe_ns: int, patience_s: float) -> GpuFacts:
    """`probe_gpu` in a thread of its own, so that a driver call that does not return ends in a finding."""
    done: list[GpuFacts] = []
    thread = threading.Thread(target=lambda: done.append(probe_gpu(sensor, clock, gpu, probe_ns)), daemon=True)
    thread.start()
    thread.join(seconds(probe_ns) + patience_s)
    return replace(_named(gpu), hung=True) if thread.is_alive() else done[0]


def probe_gpu(
    sensor: Sensor, clock: Instants, gpu: Gpu, probe_ns: int, sleep: Callable[[float], None] = time.sleep
) -> GpuFacts:
    """Read one GPU for `probe_ns` and say what was seen. Failures of the GPU are facts, never raised."""
    film = _Film()
    start_ns = clock.now_ns()
    hard_ns = min(FIRST_HARD_NS, probe_ns // 2)
    _shoot(film, film.first, sensor, clock, gpu, until_ns=start_ns + hard_ns, pause_s=HARD_PAUSE_S, sleep=sleep)
    last_ns = start_ns + max(hard_ns, probe_ns - LAST_HARD_NS)
    _shoot(film, film.calm, sensor, clock, gpu, until_ns=last_ns, pause_s=seconds(CALM_NS), sleep=sleep)
    end_ns = start_ns + probe_ns
    _shoot(film, film.last, sensor, clock, gpu, until_ns=end_ns, pause_s=HARD_PAUSE_S, sleep=sleep)
    return replace(_seen(gpu, film), **_told(sensor, gpu, lost=film.lost), probe_ns=clock.now_ns() - start_ns)


def _shoot(
    film: _Film, part: list[Shot], sensor: Sensor, clock: Instants, gpu: Gpu, *, until_ns: int, pause_s: float,
    sleep: Callable[[float], None],
) -> None:  # fmt: skip
    while not film.lost and clock.now_ns() < until_ns:
        clock.forget()
        start_ns = clock.now_ns()
        try:
            part.append(_priced(sensor.read(gpu), clock, start_ns))
        except RetryReading as e:
            film.failed, film.trouble = film.failed + 1, film.trouble or str(e)
        except LostGpu as e:
            film.failed, film.trouble, film.lost = film.failed + 1, film.trouble or str(e), True
        except EndOfTrace:
            return
        sleep(max(0.0, min(pause_s, seconds(until_ns - clock.now_ns()))))


def _priced(reading: Reading, clock: Instants, start_ns: int) -> Shot:
    """What the parts of a reading cost: the samples up to the counter's bracket, the counter within it."""
    counter = reading.counter
    if counter is None:
        return Shot(reading, None, None, None, None)
    at = [clock.cpu_at_ns(t) for t in (start_ns, counter.before_ns, counter.after_ns)]
    samples_cpu, counter_cpu = ((b - a) if a is not None and b is not None else None for a, b in pairwise(at))
    offers = reading.samples is not None
    return Shot(
        reading,
        counter.before_ns - start_ns if offers else None,
        samples_cpu if offers else None,
        counter.after_ns - counter.before_ns,
        counter_cpu,
    )


def _named(gpu: Gpu) -> GpuFacts:
    return GpuFacts(gpu.index, gpu.uuid, gpu.name, gpu.driver, gpu.source, gpu.power_limit_mw)


def _told(sensor: Sensor, gpu: Gpu, *, lost: bool) -> dict[str, Any]:
    """What the sensor tells without a reading: persistence (where it knows) and processes."""
    pids = None if lost else sensor.compute_pids(gpu)
    tell = getattr(sensor, "capabilities", None)  # NVML's alone: others have no driver to ask
    offered = tell(gpu) if callable(tell) else None
    told = asdict(offered) if is_dataclass(offered) and not isinstance(offered, type) else {}
    return {"processes": None if pids is None else len(pids), "persistence": told.get("persistence")}


def _seen(gpu: Gpu, film: _Film) -> GpuFacts:
    shots = film.shots
    counters = [s.reading.counter for s in shots if s.reading.counter]
    samples = _joined(shots)
    first, last = edges(_counters(film.first)), edges(_counters(film.last))
    gain_mj = counters[-1].counter_mj - counters[0].counter_mj if len(counters) > 1 else None
    over_ns = counters[-1].before_ns - counters[0].before_ns if counters else 0
    fell = any(b.counter_mj < a.counter_mj for a, b in pairwise(counters))
    powers = sorted(power_mw for _, power_mw in samples)
    return replace(
        _named(gpu),
        readings=len(shots) + film.failed,
        failed=film.failed,
        trouble=film.trouble,
        lost=film.lost,
        counters=len(counters),
        counter_gain_mj=gain_mj,
        counter_fell=fell,
        counter_cost=_cost([s.counter_wall_ns for s in shots], [s.counter_cpu_ns for s in shots]),
        samples_cost=_cost([s.samples_wall_ns for s in shots], [s.samples_cpu_ns for s in shots]),
        steps=grid(first),
        ring=_ring(film, samples),
        ratio=ratio(first[0], last[-1], samples) if first and last and not fell else None,
        mean_power_mw=mean_power_mw(gain_mj * UJ_PER_MJ, over_ns)
        if gain_mj is not None and over_ns and not fell
        else None,
        floor_mw=powers[len(powers) // 10] if powers else None,
    )


def _counters(shots: Sequence[Shot]) -> list[Counter]:
    return [s.reading.counter for s in shots if s.reading.counter]


def _joined(shots: Sequence[Shot]) -> list[tuple[int, int]]:
    """All samples (end, mW), ascending."""
    found: dict[int, int] = {}
    for shot in shots:
        if shot.reading.samples:
            found.update(zip(shot.reading.samples.end_ns, shot.reading.samples.power_mw, strict=True))
    return sorted(found.items())


def edges(counters: Sequence[Counter]) -> list[Edge]:
    """Where a counter that is polled hard was seen to rise."""
    found = []
    for a, b in pairwise(counters):
        if b.counter_mj > a.counter_mj:
            from_ns, to_ns = (a.before_ns + a.after_ns) // 2, (b.before_ns + b.after_ns) // 2
            found.append(Edge((from_ns + to_ns) // 2, to_ns - from_ns, b.counter_mj))
    return found


def grid(seen: Sequence[Edge]) -> Steps | None:
    """The regular steps through these edges, by least squares; None for fewer than 4, or if they are not regular.

    An edge may be missing (a poll that took long): distances are counted in whole periods.
    """
    if len(seen) < _LEAST_EDGES:
        return None
    at_ns = [e.at_ns for e in seen]
    guess_ns = statistics.median([b - a for a, b in pairwise(at_ns)])
    places = [0]
    for a, b in pairwise(at_ns):
        places.append(places[-1] + max(1, round((b - a) / guess_ns)))
    line = statistics.linear_regression(places, [t - at_ns[0] for t in at_ns])
    period_ns = round(line.slope)
    apart = [t - at_ns[0] - line.intercept - line.slope * place for t, place in zip(at_ns, places, strict=True)]
    scatter_ns = round(statistics.fmean([x * x for x in apart]) ** 0.5)
    if period_ns <= 0 or scatter_ns > period_ns / 4:
        return None
    # Unix time holds 10^10 steps: the phase means something only against a whole number of ms.
    whole_ns = max(1, round(period_ns / NS_PER_MS)) * NS_PER_MS
    return Steps(period_ns, (at_ns[0] + round(line.intercept)) % whole_ns, scatter_ns, len(seen))


def ratio(a: Edge, b: Edge, samples: Sequence[tuple[int, int]]) -> Ratio | None:
    """Energy of `samples` (end ns, mW) over that of the counter between two edges; None without samples about both."""
    ends_ns = [end_ns for end_ns, _ in samples]
    counted_uj = (b.counter_mj - a.counter_mj) * UJ_PER_MJ
    over_ns = b.at_ns - a.at_ns
    if counted_uj <= 0 or not ends_ns or ends_ns[0] > a.at_ns:
        return None
    summed_uj, at_ns = 0, a.at_ns
    for end_ns, power_mw in samples[bisect_right(ends_ns, a.at_ns) :]:
        until_ns = min(end_ns, b.at_ns)
        summed_uj += energy_uj(power_mw, until_ns - at_ns)
        at_ns = until_ns
        if at_ns >= b.at_ns:
            break
    # The slot that the last edge falls into may not have ended yet: the newest sample stands for it.
    summed_uj += energy_uj(samples[-1][1], b.at_ns - at_ns)
    # Where the load changes at an edge, a lag between the two counts in full there: it is as much power, for so long.
    near = [mw for t, mw in samples if min(abs(t - a.at_ns), abs(t - b.at_ns)) <= _NEAR_NS]
    lag_uj = energy_uj(max(near) - min(near), _LAG_NS) if near else 0
    placed = ((a.width_ns**2 + b.width_ns**2) / 12) ** 0.5 / over_ns
    return Ratio(summed_uj / counted_uj, math.hypot(placed, lag_uj / counted_uj), over_ns)


def _ring(film: _Film, samples: Sequence[tuple[int, int]]) -> Ring | None:
    """The first reading holds all that the driver kept; cadence is judged with what came since, age where polled calmly."""
    filled = [s.reading.samples.end_ns for s in film.shots if s.reading.samples and s.reading.samples.end_ns]
    if not filled or len(samples) < 2:
        return None
    gaps = [b - a for (a, _), (b, _) in pairwise(samples)]
    gap_ns = round(statistics.median(gaps))
    calm = film.calm or film.first
    ages = [
        s.reading.counter.before_ns - s.reading.samples.end_ns[-1]
        for s in calm
        if s.reading.counter and s.reading.samples and s.reading.samples.end_ns
    ]
    return Ring(
        length=len(filled[0]),
        span_ns=filled[0][-1] - filled[0][0] + gap_ns,
        gap_ns=gap_ns,
        widest_gap_ns=max(gaps),
        age_ns=round(statistics.median(ages)) if ages else None,
    )


def _cost(walls_ns: Sequence[int | None], cpus_ns: Sequence[int | None]) -> Cost | None:
    walls = sorted(w for w in walls_ns if w is not None)
    cpus = [c for c in cpus_ns if c is not None]
    if not walls:
        return None
    return Cost(
        wall_ns=round(statistics.median(walls)),
        wall_p99_ns=walls[min(len(walls) - 1, len(walls) * 99 // 100)],
        cpu_ns=round(statistics.median(cpus)) if cpus else None,
        calls=len(walls),
    )


def device_nodes(dev: Path = Path("/dev")) -> tuple[Node, ...]:
    """The NVIDIA driver's device nodes and whether this user may use them; none on a host without the driver."""
    found = [dev / "nvidiactl", *sorted(dev.glob("nvidia[0-9]*"), key=lambda p: (len(p.name), p.name))]
    return tuple(Node(str(p), os.access(p, os.R_OK | os.W_OK)) for p in found if p.exists())


def running_daemon(db: Path | None, wall_ns: Callable[[], int] = time.time_ns) -> Daemon | None:
    """The daemon that answers beside the ledger `db` (None: the default one); None if nobody does."""
    try:
        told = ask_status(paths.socket_path(db if db is not None else paths.ledger_path()))
    except EnergydError:
        return None
    return Daemon(
        version=str(told["version"]),
        wall_step_ns=wall_ns() - time.monotonic_ns() - int(told["offset_ns"]),
        troubles=tuple(f"GPU {g['index']}: {g['state']}" for g in told["gpus"] if g["state"] not in _WELL),
    )
