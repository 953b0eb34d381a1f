"""The readings behind `energyd doctor`: what is found in a GPU whose behaviour is known."""

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import pytest

from energyd.daemon.clock import Clock
from energyd.daemon.doctor import GpuFacts, HostFacts, examine
from energyd.daemon.errors import EndOfTrace, LostGpu, RetryReading
from energyd.daemon.probe import (
    CostClock,
    Edge,
    device_nodes,
    edges,
    grid,
    probe_gpu,
    probe_host,
    ratio,
    running_daemon,
)
from energyd.daemon.records import Counter, Gpu, Reading, Samples, Source
from energyd.daemon.sensors.nvml import NvmlSensor
from energyd.daemon.sensors.replay import ReplaySensor
from energyd.daemon.trace import read_trace
from energyd.daemon.units import NS_PER_MS, NS_PER_S

TRACE = Path(__file__).parent.parent / "data" / "h200_vllm_llama8b_eager.json.gz"
START_NS = 1_800_000_000 * NS_PER_S
SLOT_NS = 20 * NS_PER_MS
GPU = Gpu("GPU-1", 0, "NVIDIA H200", "580", Source.NVML_COUNTER, 700_000)


class Says(Protocol):
    """The control of the emulated driver (see conftest)."""

    def say(self, *lines: str) -> None: ...


@dataclass
class Virtual:
    """Time that passes only by sleeping and by what calls cost; CPU time is half of what has passed in calls."""

    at_ns: int = START_NS
    cpu_ns: int = 0
    told: dict[int, int] = field(default_factory=dict)

    def now_ns(self) -> int:
        self.told[self.at_ns] = self.cpu_ns
        return self.at_ns

    def cpu_at_ns(self, told_ns: int) -> int | None:
        return self.told.get(told_ns)

    def forget(self) -> None:
        self.told.clear()

    def sleep(self, duration_s: float) -> None:
        self.at_ns += round(duration_s * NS_PER_S)

    def work(self, duration_ns: int) -> None:
        self.at_ns += duration_ns
        self.cpu_ns += duration_ns // 2


@dataclass
class Physics:
    """An H200 in virtual time: constant `power_mw`, a counter with steps, a ring of samples, calls that take time."""

    clock: Virtual
    power_mw: int = 300_000
    step_ns: int = 100 * NS_PER_MS
    phase_ns: int = 37 * NS_PER_MS
    counter_ns: int = 4 * NS_PER_MS
    samples_ns: int = 600_000
    covered: float = 1.0
    ring: int = 119
    given_ns: int = 0
    breaks: Callable[[int], None] = lambda _: None

    def gpus(self) -> tuple[Gpu, ...]:
        return (GPU,)

    def read(self, gpu: Gpu) -> Reading:
        self.breaks(self.clock.at_ns - START_NS)
        self.clock.work(self.samples_ns)
        now_ns = self.clock.now_ns()
        newest = now_ns // SLOT_NS
        ends = [n * SLOT_NS for n in range(newest - self.ring + 1, newest + 1) if n * SLOT_NS > self.given_ns]
        self.given_ns = newest * SLOT_NS
        seen_mw = round(self.power_mw * self.covered)
        samples = Samples(tuple(ends), (seen_mw,) * len(ends)) if self.ring else None
        before_ns = now_ns
        self.clock.work(self.counter_ns // 2)
        stood_ns = (self.clock.at_ns - self.phase_ns) // self.step_ns * self.step_ns + self.phase_ns
        self.clock.work(self.counter_ns - self.counter_ns // 2)
        counter_mj = self.power_mw * (stood_ns - START_NS + NS_PER_S) // NS_PER_S
        return Reading(samples, Counter(before_ns, self.clock.now_ns(), counter_mj))

    def compute_pids(self, gpu: Gpu) -> frozenset[int] | None:
        return frozenset({1, 2})

    def close(self) -> None:
        """Nothing to close."""


def looked_at(physics: Physics, probe_s: int = 6) -> GpuFacts:
    """What a probe of `probe_s` finds."""
    return probe_gpu(physics, physics.clock, GPU, probe_s * NS_PER_S, physics.clock.sleep)


def test_the_grid_of_the_counter_is_found() -> None:
    """Period and phase of the counter's steps come out to about the distance of two reads, though each read takes 5 ms."""
    steps = looked_at(Physics(Virtual())).steps
    assert steps is not None
    assert abs(steps.period_ns - 100 * NS_PER_MS) < NS_PER_MS
    assert abs(steps.phase_ns - 37 * NS_PER_MS) < 5 * NS_PER_MS


def test_each_part_of_a_poll_is_priced_from_outside() -> None:
    """Duration and CPU time of the counter read and of the samples are told apart by the sensor's looks at the clock."""
    found = looked_at(Physics(Virtual()))
    assert found.counter_cost is not None
    assert found.samples_cost is not None
    assert (found.counter_cost.wall_ns, found.counter_cost.cpu_ns) == (4 * NS_PER_MS, 2 * NS_PER_MS)
    assert (found.samples_cost.wall_ns, found.samples_cost.cpu_ns) == (600_000, 300_000)
    assert found.core_share == pytest.approx(0.0023)


def test_ring_and_cadence_are_found() -> None:
    """The first reading shows how far back the driver's samples go; their distance and age come from all."""
    ring = looked_at(Physics(Virtual())).ring
    assert ring is not None
    assert (ring.length, ring.span_ns, ring.gap_ns, ring.widest_gap_ns) == (119, 119 * SLOT_NS, SLOT_NS, SLOT_NS)
    assert ring.age_ns is not None
    assert 0 <= ring.age_ns < SLOT_NS


@pytest.mark.parametrize("covered", [1.0, 0.25, 1.4])
def test_samples_are_compared_with_the_counter_between_edges(covered: float) -> None:
    """Samples that cover a part of the time show as that part, to about 0.2 % in 6 s, and within the stated u."""
    found = looked_at(Physics(Virtual(), covered=covered)).ratio
    assert found is not None
    assert found.samples_to_counter == pytest.approx(covered, rel=0.002)
    assert abs(found.samples_to_counter / covered - 1) < 4 * found.u


def test_power_floor_and_processes_are_told() -> None:
    """Mean power comes from the counter, the floor from the samples, processes from the driver."""
    found = looked_at(Physics(Virtual()))
    assert found.mean_power_mw == pytest.approx(300_000, rel=0.02)
    assert (found.floor_mw, found.processes, found.persistence) == (300_000, 2, None)
    assert found.method == "counter, shaped by samples"


def test_a_gpu_without_samples_is_metered_by_its_counter() -> None:
    """No samples: no ring, no ratio and no price for them, and the method says so."""
    found = looked_at(Physics(Virtual(), ring=0))
    assert (found.ring, found.ratio, found.samples_cost, found.method) == (None, None, None, "counter alone")
    assert found.steps is not None


def test_a_ring_that_wraps_between_polls_leaves_a_hole() -> None:
    """A ring of 0.4 s polled once a second: its span and the hole are both seen."""
    ring = looked_at(Physics(Virtual(), ring=20)).ring
    assert ring is not None
    assert ring.span_ns == 20 * SLOT_NS
    assert ring.widest_gap_ns == pytest.approx(600 * NS_PER_MS, abs=40 * NS_PER_MS)


def test_failed_readings_are_facts() -> None:
    """A reading that fails is counted with its words; the probe goes on."""

    def busy(at_ns: int) -> None:
        if at_ns < 200 * NS_PER_MS:
            raise RetryReading("busy")

    found = looked_at(Physics(Virtual(), breaks=busy))
    assert (found.failed > 10, found.trouble, found.lost) == (True, "busy", False)
    assert found.steps is not None


def test_a_gpu_that_goes_away_ends_its_probe() -> None:
    """A lost GPU is a fact, its probe ends there, and what was read before is kept."""

    def gone(at_ns: int) -> None:
        if at_ns > NS_PER_S:
            raise LostGpu("fell off the bus")

    physics = Physics(Virtual(), breaks=gone)
    found = looked_at(physics)
    assert (found.lost, found.trouble, found.processes) == (True, "fell off the bus", None)
    assert found.counters > 100
    assert physics.clock.at_ns < START_NS + 2 * NS_PER_S


def test_a_gpu_of_which_nothing_was_read_is_described() -> None:
    """When no reading succeeds there are no figures, and no error."""

    def broken(_: int) -> None:
        raise RetryReading("no")

    found = looked_at(Physics(Virtual(), breaks=broken))
    assert (found.counters, found.counter_gain_mj, found.mean_power_mw, found.steps) == (0, None, None, None)
    assert found.method == "none: no energy counter answers"


def test_an_ended_recording_ends_the_probe() -> None:
    """A sensor that has no further reading is no failure."""

    def over(_: int) -> None:
        raise EndOfTrace("over")

    assert looked_at(Physics(Virtual(), breaks=over)).failed == 0


def test_a_fallen_counter_gives_no_power() -> None:
    """A counter that falls is said so; no mean power and no ratio are made of it."""
    physics = Physics(Virtual())
    plain = physics.read

    def reset(gpu: Gpu) -> Reading:
        reading = plain(gpu)
        assert reading.counter is not None
        fallen = reading.counter.counter_mj if physics.clock.at_ns < START_NS + 3 * NS_PER_S else 5
        return Reading(reading.samples, Counter(reading.counter.before_ns, reading.counter.after_ns, fallen))

    physics.read = reset  # type: ignore[method-assign]
    found = looked_at(physics)
    assert (found.counter_fell, found.mean_power_mw, found.ratio) == (True, None, None)


def test_the_real_h200_looks_well() -> None:
    """The recorded H200 in virtual time: grid of 100 ms, samples of 20 ms that add up to the counter within 3 %."""
    clock = Virtual()
    sensor = ReplaySensor(read_trace(TRACE), clock)
    gpu = sensor.gpus()[0]
    found = probe_gpu(sensor, clock, gpu, 10 * NS_PER_S, clock.sleep)
    assert found.steps is not None
    assert found.ring is not None
    assert found.ratio is not None
    assert abs(found.steps.period_ns - 100 * NS_PER_MS) < NS_PER_MS
    assert found.ring.gap_ns == pytest.approx(SLOT_NS, rel=0.01)
    assert found.ratio.samples_to_counter == pytest.approx(1, abs=0.03)


def test_a_changing_load_is_no_finding() -> None:
    """At 12 places of the recorded serving, load steps at either end of a short probe accuse no sensor of gaps."""
    trace = read_trace(TRACE)
    for place in range(12):
        clock = Virtual(START_NS + place * 14 * NS_PER_S)
        sensor = ReplaySensor(trace, clock)
        found = probe_gpu(sensor, clock, sensor.gpus()[0], 3 * NS_PER_S, clock.sleep)
        host = HostFacts((), 0, None, (found,))
        assert [f.what for f in examine(host) if "add up" in f.what] == [], place


def test_missed_steps_do_not_stretch_the_grid() -> None:
    """Edges that a slow poll missed are counted: the period stays, whatever is missing."""
    rng = random.Random(7)
    kept = [n for n in range(30) if n % 3 or n == 0]
    seen = [Edge(START_NS + n * 100_000_000 + rng.randint(-2_000_000, 2_000_000), 5_000_000, n) for n in kept]
    found = grid(seen)
    assert found is not None
    assert abs(found.period_ns - 100 * NS_PER_MS) < NS_PER_MS
    assert found.seen == len(kept)


def test_irregular_or_few_edges_are_no_grid() -> None:
    """Without regular steps no grid is claimed."""
    rng = random.Random(3)
    at = sorted(rng.sample(range(10**9), 12))
    assert grid([Edge(START_NS + t, 1, i) for i, t in enumerate(at)]) is None
    assert grid([Edge(START_NS + i * 10**8, 1, i) for i in range(3)]) is None


def test_an_edge_lies_between_two_reads() -> None:
    """The counter moved between the middles of the reads around its change; a standing or falling one has no edge."""
    reads = [Counter(0, 10, 5), Counter(20, 30, 5), Counter(40, 50, 8), Counter(60, 70, 2)]
    assert edges(reads) == [Edge(35, 20, 8)]


def test_no_ratio_without_samples_about_both_edges() -> None:
    """Samples that begin after the first edge, or a counter that gained nothing, make no ratio."""
    a, b = Edge(100, 1, 10), Edge(200, 1, 20)
    assert ratio(a, b, []) is None
    assert ratio(a, b, [(150, 5)]) is None
    assert ratio(a, Edge(200, 1, 10), [(50, 5)]) is None


def test_a_clock_prices_what_lies_between_two_looks() -> None:
    """The CPU time at each instant told is remembered until it is forgotten."""
    clock = CostClock(Clock.start().offset_ns)
    a = clock.now_ns()
    b = clock.now_ns()
    before, after = clock.cpu_at_ns(a), clock.cpu_at_ns(b)
    assert before is not None
    assert after is not None
    assert before <= after
    clock.forget()
    assert clock.cpu_at_ns(a) is None


def test_device_nodes_and_whether_they_may_be_used(tmp_path: Path) -> None:
    """The driver's nodes are listed in the order of the GPUs; others of its files are not GPUs; none without a driver."""
    assert device_nodes(tmp_path) == ()
    for name in ("nvidiactl", "nvidia0", "nvidia10", "nvidia2", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert [Path(n.path).name for n in device_nodes(tmp_path)] == ["nvidiactl", "nvidia0", "nvidia2", "nvidia10"]
    assert all(n.usable for n in device_nodes(tmp_path))


def test_no_daemon_is_no_failure(tmp_path: Path) -> None:
    """Where no daemon answers there is none, whatever the path."""
    assert running_daemon(tmp_path / "energyd.db") is None
    assert running_daemon(tmp_path / ("x" * 120) / "energyd.db") is None


def test_a_hung_driver_ends_in_a_finding(tmp_path: Path) -> None:
    """A driver call that does not return does not hang doctor: the GPU is described as hung."""
    release = threading.Event()

    def hang(_: int) -> None:
        release.wait(60)

    physics = Physics(Virtual(), breaks=hang)
    host = probe_host(physics, CostClock(0), per_gpu_s=0.05, db=tmp_path / "e.db", dev=tmp_path, patience_s=0.05)
    release.set()
    assert [(g.hung, g.counters) for g in host.gpus] == [(True, 0)]


def test_the_emulated_driver_is_probed_for_real(nvml: Says, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real pynvml over two emulated GPUs in real time: persistence, ring, grid and ratio of each."""
    monkeypatch.setenv("ENERGYD_FAKE_NVML_GPUS", "2")
    nvml.say("set mig 1 1", "set pid 77 0")
    clock = CostClock(Clock.start().offset_ns)
    sensor = NvmlSensor.open(clock)
    host = probe_host(sensor, clock, per_gpu_s=1.5, db=tmp_path / "e.db", dev=tmp_path)
    sensor.close()
    assert [g.processes for g in host.gpus] == [1, 0]
    assert [g.name.endswith("(MIG)") for g in host.gpus] == [False, True]
    assert [g.persistence for g in host.gpus] == [True, True]
    assert [g.ring.length for g in host.gpus if g.ring] == [119, 119]
    assert [g.floor_mw for g in host.gpus] == [300_000, 350_000]
    assert [f.severity for f in examine(host) if f.severity == "problem"] == []
