"""Sensors: one Protocol, one file each. A new source of readings is a new file; nothing else moves.

What a sensor may never do: run on an event loop, sleep between polls, keep energy books, repeat an old value as new,
invent a number, run commands, need root. It takes the clock and all outside facts as arguments.
"""

from typing import Protocol

from energyd.daemon.records import Gpu, Reading


class Sensor(Protocol):
    """Reads GPUs. Methods block and may be called from one thread per GPU at the same time."""

    def gpus(self) -> tuple[Gpu, ...]:
        """The GPUs found when the sensor was opened, in driver order."""
        ...

    def read(self, gpu: Gpu) -> Reading:
        """New power samples since the last call for this GPU, then the energy counter.

        Raises RetryReading (transient), LostGpu (close the epoch), EndOfTrace (a recording is over).
        """
        ...

    def compute_pids(self, gpu: Gpu) -> frozenset[int] | None:
        """Processes with a compute context on the GPU; None if the driver does not tell."""
        ...

    def close(self) -> None:
        """Release the driver; further calls are errors."""
        ...
