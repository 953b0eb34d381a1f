"""The NVML sensor: the real pynvml over an emulated driver, with injected faults."""

import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

from energyd.daemon.clock import Clock, TimeSource
from energyd.daemon.errors import LostGpu, NoGpuError, RetryReading, UsageError
from energyd.daemon.records import Gpu, Samples, Source
from energyd.daemon.sensors.nvml import Capabilities, NvmlSensor, _Gate, placed
from energyd.daemon.units import NS_PER_MS, NS_PER_S

COUNTER, SAMPLES = "nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetSamples"
OPEN_SCRIPT = """
from energyd.daemon.clock import Clock
from energyd.daemon.sensors.nvml import NvmlSensor
from energyd.daemon.errors import NoGpuError
try:
    sensor = NvmlSensor.open(Clock.start())
except NoGpuError as e:
    print(e)
else:
    (gpu,) = sensor.gpus()
    print(gpu.uuid, sensor.read(gpu).counter.counter_mj)
"""


class Says(Protocol):
    """The control of the emulated driver (see conftest)."""

    def say(self, *lines: str) -> None: ...


@dataclass
class Ahead:
    """A clock that can be put forward, over a real one (or one that stands still)."""

    real: TimeSource
    ahead_ns: int = 0

    def now_ns(self) -> int:
        return self.real.now_ns() + self.ahead_ns


class Still:
    """A clock that stands, so that no back-off runs out on a slow machine."""

    def now_ns(self) -> int:
        return 1_800_000_000 * NS_PER_S


def opened(count: int = 1, ahead: Ahead | None = None) -> tuple[NvmlSensor, list[Gpu]]:
    """A sensor over `count` emulated GPUs."""
    os.environ["ENERGYD_FAKE_NVML_GPUS"] = str(count)
    sensor = NvmlSensor.open(ahead or Clock.start())
    return sensor, list(sensor.gpus())


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENERGYD_FAKE_NVML_GPUS", "1")
    monkeypatch.setenv("ENERGYD_FAKE_NVML_POWER_MW", "300000")


def counter_mj(sensor: NvmlSensor, gpu: Gpu) -> int:
    """One reading's counter."""
    counter = sensor.read(gpu).counter
    assert counter is not None
    return counter.counter_mj


def test_pynvml_finds_the_library_and_reads_it(nvml_fake: Path) -> None:
    """A process whose LD_LIBRARY_PATH has an NVML meters its GPU."""
    environment = os.environ | {"LD_LIBRARY_PATH": str(nvml_fake)}
    done = subprocess.run(
        [sys.executable, "-c", OPEN_SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    uuid, counter = done.stdout.split()
    assert uuid.startswith("GPU-EMU-")
    assert int(counter) > 0


def test_without_a_library_the_choices_are_named(tmp_path: Path) -> None:
    """On a host without a driver, open ends in one line that names what else can be done."""
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", OPEN_SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    if "GPU-" in done.stdout:
        pytest.skip("this host has an NVIDIA driver")
    assert done.stdout.count("\n") == 1
    assert "libnvidia-ml.so.1 was not found" in done.stdout
    assert "--sensor estimate --estimate-watts W, or --sensor replay --trace FILE" in done.stdout


def test_gpus_are_described(nvml: Says) -> None:
    """Each GPU has UUID, index, name, driver, power limit, and says that it is emulated."""
    sensor, gpus = opened(2)
    name, driver, limit_mw = "energyd emulated GPU", "0.0-emulated", 700_000
    uuids = [f"GPU-EMU-00000000-0000-0000-0000-00000000000{i}" for i in range(2)]
    assert gpus == [Gpu(uuid, i, name, driver, Source.EMULATED, limit_mw) for i, uuid in enumerate(uuids)]
    assert sensor.capabilities(gpus[0]) == Capabilities(counter=True, samples=True, power=True, persistence=True)


def test_only_the_named_gpus_are_opened(nvml: Says) -> None:
    """`indices` picks GPUs; their index stays the driver's."""
    os.environ["ENERGYD_FAKE_NVML_GPUS"] = "3"
    assert [g.index for g in NvmlSensor.open(Clock.start(), indices=[2]).gpus()] == [2]


def test_an_index_without_a_gpu_is_refused(nvml: Says) -> None:
    """The message says which GPUs there are."""
    os.environ["ENERGYD_FAKE_NVML_GPUS"] = "3"
    with pytest.raises(UsageError, match="there is no GPU 7: this host has GPUs 0 to 2"):
        NvmlSensor.open(Clock.start(), indices=[0, 7])


def test_mig_is_told_in_the_name(nvml: Says) -> None:
    """With MIG on, power is the whole GPU's: the name says it. Without an enforced limit the set one counts."""
    nvml.say("set mig 1", "fail nvmlDeviceGetEnforcedPowerLimit 3")
    _, (gpu,) = opened()
    assert (gpu.name, gpu.power_limit_mw) == ("energyd emulated GPU (MIG)", 650_000)


def test_the_counter_comes_with_its_bracket(nvml: Says) -> None:
    """The counter is the driver's, read between two instants, and grows with time at 300 W."""
    ahead = Ahead(Clock.start())
    sensor, (gpu,) = opened(1, ahead)
    before_ns = ahead.now_ns()
    first = sensor.read(gpu).counter
    after_ns = ahead.now_ns()
    assert first is not None
    assert before_ns <= first.before_ns <= first.after_ns <= after_ns
    threading.Event().wait(0.11)  # a step of the emulated counter is 100 ms
    assert counter_mj(sensor, gpu) - first.counter_mj >= 30_000


def test_samples_are_the_ring_first_then_only_new_ones(nvml: Says) -> None:
    """The first poll gives the driver's ring on ledger time, the next what ended since, no slot twice."""
    sensor, (gpu,) = opened()
    first = sensor.read(gpu)
    assert first.samples is not None
    assert first.counter is not None
    assert len(first.samples.end_ns) == 119
    assert {300_000} == set(first.samples.power_mw)
    assert first.counter.before_ns - 2 * NS_PER_S < first.samples.end_ns[-1] < first.counter.before_ns + NS_PER_MS
    threading.Event().wait(0.05)
    second = sensor.read(gpu).samples
    assert second is not None
    assert len(second.end_ns) >= 2
    assert second.end_ns[0] > first.samples.end_ns[-1]


@pytest.mark.parametrize("kind", range(7))
def test_samples_of_every_value_type_are_read(nvml: Says, kind: int) -> None:
    """The driver says which member of the union holds the milliwatts; each of the seven is read."""
    os.environ["ENERGYD_FAKE_NVML_POWER_MW"] = "60123"
    nvml.say(f"set value_type {kind}")
    sensor, (gpu,) = opened()
    samples = sensor.read(gpu).samples
    assert samples is not None
    assert {60_123} == set(samples.power_mw)


def test_an_unknown_value_type_is_not_guessed(nvml: Says) -> None:
    """A type beyond the header gives no samples rather than wrong watts; the counter is read as always."""
    nvml.say("set value_type 7")
    sensor, (gpu,) = opened()
    reading = sensor.read(gpu)
    assert reading.samples is None
    assert reading.counter is not None


def test_a_driver_without_samples_gives_the_counter_alone(nvml: Says) -> None:
    """The missing capability is found at open and readings carry None, not an empty batch."""
    nvml.say(f"fail {SAMPLES} 3")
    sensor, (gpu,) = opened()
    nvml.say()
    assert not sensor.capabilities(gpu).samples
    assert sensor.read(gpu).samples is None


def test_samples_that_fail_once_cost_only_their_poll(nvml: Says) -> None:
    """A passing failure of the samples leaves the counter; at the next poll they are back."""
    sensor, (gpu,) = opened()
    nvml.say(f"fail {SAMPLES} 999")
    reading = sensor.read(gpu)
    assert reading.samples is None
    assert reading.counter is not None
    nvml.say()
    samples = sensor.read(gpu).samples
    assert samples is not None
    assert len(samples.end_ns) == 119


def test_no_new_sample_is_an_empty_batch(nvml: Says) -> None:
    """NVML says NOT_FOUND when nothing ended since: that is no failure."""
    sensor, (gpu,) = opened()
    nvml.say(f"fail {SAMPLES} 6")
    assert Samples((), ()) == sensor.read(gpu).samples


def test_samples_survive_a_counter_that_fails_after_them(nvml: Says) -> None:
    """Both are read in one poll; if the counter fails, the samples are there at the next: no hole in the shape."""
    sensor, (gpu,) = opened()
    first = sensor.read(gpu).samples
    assert first is not None
    time.sleep(0.3)
    nvml.say(f"fail {COUNTER} 999")
    with pytest.raises(RetryReading):
        sensor.read(gpu)
    nvml.say()
    again = sensor.read(gpu).samples
    assert again is not None
    assert again.end_ns[0] - first.end_ns[-1] < 100 * NS_PER_MS
    sensor.close()


@pytest.mark.parametrize("code", [3, 10, 11, 21, 27, 999, 4, 6, 17])
def test_passing_failures_are_tried_again(nvml: Says, code: int) -> None:
    """A failed counter gives no reading, never the last value; once the driver answers, the counter has gone on."""
    sensor, (gpu,) = opened()
    before = counter_mj(sensor, gpu)
    nvml.say(f"fail {COUNTER} {code}")
    with pytest.raises(RetryReading, match=rf"GPU 0 \(energyd emulated GPU\): .*\(NVML code {code}\)"):
        sensor.read(gpu)
    nvml.say()
    assert counter_mj(sensor, gpu) >= before


@pytest.mark.parametrize("code", [15, 16])
def test_a_gpu_off_the_bus_is_lost_alone_and_found_again(nvml: Says, code: int) -> None:
    """The lost GPU raises LostGpu until its UUID answers again; the one beside it is read throughout."""
    ahead = Ahead(Clock.start())
    sensor, (lost, well) = opened(2, ahead)
    nvml.say(f"fail {COUNTER} {code} 0", f"fail nvmlDeviceGetHandleByUUID {code} 0")
    for _ in range(3):
        with pytest.raises(LostGpu, match="GPU 0"):
            sensor.read(lost)
        assert sensor.read(well).counter is not None
        ahead.ahead_ns += 100 * NS_PER_S  # past any back-off
    assert sensor.compute_pids(lost) is None
    nvml.say()
    assert sensor.read(lost).counter is not None
    assert sensor.read(well).counter is not None


def test_a_lost_gpu_is_looked_for_with_back_off(nvml: Says) -> None:
    """Between two looks the driver is left alone: LostGpu comes without a new session; then the GPU is found."""
    ahead = Ahead(Still())
    sensor, (gpu,) = opened(1, ahead)
    nvml.say(f"fail {COUNTER} 15", "fail nvmlDeviceGetHandleByUUID 15")
    for says in ("looking for it again", "still away", "in a moment"):
        with pytest.raises(LostGpu, match=says):
            sensor.read(gpu)
    nvml.say()
    with pytest.raises(LostGpu, match="in a moment"):
        sensor.read(gpu)
    ahead.ahead_ns += 2 * NS_PER_S
    assert sensor.read(gpu).counter is not None


@pytest.mark.parametrize("code", [1, 9, 18])
def test_a_reloaded_driver_loses_every_gpu_once(nvml: Says, code: int) -> None:
    """After a reload each GPU's loop hears LostGpu, also one that did not find it, then reads the new counter."""
    sensor, gpus = opened(2)
    counters = [counter_mj(sensor, gpu) for gpu in gpus]
    reset_ns = Clock(0).now_ns()
    nvml.say(f"fail {COUNTER} {code} 0")
    with pytest.raises(LostGpu):
        sensor.read(gpus[0])
    nvml.say(f"set reset_ns {reset_ns}")
    with pytest.raises(LostGpu):
        sensor.read(gpus[1])
    assert all(counter_mj(sensor, gpu) < was for gpu, was in zip(gpus, counters, strict=True))


def test_a_driver_that_stays_away_stays_lost(nvml: Says) -> None:
    """While the driver cannot be initialised each look fails as LostGpu; when it can, readings go on."""
    ahead = Ahead(Clock.start())
    sensor, (gpu,) = opened(1, ahead)
    nvml.say(f"fail {COUNTER} 9", "fail nvmlInitWithFlags 9")
    for _ in range(3):
        with pytest.raises(LostGpu):
            sensor.read(gpu)
        ahead.ahead_ns += 100 * NS_PER_S
    nvml.say()
    assert sensor.read(gpu).counter is not None


def test_a_session_that_ended_under_us_is_opened_again(nvml: Says) -> None:
    """UNINITIALIZED from every call (as after a driver reload) is LostGpu once and a fresh session after."""
    sensor, (gpu,) = opened()
    sensor.close()
    with pytest.raises(LostGpu, match="Uninitialized"):
        sensor.read(gpu)
    assert sensor.read(gpu).counter is not None


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["fail nvmlInitWithFlags 9"], "the NVIDIA driver is not loaded"),
        (["fail nvmlInitWithFlags 18"], "of different versions"),
        (["fail nvmlInitWithFlags 4"], "Insufficient Permissions"),
        (["set gpus 0"], "shows no GPU"),
        (["fail nvmlDeviceGetHandleByIndex_v2 15"], "GPU is lost"),
        ([f"fail {COUNTER} 3"], "power, but no energy counter"),
        ([f"fail {COUNTER} 3", "fail nvmlDeviceGetPowerUsage 3"], "neither power nor an energy counter"),
        ([f"fail {COUNTER} 13"], "power, but no energy counter"),
    ],
)
def test_what_cannot_be_metered_is_told_at_open(nvml: Says, lines: list[str], says: str) -> None:
    """Each reason is one line that names it and the choices."""
    nvml.say(*lines)
    with pytest.raises(NoGpuError) as refused:
        NvmlSensor.open(Clock.start())
    message = str(refused.value)
    assert says in message
    assert "--sensor estimate --estimate-watts W" in message
    assert "\n" not in message


def test_a_passing_refusal_at_open_is_not_believed(nvml: Says) -> None:
    """Failures of the moment at the probe leave the capability on: the readings will tell."""
    nvml.say(f"fail {COUNTER} 999", f"fail {SAMPLES} 999")
    sensor, (gpu,) = opened()
    nvml.say()
    reading = sensor.read(gpu)
    assert reading.samples is not None
    assert reading.counter is not None


def test_compute_processes(nvml: Says) -> None:
    """Processes by pid; none is an empty set; a driver that does not tell is None."""
    sensor, (gpu,) = opened()
    assert frozenset() == sensor.compute_pids(gpu)
    nvml.say("set pid 4242")
    assert frozenset({4242}) == sensor.compute_pids(gpu)
    nvml.say("fail nvmlDeviceGetComputeRunningProcesses_v3 3")
    assert sensor.compute_pids(gpu) is None


def test_one_thread_per_gpu_may_read_while_another_is_found_again(nvml: Says) -> None:
    """Four threads read at once while one GPU is lost and found: the others never fail, and no counter falls."""
    sensor, gpus = opened(4)
    sensor._gate = _Gate(drain_s=60, answer_s=60)  # a slow test machine is no hung driver
    wrong: list[str] = []
    stop = threading.Event()

    def watch(gpu: Gpu) -> None:
        last = 0
        while not stop.is_set():
            try:
                now = counter_mj(sensor, gpu)
            except (LostGpu, RetryReading) as e:
                wrong.append(str(e))
                return
            if now < last:
                wrong.append(f"{gpu.index} fell from {last} to {now}")
            last = now

    threads = [threading.Thread(target=watch, args=(gpu,)) for gpu in gpus[1:]]
    for thread in threads:
        thread.start()
    for _ in range(20):
        nvml.say(f"fail {COUNTER} 15 0")
        with pytest.raises(LostGpu):
            sensor.read(gpus[0])
        nvml.say()
        sensor.read(gpus[0])
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_hung_call_blocks_only_itself(nvml: Says) -> None:
    """While one GPU's call hangs, a lost GPU is told that it cannot be looked for; readings go on."""
    sensor, (lost, hung) = opened(2)
    sensor._gate = _Gate(drain_s=0.05)
    nvml.say(f"fail {COUNTER} 15 0")
    with sensor._gate.shared():  # a call of `hung` that does not return
        with pytest.raises(LostGpu):
            sensor.read(lost)
        with pytest.raises(LostGpu, match="another NVML call hangs"):
            sensor.read(lost)
        assert sensor.read(hung).counter is not None


def test_a_new_session_that_hangs_is_not_waited_for(nvml: Says) -> None:
    """While a new session is being opened and does not come to an end, other GPUs are told to try again."""
    sensor, (gpu,) = opened()
    sensor._gate = _Gate(answer_s=0.05)
    with sensor._gate.alone():
        with pytest.raises(RetryReading, match="opened again by another thread"):
            sensor.read(gpu)
        assert sensor.compute_pids(gpu) is None


def test_a_step_of_the_wall_clock_moves_no_sample(nvml: Says) -> None:
    """The driver stamps by the wall clock: after a step of an hour no sample lies in the future."""
    ahead = Ahead(Clock.start())
    sensor, (gpu,) = opened(1, ahead)
    first = sensor.read(gpu).samples
    ahead.ahead_ns = -3_600 * NS_PER_S  # the wall clock is now an hour ahead of ledger time
    reading = sensor.read(gpu)
    assert first is not None
    assert reading.samples is not None
    assert reading.counter is not None
    assert all(t < reading.counter.before_ns + 50 * NS_PER_MS for t in reading.samples.end_ns)


@pytest.mark.parametrize(
    ("stamped", "after_ns", "expected"),
    [
        # offset 1,000,000 ns: stamp s µs ends at 1,000 s + 1,000,000 ns on ledger time; now is 200,000,000 ns
        ([(10_000, 1), (20_000, 2)], 0, [(11_000_000, 1), (21_000_000, 2)]),
        ([(10_000, 1), (20_000, 2)], 11_000_000, [(21_000_000, 2)]),
        ([], 0, []),
        ([(0, 9), (20_000, 2)], 1_000_000, [(21_000_000, 2)]),
        # the wall clock stepped back by 10 s: what was stamped before it lies in the future
        ([(10_180_000, 1), (10_190_000, 2), (195_000, 3)], 0, [(196_000_000, 3)]),
        # it stepped back by 15 ms: two stamps of before lie among those of after, which win
        ([(170_000, 1), (190_000, 2), (195_000, 3), (180_000, 4)], 0, [(171_000_000, 1), (181_000_000, 4)]),
        ([(20_000, 2), (20_000, 3)], 0, [(21_000_000, 3)]),
    ],
)
def test_stamps_are_placed_on_ledger_time(
    stamped: list[tuple[int, int]], after_ns: int, expected: list[tuple[int, int]]
) -> None:
    """New samples only, ascending; where the wall clock stepped, stamps that contradict newer ones are left out."""
    placed_samples = placed(stamped, offset_ns=1_000_000, after_ns=after_ns, now_ns=200_000_000)
    assert expected == list(zip(placed_samples.end_ns, placed_samples.power_mw, strict=True))


def test_closing_twice_does_nothing(nvml: Says) -> None:
    """`close` ends the session once."""
    sensor, _ = opened()
    sensor.close()
    sensor.close()
