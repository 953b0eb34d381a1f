"""A recorded trace as a sensor: offline, as fast as it is read, for `energyd settle` and for tests of the meter."""

from bisect import bisect_right
from collections.abc import Iterator

from energyd.daemon.errors import EndOfTrace
from energyd.daemon.records import Counter, Gpu, Reading, Samples
from energyd.daemon.trace import Trace


class RecordingSensor:
    """Gives each recorded anchor once, with the samples that had ended when it was read.

    Samples after the last anchor are never given: no counter vouches for their energy.
    """

    def __init__(self, trace: Trace) -> None:
        self._gpus = trace.gpus
        self._readings = {
            gpu.uuid: _readings(anchors, samples)
            for gpu, anchors, samples in zip(trace.gpus, trace.anchors, trace.samples, strict=True)
        }

    def gpus(self) -> tuple[Gpu, ...]:
        """The recorded GPUs, by index (or in order of appearance)."""
        return self._gpus

    def read(self, gpu: Gpu) -> Reading:
        """The next anchor with its samples (None if the GPU has none at all); raises EndOfTrace after the last."""
        reading = next(self._readings[gpu.uuid], None)
        if reading is None:
            raise EndOfTrace(f"the recording of GPU {gpu.index} has ended")
        return reading

    def compute_pids(self, gpu: Gpu) -> frozenset[int] | None:  # noqa: ARG002 - the Protocol names it
        """None: traces do not record processes."""
        return None

    def close(self) -> None:
        """Nothing is held open."""


def _readings(anchors: tuple[Counter, ...], samples: Samples) -> Iterator[Reading]:
    if not samples.end_ns:
        yield from (Reading(None, anchor) for anchor in anchors)
        return
    given = 0
    for anchor in anchors:
        upto = bisect_right(samples.end_ns, anchor.before_ns, given)
        yield Reading(Samples(samples.end_ns[given:upto], samples.power_mw[given:upto]), anchor)
        given = upto
