"""The replay sensor: a recording on the clock, whose counter is a pure function of ledger time."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from energyd.daemon.clock import Clock
from energyd.daemon.errors import TraceError, UsageError
from energyd.daemon.records import Counter, Gpu, Reading, Samples, Source
from energyd.daemon.sensors.replay import RING_NS, STEP_NS, ReplaySensor
from energyd.daemon.trace import Trace, read_trace
from energyd.daemon.units import NS_PER_MS, NS_PER_S

DATA = Path(__file__).parents[1] / "data"
NOON_NS = 1_800_000_000 * NS_PER_S


@dataclass
class Dial:
    """A clock that shows what it is set to."""

    at_ns: int = NOON_NS

    def now_ns(self) -> int:
        return self.at_ns


def small(*counter_mj: int, samples: Samples | None = None) -> Trace:
    """A recording with an anchor each second, from second 7 on."""
    anchors = tuple(Counter((7 + i) * NS_PER_S, (7 + i) * NS_PER_S + 1, mj) for i, mj in enumerate(counter_mj))
    gpu = Gpu("recording-0", 0, "H200", "580", Source.RECORDING)
    return Trace({}, (gpu,), (anchors,), (samples or Samples((), ()),), (), ())


def read_at(sensor: ReplaySensor, dial: Dial, at_ns: int) -> Reading:
    """One reading of the first GPU at a time."""
    dial.at_ns = at_ns
    return sensor.read(sensor.gpus()[0])


def counter_at(sensor: ReplaySensor, dial: Dial, at_ns: int) -> int:
    """Its counter, mJ."""
    counter = read_at(sensor, dial, at_ns).counter
    assert counter is not None
    return counter.counter_mj


def test_the_counter_follows_the_recording_and_loops() -> None:
    """Two seconds with 1 J and 3 J, then again: interpolated between anchors, 4 J more with each loop."""
    # second         0     0.5    1      1.5     2      2.5    3
    # mJ             0     500    1000   2500    4000   4500   5000
    dial = Dial()
    sensor = ReplaySensor(small(100, 1100, 4100), dial, start_ns=NOON_NS)
    at = [counter_at(sensor, dial, NOON_NS + i * NS_PER_S // 2) for i in range(7)]
    assert at == [0, 500, 1000, 2500, 4000, 4500, 5000]


def test_the_counter_stands_between_steps() -> None:
    """As on the recorded GPU, the counter shows the value of the last 100 ms step."""
    dial = Dial()
    sensor = ReplaySensor(small(0, 1000), dial, start_ns=NOON_NS)
    values = [counter_at(sensor, dial, NOON_NS + ms * NS_PER_MS) for ms in (0, 99, 100, 199, 200)]
    assert values == [0, 0, 100, 100, 200]


def test_a_restarted_process_finds_the_counter_where_it_ought_to_be() -> None:
    """Two sensors made at different times from the same recording agree at any later instant, and in their UUIDs."""
    trace = read_trace(DATA / "h200_vllm_llama8b_eager.json.gz")
    dial = Dial()
    before = ReplaySensor(trace, dial)
    counter_at(before, dial, NOON_NS)
    after = ReplaySensor(trace, dial)
    assert before.gpus() == after.gpus()
    for hours in range(3):
        at_ns = NOON_NS + hours * 3_600 * NS_PER_S + 123_456_789
        assert counter_at(before, dial, at_ns) == counter_at(after, dial, at_ns)


def test_the_counter_never_falls_over_days() -> None:
    """The counter ascends at odd instants over many loops of the real recording."""
    dial = Dial()
    sensor = ReplaySensor(read_trace(DATA / "h200_vllm_llama8b_eager.json.gz"), dial)
    values = [counter_at(sensor, dial, NOON_NS + i * 17_777_777_777) for i in range(500)]
    assert all(a < b for a, b in pairwise(values))


def test_one_loop_draws_what_the_recording_drew() -> None:
    """Over one loop the counter gains the recorded difference, to the millijoule when read at its beginning."""
    trace = read_trace(DATA / "h200_metrology.json.gz")
    (anchors,) = trace.anchors
    length_ns = anchors[-1].before_ns - anchors[0].before_ns
    dial = Dial()
    start_ns = NOON_NS // STEP_NS * STEP_NS
    sensor = ReplaySensor(trace, dial, start_ns=start_ns)
    assert counter_at(sensor, dial, start_ns) == 0
    gained = counter_at(sensor, dial, start_ns + length_ns + STEP_NS) - counter_at(sensor, dial, start_ns + STEP_NS)
    # the loop is no multiple of 100 ms: a step may show up to 100 ms at the highest recorded power (< 1 kW) less
    assert abs(gained - (anchors[-1].counter_mj - anchors[0].counter_mj)) <= 100_000


def test_samples_are_the_ring_first_and_then_only_new_ones() -> None:
    """The first reading gives 2.4 s of samples, the next ones what ended since: each once, ascending."""
    dial = Dial()
    sensor = ReplaySensor(read_trace(DATA / "h200_vllm_llama8b_eager.json.gz"), dial)
    stamps: list[int] = []
    for i in range(400):  # more than two loops of 172 s
        at_ns = NOON_NS + i * NS_PER_S
        samples = read_at(sensor, dial, at_ns).samples
        assert samples is not None
        assert not [t for t in samples.end_ns if t > at_ns]
        stamps += samples.end_ns
        if i == 0:
            assert NOON_NS - RING_NS < samples.end_ns[0] < NOON_NS - RING_NS + 100 * NS_PER_MS
    assert sorted(set(stamps)) == stamps
    assert max(b - a for a, b in pairwise(stamps)) < 100 * NS_PER_MS  # no hole where the loop closes


def test_a_reader_that_slept_gets_the_ring_only() -> None:
    """After a minute without reading, samples older than 2.4 s are gone, as in the driver."""
    dial = Dial()
    sensor = ReplaySensor(read_trace(DATA / "h200_vllm_llama8b_eager.json.gz"), dial)
    read_at(sensor, dial, NOON_NS)
    samples = read_at(sensor, dial, NOON_NS + 60 * NS_PER_S).samples
    assert samples is not None
    assert samples.end_ns[0] > NOON_NS + 60 * NS_PER_S - RING_NS


def test_samples_agree_with_the_counter_beside_them() -> None:
    """Within ten seconds of a changing load the samples' integral is the counter's difference within 2 %."""
    dial = Dial()
    sensor = ReplaySensor(read_trace(DATA / "h200_vllm_llama8b_eager.json.gz"), dial, start_ns=NOON_NS)
    for begin_s in (10, 40, 90, 120):
        start = counter_at(sensor, dial, NOON_NS + begin_s * NS_PER_S)
        stamps, powers = [NOON_NS + begin_s * NS_PER_S], [0]
        for i in range(1, 11):
            samples = read_at(sensor, dial, NOON_NS + (begin_s + i) * NS_PER_S).samples
            assert samples is not None
            stamps += samples.end_ns
            powers += samples.power_mw
        gained_mj = counter_at(sensor, dial, NOON_NS + (begin_s + 10) * NS_PER_S) - start
        shaped_mj = sum(p * (b - a) for (a, b), p in zip(pairwise(stamps), powers[1:], strict=True)) / NS_PER_S
        assert abs(shaped_mj / gained_mj - 1) < 0.02


def test_a_step_of_load_is_where_the_samples_say() -> None:
    """Between anchors the counter follows the samples: 0 W in the first half second, everything in the second."""
    samples = Samples((7 * NS_PER_S + NS_PER_S // 2, 8 * NS_PER_S), (0, 600))
    dial = Dial()
    sensor = ReplaySensor(small(0, 1000, samples=samples), dial, start_ns=NOON_NS)
    at = [counter_at(sensor, dial, NOON_NS + ms * NS_PER_MS) for ms in (300, 500, 700, 900)]
    assert at == [0, 0, 400, 800]


def test_a_counter_that_moved_under_zero_samples_is_spread_evenly() -> None:
    """Samples of 0 W cannot shape energy that the counter saw: it is spread over the interval, none is lost."""
    dial = Dial()
    sensor = ReplaySensor(small(0, 1000, samples=Samples((8 * NS_PER_S,), (0,))), dial, start_ns=NOON_NS)
    assert [counter_at(sensor, dial, NOON_NS + ms * NS_PER_MS) for ms in (500, 1000)] == [500, 1000]


def test_a_recording_without_samples_replays_the_counter_alone() -> None:
    """Samples that were never recorded are missing, not an empty batch."""
    dial = Dial()
    assert read_at(ReplaySensor(small(0, 1000), dial), dial, NOON_NS).samples is None


def test_before_its_start_the_replay_stands_at_zero() -> None:
    """A start in the future gives a counter of 0 and no samples."""
    dial = Dial()
    sensor = ReplaySensor(
        small(0, 1000, samples=Samples((8 * NS_PER_S,), (5,))), dial, start_ns=NOON_NS + 10 * NS_PER_S
    )
    reading = read_at(sensor, dial, NOON_NS)
    assert (Samples((), ()), Counter(NOON_NS, NOON_NS, 0)) == (reading.samples, reading.counter)


def test_one_recording_plays_as_several_gpus_shifted_in_phase() -> None:
    """Four GPUs of one loop of 4 s: at each instant each is a quarter of a loop further."""
    dial = Dial()
    sensor = ReplaySensor(small(0, 1000, 3000, 6000, 10000), dial, start_ns=NOON_NS, count=4)
    dial.at_ns = NOON_NS
    counters = [sensor.read(gpu).counter for gpu in sensor.gpus()]
    assert [c.counter_mj for c in counters if c] == [0, 1000, 3000, 6000]
    assert ([gpu.index for gpu in sensor.gpus()], len({gpu.uuid for gpu in sensor.gpus()})) == ([0, 1, 2, 3], 4)


def test_it_says_that_it_is_a_replay() -> None:
    """Source and name mark every joule as recorded; processes are unknown."""
    sensor = ReplaySensor(small(0, 1000), Clock.start())
    (gpu,) = sensor.gpus()
    assert (gpu.source, gpu.name) == (Source.RECORDING, "replay of H200")
    assert sensor.compute_pids(gpu) is None
    sensor.close()


def test_another_recording_or_origin_is_another_gpu() -> None:
    """Counters that have nothing to do with each other never share a UUID: no joule is booked between them."""
    one = ReplaySensor(small(0, 1000), Dial(), start_ns=NOON_NS)
    other = ReplaySensor(small(0, 1001), Dial(), start_ns=NOON_NS)
    later = ReplaySensor(small(0, 1000), Dial(), start_ns=NOON_NS + 1)
    assert len({s.gpus()[0].uuid for s in (one, other, later)}) == 3


def test_a_recording_with_a_reset_cannot_loop() -> None:
    """A falling counter is refused with the reason."""
    with pytest.raises(TraceError, match="counter falls"):
        ReplaySensor(small(10, 5), Dial())


def test_zero_gpus_are_refused() -> None:
    """The number of GPUs must be at least 1."""
    with pytest.raises(UsageError, match="at least 1"):
        ReplaySensor(small(0, 1), Dial(), count=0)
