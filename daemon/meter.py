"""The meter: readings of one GPU in, windows of exact energy out. Pure: no clock, no driver, no ledger.

Decided: dense samples, sparse anchors. The counter says how much, the driver's 20 ms samples say when. A
window runs from one anchor to the next; its samples are scaled so that they sum to the counter's difference, in integer
µJ. An anchor read at some instant holds the counter's value at its last step, up to one step earlier; until the grid of
the steps is learned (planned), the anchor is placed half a step before the read, which leaves an
uncertainty of step/√12 (29 ms for steps of 100 ms) at either end.

The counter's life, in one table:

========================  =========================================================================
previous anchor           what a new reading means
========================  =========================================================================
none, GPU never seen      epoch 0 begins; the absolute value is *not* energy used
same epoch                a window of kind `metered`
before a restart, value   one window of kind `outage`: the daemon was away, the energy is known,
not smaller, same boot    its shape is not
value smaller, or         the old epoch ends with a `gap` (energy unknown) and a new one begins with
another boot              a `reset` window that holds the first value (mJ since the driver loaded)
========================  =========================================================================
"""

import math
from dataclasses import dataclass

from .apportion import apportion
from .records import Counter, Reading, Samples, Slice, Source, Window, WindowKind
from .units import NS_PER_MS, NS_PER_S, UJ_PER_MJ, energy_uj, mean_power_mw

STEP_NS = {
    Source.NVML_COUNTER: 100 * NS_PER_MS,
    Source.NVML_POWER: 100 * NS_PER_MS,
    Source.RECORDING: 100 * NS_PER_MS,
    Source.EMULATED: 100 * NS_PER_MS,
    Source.ESTIMATE: 10 * NS_PER_MS,
}
"""Distance of two changes of the counter: measured on an H200 (100.0 ms); the kernel's jiffy for the estimate."""

_HOLE_NS = 200 * NS_PER_MS
"""A pause between samples longer than this is a hole (the ring wrapped): its power is what the counter leaves over."""
_STILL_NS = 5 * NS_PER_S
"""An unchanged counter is waited for this long before a window of 0 µJ is believed: a stuck read is not idleness."""
_MOST_SAMPLES = 30_000
"""Samples kept while the counter does not answer (10 minutes of them): a dead counter must not eat the memory."""


@dataclass(frozen=True, slots=True)
class Anchor:
    """A counter value and the instant it is placed at."""

    at_ns: int
    counter_mj: int


@dataclass(frozen=True, slots=True)
class Resume:
    """Where the ledger left a GPU: its last anchor, the key of its next window, and the boot it belongs to."""

    anchor: Anchor
    epoch: int
    next_seq: int
    same_boot: bool


class Meter:
    """Turns the readings of one GPU into windows whose energies sum to the counter's difference exactly."""

    def __init__(self, gpu: str, source: Source, resume: Resume | None = None) -> None:
        self.gpu = gpu
        self.source = source
        self.step_ns = STEP_NS[source]
        self.epoch = resume.epoch if resume else 0
        self._seq = resume.next_seq if resume else 0
        self._last = resume.anchor if resume else None
        self._reset_expected = resume is not None and not resume.same_boot
        self._away = resume is not None
        self._samples: list[tuple[int, int]] = []
        self.last_power_mw: int | None = None

    def lost(self) -> None:
        """The GPU or its driver went away: the next interval is an outage, or a reset if the counter fell."""
        self._away = True
        self._samples.clear()

    def feed(self, reading: Reading) -> list[Window]:
        """Take one reading; return the windows that it completes (none, one, or gap and reset).

        A reading without a counter only adds samples: the window gets longer, never wrong.
        """
        if reading.samples:
            self._keep(reading.samples)
        return self._anchor(reading.counter) if reading.counter else []

    def _keep(self, samples: Samples) -> None:
        newest = self._samples[-1][0] if self._samples else (self._last.at_ns if self._last else 0)
        for end_ns, power_mw in zip(samples.end_ns, samples.power_mw, strict=True):
            if end_ns > newest:  # the ring repeats what it held before, and stamps can run backwards by jitter
                self._samples.append((end_ns, power_mw))
                newest = end_ns
        del self._samples[:-_MOST_SAMPLES]
        if self._samples:
            self.last_power_mw = self._samples[-1][1]

    def _anchor(self, counter: Counter) -> list[Window]:
        at_ns = (counter.before_ns + counter.after_ns - self.step_ns) // 2
        last = self._last
        if last is None:
            self._last = Anchor(at_ns, counter.counter_mj)
            self._away = False  # lost before it was ever read: there is nothing that the next interval continues
            return []
        if counter.counter_mj < last.counter_mj or self._reset_expected:
            return self._reset(last, at_ns, counter.counter_mj)
        at_ns = max(at_ns, last.at_ns + 1)
        still = counter.counter_mj == last.counter_mj
        if still and not self._away and at_ns - last.at_ns < _STILL_NS:
            return []
        kind = WindowKind.OUTAGE if self._away else WindowKind.METERED
        energy = (counter.counter_mj - last.counter_mj) * UJ_PER_MJ
        slices = () if self._away else _shape(last.at_ns, at_ns, energy, self._samples)
        window = Window(
            gpu=self.gpu,
            epoch=self.epoch,
            seq=self._seq,
            start_ns=last.at_ns,
            end_ns=at_ns,
            counter_start_mj=last.counter_mj,
            counter_end_mj=counter.counter_mj,
            energy_uj=energy,
            u_uj=self._edge_uncertainty_uj(slices, energy, at_ns - last.at_ns),
            kind=kind,
            source=self.source,
            slices=slices,
        )
        self._advance(at_ns, counter.counter_mj)
        return [window]

    def _reset(self, last: Anchor, at_ns: int, counter_mj: int) -> list[Window]:
        at_ns = max(at_ns, last.at_ns + 1)
        shared = {"gpu": self.gpu, "start_ns": last.at_ns, "end_ns": at_ns, "u_uj": 0, "source": self.source}
        gap = Window(
            epoch=self.epoch,
            seq=self._seq,
            counter_start_mj=last.counter_mj,
            counter_end_mj=last.counter_mj,
            energy_uj=None,
            kind=WindowKind.GAP,
            **shared,  # type: ignore[arg-type]
        )
        self.epoch, self._seq = self.epoch + 1, 0
        reset = Window(
            epoch=self.epoch,
            seq=0,
            counter_start_mj=0,
            counter_end_mj=counter_mj,
            energy_uj=counter_mj * UJ_PER_MJ,
            kind=WindowKind.RESET,
            **shared,  # type: ignore[arg-type]
        )
        self._advance(at_ns, counter_mj)
        return [gap, reset]

    def _advance(self, at_ns: int, counter_mj: int) -> None:
        self._last = Anchor(at_ns, counter_mj)
        self._seq += 1
        self._away = self._reset_expected = False
        self._samples = [s for s in self._samples if s[0] > at_ns]

    def _edge_uncertainty_uj(self, slices: tuple[Slice, ...], energy: int, duration_ns: int) -> int:
        """One standard deviation of a window's energy from where its two anchors really lie, µJ; at most the energy.

        Without that bound a window of some ns (two reads at once, a clock set back over a reboot) would state more than
        an integer of the ledger holds.
        """
        shift_ns = self.step_ns / math.sqrt(12)
        ends = (slices[0], slices[-1]) if slices else (Slice(0, duration_ns, energy),) * 2
        powers = (mean_power_mw(s.energy_uj, s.end_ns - s.start_ns) for s in ends)
        return min(energy, round(math.hypot(*(energy_uj(p, round(shift_ns)) for p in powers))))


def _shape(start_ns: int, end_ns: int, energy: int, samples: list[tuple[int, int]]) -> tuple[Slice, ...]:
    """Cut [start, end) at the sample stamps and give each part its share of `energy`; exact.

    A sample stands for the slot that *ends* at its stamp: right over the second of a window; `window` solves for less.
    """
    parts: list[tuple[int, int, int | None]] = []  # start, end, power (None: a hole)
    at_ns = start_ns
    for stamp_ns, power_mw in samples:
        until_ns = min(stamp_ns, end_ns)
        if until_ns <= at_ns:
            continue
        parts.append((at_ns, until_ns, power_mw if until_ns - at_ns <= _HOLE_NS else None))
        at_ns = until_ns
        if at_ns >= end_ns:
            break
    if not parts:
        return (Slice(start_ns, end_ns, energy),)
    if at_ns < end_ns:
        last_power = samples[-1][1] if end_ns - at_ns <= _HOLE_NS else None
        parts.append((at_ns, end_ns, last_power))
    hole_ns = sum(b - a for a, b, power in parts if power is None)
    if hole_ns:
        known_uj = sum(energy_uj(power, b - a) for a, b, power in parts if power is not None)
        hole_mw = mean_power_mw(max(0, energy - known_uj), hole_ns)
        parts = [(a, b, hole_mw if power is None else power) for a, b, power in parts]
    weights = [(power or 0) * (b - a) for a, b, power in parts]
    if not any(weights):
        weights = [b - a for a, b, _ in parts]
    energies = apportion(energy, weights)
    return tuple(Slice(a, b, e) for (a, b, _), e in zip(parts, energies, strict=True))
