"""The meter: what comes out is what the counter said, whatever the readings looked like.

Worked examples use a step of 100 ms, so an anchor lies 50 ms before the middle of its read; `read_at(t)` makes a reading
whose anchor lies at `t` exactly.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from energyd.daemon.errors import EndOfTrace
from energyd.daemon.meter import Anchor, Meter, Resume
from energyd.daemon.records import Counter, Reading, Samples, Slice, Source, Window, WindowKind
from energyd.daemon.sensors.recording import RecordingSensor
from energyd.daemon.trace import read_trace

DATA = Path(__file__).parents[1] / "data"
MS = 1_000_000
S = 1_000_000_000
LAW = settings(deadline=None, derandomize=True, max_examples=200)
"""No timing decides, and the same code passes or fails every time."""


def read_at(at_ns: int, counter_mj: int | None, *samples: tuple[int, int]) -> Reading:
    """A reading whose anchor lies at `at_ns`, with samples (end of the slot in ms, mW)."""
    counter = None if counter_mj is None else Counter(at_ns + 50 * MS, at_ns + 50 * MS, counter_mj)
    taken = Samples(tuple(ms * MS for ms, _ in samples), tuple(mw for _, mw in samples)) if samples else None
    return Reading(taken, counter)


def every_20_ms(from_ms: int, to_ms: int, power_mw: int) -> list[tuple[int, int]]:
    """Samples of constant power for the slots of (from, to]."""
    return [(ms, power_mw) for ms in range(from_ms + 20, to_ms + 1, 20)]


def meter(resume: Resume | None = None) -> Meter:
    """A meter of a recorded GPU."""
    return Meter("gpu", Source.RECORDING, resume)


def one(windows: Sequence[Window]) -> Window:
    """The only window."""
    assert len(windows) == 1
    return windows[0]


def spread(window: Window) -> list[tuple[int, int, int]]:
    """Slices as (start ms, end ms, µJ)."""
    return [(s.start_ns // MS, s.end_ns // MS, s.energy_uj) for s in window.slices]


# -- worked examples --------------------------------------------------------------------------------------------------


def test_the_first_value_is_not_energy() -> None:
    """A GPU that was never seen: its counter holds days of others' energy, of which nothing is booked."""
    assert meter().feed(read_at(S, 987_654_321)) == []


def test_an_anchor_lies_half_a_step_before_the_middle_of_its_read() -> None:
    """Reads that took 20 and 4 ms: the value is that of the last step before, 50 ms ago on average."""
    # read   1000-1020 -> anchor 960        2000-2004 -> anchor 1952
    m = meter()
    m.feed(Reading(None, Counter(1000 * MS, 1020 * MS, 0)))
    w = one(m.feed(Reading(None, Counter(2000 * MS, 2004 * MS, 1))))
    assert (w.start_ns, w.end_ns) == (960 * MS, 1952 * MS)


def test_samples_shape_what_the_counter_says() -> None:
    """The counter says 220 J where the samples sum to 200 J: each slice gets 1.1 times its sample."""
    # ms       1000 ... 1500 ... 2000
    # W            100      300           Σ samples 200 J, counter 220 J
    # J / slice    2.2      6.6
    m = meter()
    m.feed(read_at(S, 5_000))
    w = one(m.feed(read_at(2 * S, 225_000, *every_20_ms(1000, 1500, 100_000), *every_20_ms(1500, 2040, 300_000))))
    assert (w.kind, w.energy_uj, w.start_ns, w.end_ns) == (WindowKind.METERED, 220_000_000, S, 2 * S)
    expected = [(a, a + 20, 2_200_000 if a < 1500 else 6_600_000) for a in range(1000, 2000, 20)]
    assert spread(w) == expected


def test_a_slot_across_the_anchor_belongs_to_both_windows() -> None:
    """A sample that ends 10 ms after an anchor shapes the last 10 ms of one window and the first 10 ms of the next."""
    # ms      1000   1010   1020 | anchor at 1020, a slot from 1010 to 1030, then one to 1050 and the anchor there
    # W          100      200         200 (until 1030)   400
    m = meter()
    m.feed(read_at(1000 * MS, 0))
    first = one(m.feed(read_at(1020 * MS, 3_000, (1010, 100_000), (1030, 200_000))))
    assert spread(first) == [(1000, 1010, 1_000_000), (1010, 1020, 2_000_000)]
    second = one(m.feed(read_at(1050 * MS, 16_000, (1030, 200_000), (1050, 400_000))))
    assert spread(second) == [(1020, 1030, 2_600_000), (1030, 1050, 10_400_000)]


def test_a_hole_gets_what_the_counter_leaves_over() -> None:
    """Half a second without samples: its power is what the counter has beyond the samples around it."""
    # ms      1000 ... 1200 ........ 1700 ... 2000
    # J          20         hole         60          counter 300: the hole held 220
    m = meter()
    m.feed(read_at(S, 0))
    samples = (*every_20_ms(1000, 1200, 100_000), (1700, 900_000), *every_20_ms(1700, 2040, 200_000))
    w = one(m.feed(read_at(2 * S, 300_000, *samples)))
    assert (1200, 1700, 220_000_000) in spread(w)
    assert {e for a, _, e in spread(w) if a < 1200} == {2_000_000}
    assert {e for a, _, e in spread(w) if a >= 1700} == {4_000_000}


def test_a_hole_is_never_negative() -> None:
    """Samples that claim more than the counter leave 0 µJ for the hole, and are scaled down to the counter."""
    m = meter()
    m.feed(read_at(S, 0))
    w = one(m.feed(read_at(2 * S, 10_000, *every_20_ms(1000, 1500, 100_000))))
    assert spread(w)[-1] == (1500, 2000, 0)
    assert sum(e for _, _, e in spread(w)) == 10_000_000


def test_without_samples_a_window_is_one_slice() -> None:
    """Counter alone: the energy is exact, its shape unknown within the window."""
    m = meter()
    m.feed(read_at(S, 0))
    assert spread(one(m.feed(read_at(2 * S, 81_000)))) == [(1000, 2000, 81_000_000)]


def test_samples_of_no_power_shape_by_time() -> None:
    """The counter moved though every sample says 0 W: equal power over the slices."""
    m = meter()
    m.feed(read_at(S, 0))
    assert spread(one(m.feed(read_at(S + 40 * MS, 4_000, (1010, 0), (1040, 0))))) == [
        (1000, 1010, 1_000_000),
        (1010, 1040, 3_000_000),
    ]


def test_a_ring_that_repeats_itself_counts_once() -> None:
    """Samples that were taken before come again with the next reading, out of order too: the shape is the same."""
    once, twice = meter(), meter()
    samples = every_20_ms(1000, 1500, 100_000) + every_20_ms(1500, 2000, 300_000)
    once.feed(read_at(S, 0))
    twice.feed(read_at(S, 0))
    twice.feed(read_at(S, None, *samples[:40]))
    twice.feed(read_at(S, None, *samples[10:30]))
    expected = once.feed(read_at(2 * S, 220_000, *samples))
    assert twice.feed(read_at(2 * S, 220_000, *samples)) == expected
    assert twice.last_power_mw == 300_000


def test_a_reading_without_a_counter_makes_the_window_longer() -> None:
    """A failed counter read: one window of two seconds, nothing missing."""
    m = meter()
    m.feed(read_at(S, 0))
    assert m.feed(read_at(2 * S, None, *every_20_ms(1000, 2000, 50_000))) == []
    w = one(m.feed(read_at(3 * S, 100_000, *every_20_ms(2000, 3000, 50_000))))
    assert (w.start_ns, w.end_ns, w.energy_uj, len(w.slices)) == (S, 3 * S, 100_000_000, 100)


def test_a_still_counter_is_waited_for() -> None:
    """An unchanged value within 5 s is a stuck read: no window; when it moves, one window holds the whole time."""
    m = meter()
    m.feed(read_at(S, 7))
    assert m.feed(read_at(2 * S, 7)) == m.feed(read_at(5 * S, 7)) == []
    w = one(m.feed(read_at(6 * S + 500 * MS, 9)))
    assert (w.start_ns, w.energy_uj) == (S, 2_000)


def test_a_counter_that_stays_still_is_believed() -> None:
    """After 5 s without a step the window is closed with 0 µJ, which is a reading and not a gap."""
    m = meter()
    m.feed(read_at(S, 7))
    w = one(m.feed(read_at(6 * S, 7)))
    assert (w.kind, w.energy_uj, w.u_uj) == (WindowKind.METERED, 0, 0)


def test_a_restart_within_a_boot_is_an_outage() -> None:
    """The daemon was away for an hour: its energy is one window without shape, the next number of the same epoch."""
    m = meter(Resume(Anchor(10 * S, 1_000), epoch=2, next_seq=17, same_boot=True))
    w = one(m.feed(read_at(3610 * S, 401_000, *every_20_ms(3_608_000, 3_610_000, 90_000))))
    assert (w.kind, w.epoch, w.seq, w.energy_uj, w.slices) == (WindowKind.OUTAGE, 2, 17, 400_000_000, ())
    assert (w.start_ns, w.end_ns) == (10 * S, 3610 * S)
    assert one(m.feed(read_at(3611 * S, 402_000))).kind is WindowKind.METERED


def test_a_restart_before_the_next_step_closes_the_outage_at_once() -> None:
    """The counter did not move meanwhile: an outage of 0 µJ, and what follows has a shape again."""
    m = meter(Resume(Anchor(10 * S, 1_000), epoch=0, next_seq=3, same_boot=True))
    w = one(m.feed(read_at(10 * S + 60 * MS, 1_000)))
    assert (w.kind, w.energy_uj) == (WindowKind.OUTAGE, 0)
    assert one(m.feed(read_at(11 * S, 2_000))).kind is WindowKind.METERED


def test_another_boot_is_a_reset_even_if_the_value_is_larger() -> None:
    """The counter began at 0 with the driver: a value beyond the old one is no continuation of it."""
    m = meter(Resume(Anchor(10 * S, 1_000), epoch=2, next_seq=17, same_boot=False))
    gap, reset = m.feed(read_at(3610 * S, 5_000))
    assert (gap.kind, gap.epoch, gap.seq, gap.energy_uj) == (WindowKind.GAP, 2, 17, None)
    assert (gap.counter_start_mj, gap.counter_end_mj) == (1_000, 1_000)
    assert (reset.kind, reset.epoch, reset.seq, reset.energy_uj) == (WindowKind.RESET, 3, 0, 5_000_000)
    following = one(m.feed(read_at(3611 * S, 5_100)))
    assert (following.kind, following.epoch, following.seq, following.energy_uj) == (WindowKind.METERED, 3, 1, 100_000)


def test_a_falling_counter_is_a_reset() -> None:
    """The driver was reloaded between two polls: the old epoch ends unknown, the first new value is booked."""
    m = meter()
    m.feed(read_at(S, 1_000))
    m.feed(read_at(2 * S, 1_200))
    gap, reset = m.feed(read_at(3 * S, 30))
    assert (gap.epoch, gap.seq, gap.energy_uj, gap.start_ns, gap.end_ns) == (0, 1, None, 2 * S, 3 * S)
    assert (reset.epoch, reset.seq, reset.energy_uj, reset.counter_start_mj) == (1, 0, 30_000, 0)


def test_a_lost_gpu_comes_back_as_an_outage() -> None:
    """Off the bus for a while with its counter running on: nothing is lost, and samples from before shape nothing."""
    m = meter()
    m.feed(read_at(S, 0))
    m.feed(read_at(S, None, *every_20_ms(1000, 1500, 700_000)))
    m.lost()
    m.lost()
    w = one(m.feed(read_at(61 * S, 5_000)))
    assert (w.kind, w.energy_uj, w.slices) == (WindowKind.OUTAGE, 5_000_000, ())


def test_a_gpu_lost_before_its_first_reading_has_no_outage() -> None:
    """What follows the first reading is metered: nothing was missed between it and the next."""
    m = meter()
    m.lost()
    m.feed(read_at(S, 0))
    w = one(m.feed(read_at(2 * S, 100_000, *every_20_ms(1000, 2000, 100_000))))
    assert (w.kind, len(w.slices)) == (WindowKind.METERED, 50)


def test_a_lost_gpu_whose_counter_fell_is_a_reset() -> None:
    """The same with a smaller value: gap and reset, once."""
    m = meter()
    m.feed(read_at(S, 1_000))
    m.lost()
    assert [w.kind for w in m.feed(read_at(61 * S, 5))] == [WindowKind.GAP, WindowKind.RESET]
    assert one(m.feed(read_at(62 * S, 6))).kind is WindowKind.METERED


def test_the_uncertainty_is_that_of_two_anchors() -> None:
    """At steady 350 W either end lies within a step of 100 ms: 350 W × 100 ms/√12 × √2 = 14.29 J."""
    m = meter()
    m.feed(read_at(S, 0))
    w = one(m.feed(read_at(2 * S, 350_000, *every_20_ms(1000, 2040, 350_000))))
    assert w.u_uj == pytest.approx(35_000_000 / math.sqrt(12) * math.sqrt(2), rel=1e-5)
    assert w.u_uj == pytest.approx(14_288_690, rel=1e-5)


def test_the_uncertainty_looks_at_the_ends_only() -> None:
    """A burst in the middle of a window leaves the anchors in quiet: 100 W at both ends give 4.08 J."""
    m = meter()
    m.feed(read_at(S, 0))
    samples = (*every_20_ms(1000, 1400, 100_000), *every_20_ms(1400, 1600, 700_000), *every_20_ms(1600, 2040, 100_000))
    assert one(m.feed(read_at(2 * S, 220_000, *samples))).u_uj == pytest.approx(4_082_483, rel=1e-4)


def test_a_clock_that_went_back_over_a_reboot_makes_no_absurd_window() -> None:
    """The anchor would lie before the last one: the window is 1 ns long, and its uncertainty is its energy at most."""
    m = meter(Resume(Anchor(100 * S, 1_000), epoch=0, next_seq=5, same_boot=True))
    w = one(m.feed(read_at(50 * S, 4_000_000_000_000)))
    assert (w.start_ns, w.end_ns) == (100 * S, 100 * S + 1)
    assert 0 <= w.u_uj <= (w.energy_uj or 0)


def test_a_dead_counter_does_not_eat_the_memory() -> None:
    """Samples without a counter are kept for ten minutes (30,000 of them), then the oldest go; the energy stays exact."""
    m = meter()
    m.feed(read_at(0, 0))
    for second in range(700):
        m.feed(read_at(0, None, *every_20_ms(1000 * second, 1000 * (second + 1), 100_000)))
    assert len(m._samples) == 30_000
    w = one(m.feed(read_at(700 * S, 70_000_000)))
    assert sum(s.energy_uj for s in w.slices) == w.energy_uj == 70_000_000_000
    assert spread(w)[0] == (0, 100_020, 10_002_000_000)


# -- laws -------------------------------------------------------------------------------------------------------------


@dataclass
class World:
    """A GPU's counter and clock, what the meter was fed and what came out."""

    now_ns: int = 10 * S
    counter_mj: int = 500
    meter: Meter = field(default_factory=meter)
    windows: list[Window] = field(default_factory=list)
    fed: list[int] = field(default_factory=list)
    """Counter values of the epoch that runs, from its first (0 for an epoch that began with a reset)."""
    epochs: list[int] = field(default_factory=list)
    """mJ of each finished epoch, by the values fed."""
    boot: int = 0
    boots: dict[int, int] = field(default_factory=dict)
    """The boot in which each epoch began, as the ledger knows it."""
    unread: bool = False
    """A reboot that no reading has followed yet."""

    def read(self, cost_ns: int, samples: Samples | None) -> None:
        """Feed a reading of the counter as it is now."""
        if self.fed and self.counter_mj < self.fed[-1]:
            self.end_epoch()
        self.fed.append(self.counter_mj)
        counter = Counter(self.now_ns, self.now_ns + cost_ns, self.counter_mj)
        for window in self.meter.feed(Reading(samples, counter)):
            self.windows.append(window)
            self.boots.setdefault(window.epoch, self.boot)
        self.now_ns += cost_ns
        self.unread = False

    def end_epoch(self) -> None:
        """The driver restarted the counter at 0."""
        self.epochs.append(self.fed[-1] - self.fed[0])
        self.fed = [0]

    def restart(self, *, reboot: bool) -> None:
        """Kill the daemon, or the host, and start from the windows that it had stored."""
        self.boot += reboot
        if not self.windows:
            self.meter, self.fed = meter(), []
            return
        last = self.windows[-1]
        anchor = Anchor(last.end_ns, last.counter_end_mj)
        same_boot = self.boots[last.epoch] == self.boot
        self.meter = meter(Resume(anchor, last.epoch, last.seq + 1, same_boot))
        if not same_boot and not self.unread:
            self.unread = True
            self.fed = [*self.fed[:1], last.counter_end_mj]  # what was read and not stored died with the boot
            self.end_epoch()


POWERS = st.integers(0, 1_200_000)
SAMPLES = st.none() | st.lists(st.tuples(st.integers(-3_000, 5), POWERS), max_size=12)
"""Stamps in ms before now, in any order, repeated, a little ahead: what drivers give."""
EVENTS = st.one_of(
    st.tuples(
        st.just("read"),
        st.one_of(st.integers(0, 2 * MS), st.integers(0, 8 * S)),
        st.one_of(st.just(0), st.integers(0, 3_000_000)),
        st.integers(0, 20 * MS),
        SAMPLES,
    ),
    st.tuples(st.just("no counter"), st.integers(0, 2 * S), st.integers(0, 1_000), SAMPLES),
    st.tuples(st.just("lost"), st.integers(0, 60 * S), st.integers(0, 100_000)),
    st.tuples(st.just("reset"), st.integers(0, 60 * S), st.integers(0, 3_000)),
    st.tuples(st.just("restart"), st.integers(0, 3600 * S), st.integers(0, 10**6)),
    st.tuples(st.just("reboot"), st.integers(0, 3600 * S), st.integers(0, 10**6)),
)


def lived(events: Sequence[tuple[object, ...]]) -> World:
    """Let a meter live through the events, and read once more 10 s later with a counter that moved."""
    w = World()
    for name, passed_ns, *rest in events:
        w.now_ns += int(str(passed_ns))
        amount = int(str(rest[0]))
        if name == "read":
            w.counter_mj += amount
            w.read(int(str(rest[1])), samples_of(w.now_ns, rest[2]))
        elif name == "no counter":
            w.counter_mj += amount
            w.windows += w.meter.feed(Reading(samples_of(w.now_ns, rest[1]), None))
        elif name == "lost":
            w.counter_mj += amount
            w.meter.lost()
        elif name == "reset":
            w.counter_mj = amount
            w.meter.lost()
        else:
            w.counter_mj = amount if name == "reboot" else w.counter_mj + amount
            w.restart(reboot=name == "reboot")
    w.now_ns += 10 * S
    w.counter_mj += 1
    w.read(MS, None)
    w.epochs.append(w.fed[-1] - w.fed[0])
    return w


def samples_of(now_ns: int, drawn: object) -> Samples | None:
    """Samples from the drawn (ms before now, mW) pairs, None as None."""
    if not isinstance(drawn, list):
        return None
    return Samples(tuple(now_ns + ms * MS for ms, _ in drawn), tuple(mw for _, mw in drawn))


@LAW
@given(st.lists(EVENTS, max_size=25))
def test_windows_sum_to_the_counter_in_every_epoch(events: list[tuple[object, ...]]) -> None:
    """Missing counters, jitter, repeats, lost GPUs, resets, restarts, reboots: each epoch sums to its counter."""
    w = lived(events)
    sums = dict.fromkeys(range(len(w.epochs)), 0)
    for window in w.windows:
        sums[window.epoch] += window.energy_uj or 0
    assert list(sums.values()) == [1_000 * mj for mj in w.epochs]


@LAW
@given(st.lists(EVENTS, max_size=25))
def test_windows_form_one_unbroken_chain(events: list[tuple[object, ...]]) -> None:
    """Numbers without a gap, each beginning where the last ended in time and counter; none empty, none negative."""
    for before, after in pairwise(lived(events).windows):
        if after.epoch == before.epoch:
            assert after.seq == before.seq + 1
            assert after.start_ns == before.end_ns
            assert after.counter_start_mj == before.counter_end_mj
        else:
            assert (before.kind, after.kind) == (WindowKind.GAP, WindowKind.RESET)
            assert (after.epoch, after.seq, after.counter_start_mj) == (before.epoch + 1, 0, 0)
            assert (after.start_ns, after.end_ns) == (before.start_ns, before.end_ns)


@LAW
@given(st.lists(EVENTS, max_size=25))
def test_every_window_is_sound(events: list[tuple[object, ...]]) -> None:
    """Length > 0, energy ≥ 0 or unknown for a gap, slices contiguous and exact for a metered one, absent for others."""
    for w in lived(events).windows:
        assert w.end_ns > w.start_ns
        assert (w.energy_uj is None) == (w.kind is WindowKind.GAP)
        assert 0 <= w.u_uj <= (w.energy_uj or 0)
        if w.kind is not WindowKind.METERED:
            assert w.slices == ()
            continue
        assert w.energy_uj == (w.counter_end_mj - w.counter_start_mj) * 1_000 == sum(s.energy_uj for s in w.slices)
        assert (w.slices[0].start_ns, w.slices[-1].end_ns) == (w.start_ns, w.end_ns)
        assert all(a.end_ns == b.start_ns for a, b in pairwise(w.slices))
        assert all(s.end_ns > s.start_ns and s.energy_uj >= 0 for s in w.slices)


# -- the recorded H200 ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded() -> tuple[list[Window], list[tuple[int, int]]]:
    """Windows of the H200 recording, and its raw samples as (end ns, mW)."""
    trace = read_trace(DATA / "h200_vllm_llama8b_eager.json.gz")
    sensor = RecordingSensor(trace)
    m, windows = Meter(trace.gpus[0].uuid, Source.RECORDING), []
    while True:
        try:
            windows += m.feed(sensor.read(trace.gpus[0]))
        except EndOfTrace:
            return windows, list(zip(trace.samples[0].end_ns, trace.samples[0].power_mw, strict=True))


Recorded = tuple[list[Window], list[tuple[int, int]]]


def test_the_recording_sums_to_its_counter(recorded: Recorded) -> None:
    """75,098,717 − 12,917,671 mJ: 62,181,046,000 µJ in 172 windows of about a second, all metered."""
    windows, _ = recorded
    assert sum(w.energy_uj or 0 for w in windows) == 62_181_046_000
    assert len(windows) == 172
    assert {w.kind for w in windows} == {WindowKind.METERED}
    assert all(0.9 * S < w.end_ns - w.start_ns < 1.1 * S for w in windows)


def test_the_recorded_shape_follows_the_raw_samples(recorded: Recorded) -> None:
    """In every span of 10 s the slices hold what the raw samples integrate to, within 2 %, and cover it without a hole."""
    windows, samples = recorded
    slices = [s for w in windows for s in w.slices]
    raw = [Slice(a, b, (b - a) * mw // 1_000_000) for (a, _), (b, mw) in pairwise(samples)]
    for start_ns in range(windows[0].start_ns, windows[-1].end_ns - 10 * S, 10 * S):
        shaped = sum(s.energy_uj for s in slices if start_ns <= s.start_ns < start_ns + 10 * S)
        measured = sum(s.energy_uj for s in raw if start_ns <= s.start_ns < start_ns + 10 * S)
        assert shaped == pytest.approx(measured, rel=0.02)
    assert max(s.end_ns - s.start_ns for s in slices) < 60 * MS
