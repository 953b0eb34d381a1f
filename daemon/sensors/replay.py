"""A recorded trace played in a loop against the clock: a live sensor for tests and demonstrations without a GPU.

What it says is a pure function of ledger time: a process that was killed and started again finds the counter where it
ought to be, like that of a real GPU. Source and name say that it is a recording, not a measurement of this host.

The counter repeats what the recording's did. Between two anchors it follows the recorded samples, scaled so that they
integrate to the counter, and it shows the value of the last 100 ms step, as the recorded GPU does; a straight line
between anchors would contradict the samples that are given beside it.
"""

import zlib
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from energyd.daemon.clock import TimeSource
from energyd.daemon.errors import TraceError, UsageError
from energyd.daemon.records import Counter, Gpu, Reading, Samples
from energyd.daemon.trace import Trace
from energyd.daemon.units import NS_PER_MS, UJ_PER_MJ

STEP_NS = 100 * NS_PER_MS
"""How often the replayed counter moves, as on an H200."""
RING_NS = 2400 * NS_PER_MS
"""How far back the replayed samples go, as the H200's ring of 119 samples of 20 ms does."""


@dataclass(frozen=True, slots=True)
class Loop:
    """One GPU's recording from its first to its last anchor, times from 0 to `length_ns`.

    `energy_uj[i]` has flowed at `at_ns[i]` since the loop began; `energy_uj[-1]` is the whole loop's. `end_ns` and
    `power_mw` are the samples that ended in it.
    """

    length_ns: int
    at_ns: tuple[int, ...]
    energy_uj: tuple[int, ...]
    end_ns: tuple[int, ...]
    power_mw: tuple[int, ...]

    def flowed_uj(self, elapsed_ns: int) -> int:
        """Energy since the replay began, `elapsed_ns` >= 0 ago, µJ; never falls as `elapsed_ns` grows."""
        loops, phase_ns = divmod(elapsed_ns, self.length_ns)
        i = bisect_right(self.at_ns, phase_ns) - 1
        from_uj, gain_uj = self.energy_uj[i], self.energy_uj[i + 1] - self.energy_uj[i]
        part_uj = gain_uj * (phase_ns - self.at_ns[i]) // (self.at_ns[i + 1] - self.at_ns[i])
        return loops * self.energy_uj[-1] + from_uj + part_uj

    def samples(self, after_ns: int, upto_ns: int) -> list[tuple[int, int]]:
        """Samples (end, mW) that ended in (`after_ns`, `upto_ns`], both since the replay began, >= 0."""
        found: list[tuple[int, int]] = []
        for loop in range(after_ns // self.length_ns, upto_ns // self.length_ns + 1):
            base_ns = loop * self.length_ns
            first = bisect_right(self.end_ns, after_ns - base_ns)
            last = bisect_right(self.end_ns, upto_ns - base_ns)
            found += [(base_ns + self.end_ns[i], self.power_mw[i]) for i in range(first, last)]
        return found


class ReplaySensor:
    """Plays `trace` in a loop on `clock`; the first loop begins at `start_ns` (ledger time; None: at unix 0).

    `count`: play the first GPU of the trace as that many GPUs, evenly shifted in phase (None: the trace's own GPUs, in
    step). Before `start_ns` counters stand at 0. Raises UsageError for a count below 1 and TraceError for a recording
    whose counter falls, which cannot be looped.
    """

    def __init__(self, trace: Trace, clock: TimeSource, start_ns: int | None = None, count: int | None = None) -> None:
        if count is not None and count < 1:
            raise UsageError(f"cannot replay {count} GPUs: the number must be at least 1")
        self._clock = clock
        self._start_ns = start_ns or 0
        places = range(len(trace.gpus)) if count is None else [0] * count
        self._gpus: list[Gpu] = []
        self._tracks: dict[str, _Track] = {}
        for index, place in enumerate(places):
            loop = _loop(trace.anchors[place], trace.samples[place])
            shift_ns = 0 if count is None else index * loop.length_ns // count
            gpu = trace.gpus[place]
            # The UUID tells recordings and origins apart: the counter of another one under the same UUID would look
            # like a reset, or worse, like energy that flowed while the daemon was down.
            mark = zlib.crc32(repr((self._start_ns, shift_ns, loop.at_ns, loop.energy_uj)).encode())
            uuid = f"replay-{mark:08x}-{index}"
            self._gpus.append(replace(gpu, uuid=uuid, index=index, name=f"replay of {gpu.name}"))
            self._tracks[uuid] = _Track(loop, shift_ns)

    def gpus(self) -> tuple[Gpu, ...]:
        """The replayed GPUs."""
        return tuple(self._gpus)

    def read(self, gpu: Gpu) -> Reading:
        """Samples of the last 2.4 s that were not given yet (None if the trace has none), then the counter."""
        track = self._tracks[gpu.uuid]
        before_ns = self._clock.now_ns()
        samples = track.new_samples(before_ns - self._start_ns, self._start_ns) if track.loop.end_ns else None
        step_ns = before_ns // STEP_NS * STEP_NS
        counter_mj = track.loop.flowed_uj(max(0, step_ns - self._start_ns) + track.shift_ns) // UJ_PER_MJ
        return Reading(samples, Counter(before_ns, self._clock.now_ns(), counter_mj))

    def compute_pids(self, gpu: Gpu) -> frozenset[int] | None:  # noqa: ARG002 - the Protocol names it
        """None: traces do not record processes."""
        return None

    def close(self) -> None:
        """Nothing is held open."""


@dataclass(slots=True)
class _Track:
    """The play head of one GPU; each GPU is read by one thread."""

    loop: Loop
    shift_ns: int
    given_ns: int = 0

    def new_samples(self, elapsed_ns: int, start_ns: int) -> Samples:
        upto_ns = max(0, elapsed_ns) + self.shift_ns
        after_ns = max(self.given_ns, upto_ns - RING_NS, 0)
        found = self.loop.samples(after_ns, upto_ns)
        self.given_ns = max(self.given_ns, upto_ns)
        to_ledger_ns = start_ns - self.shift_ns
        return Samples(tuple(end_ns + to_ledger_ns for end_ns, _ in found), tuple(mw for _, mw in found))


def _loop(anchors: tuple[Counter, ...], samples: Samples) -> Loop:
    origin_ns = anchors[0].before_ns
    at_ns, energy_uj = [0], [0]
    for a, b in pairwise(anchors):
        if b.counter_mj < a.counter_mj:
            raise TraceError("the recording's counter falls (the driver was reloaded): it cannot be replayed in a loop")
        times_ns, shares_uj = _shaped(a, b, samples)
        at_ns += [t - origin_ns for t in times_ns]
        energy_uj += [energy_uj[-1] + share for share in shares_uj]
    first = bisect_right(samples.end_ns, origin_ns)
    last = bisect_right(samples.end_ns, anchors[-1].before_ns)
    return Loop(
        length_ns=at_ns[-1],
        at_ns=tuple(at_ns),
        energy_uj=tuple(energy_uj),
        end_ns=tuple(t - origin_ns for t in samples.end_ns[first:last]),
        power_mw=samples.power_mw[first:last],
    )


def _shaped(a: Counter, b: Counter, samples: Samples) -> tuple[list[int], list[int]]:
    """Where the counter stands between two anchors: ends of the parts (ns) and energy since `a` at each (µJ)."""
    gain_uj = (b.counter_mj - a.counter_mj) * UJ_PER_MJ
    first, last = bisect_right(samples.end_ns, a.before_ns), bisect_left(samples.end_ns, b.before_ns)
    ends_ns = [*samples.end_ns[first:last], b.before_ns]
    powers_mw = [*samples.power_mw[first : last + 1], 0][: len(ends_ns)]
    if last >= len(samples.end_ns):  # the last part has no sample of its own: it goes on as before
        powers_mw[-1] = samples.power_mw[-1] if samples.power_mw else 1
    widths_ns = [end - start for start, end in pairwise([a.before_ns, *ends_ns])]
    reached = list(accumulate(p * w for p, w in zip(powers_mw, widths_ns, strict=True)))
    if reached[-1] == 0:  # the counter moved though the samples say 0 W: spread evenly
        reached = list(accumulate(widths_ns))
    return ends_ns, [gain_uj * r // reached[-1] for r in reached]
