"""The recording sensor: each anchor once, with the samples that had ended."""

from pathlib import Path

import pytest

from energyd.daemon.errors import EndOfTrace
from energyd.daemon.records import Counter, Gpu, Reading, Samples, Source
from energyd.daemon.sensors.recording import RecordingSensor
from energyd.daemon.trace import Trace, read_trace
from energyd.daemon.units import energy_uj

DATA = Path(__file__).parents[1] / "data"


def gpu(index: int) -> Gpu:
    """A recorded GPU."""
    return Gpu(f"recording-{index}", index, "H200", "580", Source.RECORDING)


def trace(*parts: tuple[list[Counter], Samples]) -> Trace:
    """A trace of one GPU per part."""
    gpus = tuple(gpu(i) for i in range(len(parts)))
    return Trace({}, gpus, tuple(tuple(a) for a, _ in parts), tuple(s for _, s in parts), (), ())


def drained(sensor: RecordingSensor, which: Gpu) -> list[Reading]:
    """All readings of one GPU."""
    readings = []
    while True:
        try:
            readings.append(sensor.read(which))
        except EndOfTrace:
            return readings


def test_samples_come_with_the_first_anchor_read_after_they_ended() -> None:
    """A sample that ends when the counter read begins comes with it, a later one with the next, the last ones never."""
    # time      10   20   30   40   50   60
    # samples    x    x    x    x         x
    # anchors              [ ]       [ ]
    anchors = [Counter(30, 35, 1), Counter(50, 55, 2)]
    sensor = RecordingSensor(trace((anchors, Samples((10, 20, 30, 40, 60), (1, 2, 3, 4, 6)))))
    assert [
        Reading(Samples((10, 20, 30), (1, 2, 3)), anchors[0]),
        Reading(Samples((40,), (4,)), anchors[1]),
    ] == drained(sensor, gpu(0))


def test_a_recording_without_samples_gives_none() -> None:
    """No samples in the whole recording is a missing capability; none within an interval is an empty batch."""
    anchors = [Counter(10, 11, 1), Counter(20, 21, 2)]
    without, gap = trace((anchors, Samples((), ()))), trace((anchors, Samples((15,), (5,))))
    assert [r.samples for r in drained(RecordingSensor(without), gpu(0))] == [None, None]
    assert [Samples((), ()), Samples((15,), (5,))] == [r.samples for r in drained(RecordingSensor(gap), gpu(0))]


def test_the_end_is_told_every_time() -> None:
    """After the last anchor each further read raises EndOfTrace."""
    sensor = RecordingSensor(trace(([Counter(1, 2, 3)], Samples((), ()))))
    sensor.read(gpu(0))
    for _ in range(2):
        with pytest.raises(EndOfTrace, match="recording of GPU 0 has ended"):
            sensor.read(gpu(0))


def test_gpus_are_played_apart() -> None:
    """Reading one GPU to its end takes nothing from the other."""
    sensor = RecordingSensor(
        trace(([Counter(1, 2, 3)], Samples((), ())), ([Counter(1, 2, 7), Counter(3, 4, 8)], Samples((1,), (9,))))
    )
    drained(sensor, gpu(0))
    assert [r.counter.counter_mj for r in drained(sensor, gpu(1)) if r.counter] == [7, 8]


def test_the_real_samples_integrate_to_the_real_counter() -> None:
    """Over the serving recording the samples between first and last anchor agree with the counter within 0.2 %."""
    sensor = RecordingSensor(read_trace(DATA / "h200_vllm_llama8b_eager.json.gz"))
    readings = drained(sensor, sensor.gpus()[0])
    assert len(readings) == 173
    first, last = readings[0].counter, readings[-1].counter
    assert first is not None
    assert last is not None
    stamps = [t for r in readings if r.samples for t in r.samples.end_ns]
    powers = [p for r in readings if r.samples for p in r.samples.power_mw]
    assert sorted(set(stamps)) == stamps
    inside = [
        (t - before, p) for before, t, p in zip(stamps, stamps[1:], powers[1:], strict=False) if t > first.before_ns
    ]
    shaped_uj = sum(energy_uj(p, width) for width, p in inside)
    counted_uj = (last.counter_mj - first.counter_mj) * 1000
    assert abs(shaped_uj / counted_uj - 1) < 0.002


def test_processes_are_unknown() -> None:
    """A recording does not tell which processes ran: None, not an empty set."""
    sensor = RecordingSensor(trace(([Counter(1, 2, 3)], Samples((), ()))))
    assert sensor.compute_pids(gpu(0)) is None
    sensor.close()
