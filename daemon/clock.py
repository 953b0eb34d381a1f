"""One time line for all processes of a host.

Ledger time is unix nanoseconds derived from the monotonic clock by one offset that is kept for a whole boot
(`CLOCK_MONOTONIC` is shared by every process of a boot). A step of the wall clock (NTP at boot, an administrator)
therefore moves no interval and tears no hole: it is an event, seen as `Clock.wall_step_ns`.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

BOOT_ID_FILE = Path("/proc/sys/kernel/random/boot_id")


class TimeSource(Protocol):
    """Anything that tells ledger time."""

    def now_ns(self) -> int:
        """Ledger time, unix ns."""
        ...


def boot_id(path: Path = BOOT_ID_FILE) -> str:
    """The kernel's random id of this boot; an id of the process's own start time where there is none (not Linux)."""
    try:
        return path.read_text().strip()
    except OSError:
        return f"unknown-{time.time_ns()}"


@dataclass(frozen=True, slots=True)
class Clock:
    """Ledger time: monotonic clock + `offset_ns`, where `offset_ns` was taken once for this boot."""

    offset_ns: int

    @classmethod
    def start(cls) -> "Clock":
        """A clock whose offset is taken now; the daemon replaces it by the one stored for this boot."""
        return cls(time.time_ns() - time.monotonic_ns())

    def now_ns(self) -> int:
        """Ledger time, unix ns; never runs backwards within a boot."""
        return time.monotonic_ns() + self.offset_ns

    def wall_step_ns(self) -> int:
        """How far the wall clock has moved away from ledger time, ns (positive: the wall clock is ahead)."""
        return time.time_ns() - self.now_ns()
