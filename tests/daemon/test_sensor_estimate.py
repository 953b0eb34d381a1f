"""The estimate: busy share of the CPUs times a stated power, on a counter that is the kernel's own."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from energyd.daemon.clock import Clock
from energyd.daemon.errors import NoGpuError, RetryReading, UsageError
from energyd.daemon.records import Counter, Samples, Source
from energyd.daemon.sensors.estimate import EstimateSensor
from energyd.daemon.units import NS_PER_S


@dataclass
class Dial:
    """A clock that shows what it is set to."""

    at_ns: int = 0

    def now_ns(self) -> int:
        return self.at_ns


@pytest.fixture
def stat(tmp_path: Path) -> Path:
    """A kernel statistics file of two CPUs."""
    path = tmp_path / "stat"
    busy(path, 0)
    return path


def busy(path: Path, ticks: int) -> None:
    """Write `ticks` busy ticks, spread over the busy fields, and large numbers in all the others."""
    user, nice, system, irq = ticks // 2, ticks // 8, ticks // 8, ticks // 8
    softirq = ticks - user - nice - system - irq
    line = f"{user} {nice} {system} 777777 888888 {irq} {softirq} 999999 {user} {nice}"
    path.write_text(f"cpu  {line}\ncpu0 {line}\ncpu1 0 0 0 0 0 0 0 0 0 0\nintr 5 0\nctxt 1\n")


def test_the_counter_is_power_times_busy_share(stat: Path) -> None:
    """Two CPUs, 100 ticks a second, 50 W: 200 ticks are one second of full load, 50 J; 50 ticks 12.5 J."""
    dial = Dial(5)
    sensor = EstimateSensor(dial, watts=50, stat=stat, hz=100)
    (gpu,) = sensor.gpus()
    busy(stat, 200)
    assert Counter(5, 5, 50_000) == sensor.read(gpu).counter
    busy(stat, 250)
    assert Counter(5, 5, 62_500) == sensor.read(gpu).counter


def test_each_reading_after_the_first_has_one_sample(stat: Path) -> None:
    """The sample is the mean power since the reading before; at the first there is no interval and no sample."""
    dial = Dial(NS_PER_S)
    sensor = EstimateSensor(dial, watts=50, stat=stat, hz=100)
    (gpu,) = sensor.gpus()
    assert Samples((), ()) == sensor.read(gpu).samples
    dial.at_ns = 3 * NS_PER_S
    busy(stat, 100)
    assert Samples((3 * NS_PER_S,), (12_500,)) == sensor.read(gpu).samples  # 25 J in 2 s
    assert Samples((), ()) == sensor.read(gpu).samples  # no time has passed


def test_a_restart_finds_the_counter_where_it_ought_to_be(stat: Path) -> None:
    """The counter is the kernel's: a second process goes on from the same value under the same UUID."""
    first, second = (EstimateSensor(Dial(), stat=stat, hz=100) for _ in range(2))
    assert first.gpus() == second.gpus()
    busy(stat, 1000)
    assert first.read(first.gpus()[0]).counter == second.read(second.gpus()[0]).counter


def test_it_says_that_it_is_an_estimate(stat: Path) -> None:
    """Source, name and UUID mark it, with the assumed power in the name and as the limit."""
    sensor = EstimateSensor(Dial(), watts=65.5, stat=stat, hz=100)
    (gpu,) = sensor.gpus()
    assert (
        gpu.source,
        gpu.name,
        gpu.power_limit_mw,
    ) == (Source.ESTIMATE, "CPU busy share x 65.5 W (estimate)", 65_500)
    assert gpu.uuid.startswith("estimate-cpu")
    assert sensor.compute_pids(gpu) is None
    sensor.close()


def test_another_nameplate_is_another_gpu(stat: Path) -> None:
    """A restart with other watts scales the counter since boot: it must not be taken for energy that flowed."""
    assert len({EstimateSensor(Dial(), watts=w, stat=stat, hz=100).gpus()[0].uuid for w in (100, 200)}) == 2


@pytest.mark.parametrize("watts", [0, -5, float("nan"), float("inf")])
def test_senseless_watts_are_refused(stat: Path, watts: float) -> None:
    """Only a positive number is a nameplate power."""
    with pytest.raises(UsageError, match="positive number of watts"):
        EstimateSensor(Dial(), watts=watts, stat=stat)


def test_a_host_without_statistics_cannot_be_estimated(tmp_path: Path) -> None:
    """Without the kernel's file there is no estimate: one line, no zero."""
    with pytest.raises(NoGpuError, match=r"cannot be estimated on this host: .* cannot be read: No such file"):
        EstimateSensor(Dial(), stat=tmp_path / "none")


@pytest.mark.parametrize("content", ["", "intr 5\n", "cpu  1 2\n", "cpu  a b c d e f g\n"])
def test_a_damaged_statistics_file_is_no_reading(stat: Path, content: str) -> None:
    """A file without a usable line means: try again; no value is invented or repeated."""
    sensor = EstimateSensor(Dial(), stat=stat, hz=100)
    stat.write_text(content)
    with pytest.raises(RetryReading, match="no usable 'cpu' line"):
        sensor.read(sensor.gpus()[0])


def test_the_real_kernel_is_read() -> None:
    """On this host the counter is positive and does not fall."""
    sensor = EstimateSensor(Clock.start())
    first, second = (sensor.read(sensor.gpus()[0]).counter for _ in range(2))
    assert first is not None
    assert second is not None
    assert 0 < first.counter_mj <= second.counter_mj
    assert first.before_ns <= first.after_ns <= second.before_ns
