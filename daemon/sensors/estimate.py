"""An estimate for hosts without a GPU: the CPU's busy share times a stated nameplate power.

A real signal, so that every verb works anywhere, but no measurement: an idle CPU counts as 0 W, a busy one as its
nameplate, and nothing is known of memory, fans or clocks. Source, name and UUID say so wherever its joules go.

The counter is the kernel's own: busy ticks of all CPUs since boot. It goes on while the daemon is down and after a
restart it is where it would have been, so an estimate survives `kill -9` like a measured counter.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from energyd.daemon.clock import TimeSource
from energyd.daemon.errors import NoGpuError, RetryReading, UsageError
from energyd.daemon.records import Counter, Gpu, Reading, Samples, Source
from energyd.daemon.units import MW_PER_W, NS_PER_S

DEFAULT_WATTS: Final = 100.0
"""Assumed when nobody states a nameplate power; whoever uses it prints it as an assumption."""
PROC_STAT: Final = Path("/proc/stat")

_BUSY_FIELDS: Final = (0, 1, 2, 5, 6)
"""user, nice, system, irq, softirq. Not: idle, iowait, steal (others ran), guest (already in user)."""


class EstimateSensor:
    """One pretended GPU, `estimate-cpu-…`: busy share of the CPUs times `watts` (W, at full load, > 0).

    `stat`: the kernel's statistics; `hz`: its ticks a second (None: ask the system). Raises UsageError for watts
    that are no positive number and NoGpuError where there is no such file (not Linux).
    """

    def __init__(
        self, clock: TimeSource, watts: float = DEFAULT_WATTS, stat: Path = PROC_STAT, hz: int | None = None
    ) -> None:
        if not (math.isfinite(watts) and watts > 0):
            raise UsageError(f"the nameplate power must be a positive number of watts, not {watts}")
        self._clock = clock
        self._stat = stat
        self._hz = hz or os.sysconf("SC_CLK_TCK")
        self._full_mw = round(watts * MW_PER_W)
        try:
            self._cpus = _ticks(stat).cpus
        except RetryReading as e:
            raise NoGpuError(f"the CPU's busy share cannot be estimated on this host: {e}") from e
        self._last: tuple[int, int] | None = None
        # Another nameplate or number of CPUs scales the counter since boot: under the same UUID a restart with other
        # watts would book the difference as energy that flowed while the daemon was down.
        self._gpu = Gpu(
            uuid=f"estimate-cpu-{watts:g}w-{self._cpus}",
            index=0,
            name=f"CPU busy share x {watts:g} W (estimate)",
            driver="none",
            source=Source.ESTIMATE,
            power_limit_mw=self._full_mw,
        )

    def gpus(self) -> tuple[Gpu, ...]:
        """The one pretended GPU."""
        return (self._gpu,)

    def read(self, gpu: Gpu) -> Reading:  # noqa: ARG002 - there is one
        """One sample, the mean power since the read before (none at the first), and the counter since boot.

        Raises RetryReading if the kernel's statistics cannot be read.
        """
        before_ns = self._clock.now_ns()
        busy = _ticks(self._stat).busy
        counter = Counter(before_ns, self._clock.now_ns(), self._full_mw * busy // (self._hz * self._cpus))
        samples = Samples((), ())
        if self._last and before_ns > self._last[0]:
            last_ns, last_busy = self._last
            power_mw = self._full_mw * (busy - last_busy) * NS_PER_S // (self._hz * self._cpus * (before_ns - last_ns))
            samples = Samples((before_ns,), (max(0, power_mw),))
        self._last = (before_ns, busy)
        return Reading(samples, counter)

    def compute_pids(self, gpu: Gpu) -> frozenset[int] | None:  # noqa: ARG002 - the Protocol names it
        """None: a CPU runs every process."""
        return None

    def close(self) -> None:
        """Nothing is held open."""


@dataclass(frozen=True, slots=True)
class _Ticks:
    busy: int
    cpus: int


def _ticks(stat: Path) -> _Ticks:
    """Busy ticks of all CPUs since boot, and how many CPUs there are."""
    try:
        lines = stat.read_text().splitlines()
        fields = next(line.split()[1:] for line in lines if line.startswith("cpu "))
        busy = sum(int(fields[i]) for i in _BUSY_FIELDS)
    except OSError as e:
        raise RetryReading(f"{stat} cannot be read: {e.strerror}") from e
    except (StopIteration, IndexError, ValueError) as e:
        raise RetryReading(f"{stat} has no usable 'cpu' line") from e
    return _Ticks(busy, max(1, sum(line.startswith("cpu") for line in lines) - 1))
