"""`energyd record`: a file that is whole or not there, and that books to the same joules as the host it came from."""

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest
from click.testing import CliRunner

from energyd.daemon import record as record_module
from energyd.daemon.cli import main
from energyd.daemon.clock import Clock
from energyd.daemon.errors import EndOfTrace, LostGpu, RetryReading, SensorError, UnavailableError, UsageError
from energyd.daemon.record import OutputFile, Recording, Tape, document, record
from energyd.daemon.records import Counter, Gpu, Reading, Samples, Source
from energyd.daemon.sensors.nvml import NvmlSensor
from energyd.daemon.sensors.replay import ReplaySensor
from energyd.daemon.trace import parse_trace, read_trace
from energyd.daemon.units import NS_PER_MS, NS_PER_S

TRACE = Path(__file__).parent.parent / "data" / "h200_vllm_llama8b_eager.json.gz"
GPUS = tuple(Gpu(f"GPU-{i}", i, "test GPU", "1.2", Source.EMULATED) for i in range(2))


def verb(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a verb run in this process."""
    done = CliRunner().invoke(main, list(arguments), prog_name="energyd")
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


class Scripted:
    """A sensor that says what it was told to, then stands still (or ends)."""

    def __init__(self, script: dict[str, list[Reading | SensorError]]) -> None:
        self._script: dict[str, Iterator[Reading | SensorError]] = {u: iter(lines) for u, lines in script.items()}
        self._gpus = tuple(g for g in GPUS if g.uuid in script)

    def gpus(self) -> tuple[Gpu, ...]:
        return self._gpus

    def read(self, gpu: Gpu) -> Reading:
        line = next(self._script[gpu.uuid], EndOfTrace("over"))
        if isinstance(line, SensorError):
            raise line
        return line

    def compute_pids(self, gpu: Gpu) -> frozenset[int] | None:
        return None

    def close(self) -> None:
        """Nothing to close."""


def reading(at_ms: int, counter_mj: int, *samples: tuple[int, int]) -> Reading:
    """A counter read at `at_ms`, and samples (end ms, mW)."""
    at_ns = at_ms * NS_PER_MS
    kept = Samples(tuple(ms * NS_PER_MS for ms, _ in samples), tuple(mw for _, mw in samples))
    return Reading(kept, Counter(at_ns, at_ns + 1000, counter_mj))


def played(script: dict[str, list[Reading | SensorError]]) -> Recording:
    """A recording of the whole script."""
    return record(
        Scripted(script), Clock(0), duration_ns=60 * NS_PER_S, period_ns=NS_PER_MS, stopped=lambda: False
    )  # ends by itself when the script does


def text(recording: Recording) -> bytes:
    """The file of a recording."""
    return b"".join(document(recording, {}))


def test_a_recording_says_what_the_sensor_said() -> None:
    """Anchors and samples come back from the file as the sensor gave them, and name and driver with them."""
    lines: list[Reading | SensorError] = [reading(1000, 500), reading(2000, 900, (1020, 400), (1040, 401))]
    trace = parse_trace(text(played({"GPU-0": lines})))
    assert trace.anchors == ((Counter(10**9, 10**9 + 1000, 500), Counter(2 * 10**9, 2 * 10**9 + 1000, 900)),)
    assert trace.samples == (Samples((1020 * NS_PER_MS, 1040 * NS_PER_MS), (400, 401)),)
    assert (trace.gpus[0].name, trace.gpus[0].driver, trace.requests) == ("test GPU", "1.2", ())


def test_several_gpus_are_told_apart_by_index() -> None:
    """With two GPUs each anchor and sample names its own; with one none does."""
    lines: dict[str, list[Reading | SensorError]] = {
        f"GPU-{i}": [reading(1000, 5 * i), reading(2000, 9 * i, (1020, 100 + i))] for i in range(2)
    }
    trace = parse_trace(text(played(lines)))
    assert [g.index for g in trace.gpus] == [0, 1]
    assert [[a.counter_mj for a in anchors] for anchors in trace.anchors] == [[0, 0], [5, 9]]
    assert [s.power_mw for s in trace.samples] == [(100,), (101,)]
    alone = json.loads(text(played({"GPU-1": lines["GPU-1"]})))
    assert [len(row) for row in alone["anchors"]] == [3, 3]


def test_neither_host_nor_uuid_is_in_the_file() -> None:
    """A recording is handed to others: no UUID and no host name is in it, but where each GPU's figures came from is."""
    found = text(played({"GPU-0": [reading(1000, 1), reading(2000, 2)]}))
    assert b"GPU-0" not in found
    assert os.uname().nodename.encode() not in found
    assert json.loads(found)["info"]["gpus"][0]["source"] == json.loads(found)["info"]["source"] == "emulated"


def test_failed_readings_are_marked_and_the_rest_goes_on() -> None:
    """A transient failure and a lost GPU are marks in the file; the readings around them are kept."""
    lines: list[Reading | SensorError] = [reading(1000, 1), RetryReading("busy"), LostGpu("gone"), reading(4000, 7)]
    trace = parse_trace(text(played({"GPU-0": lines})))
    assert [m.name for m in trace.marks] == ["start", "GPU 0: busy", "GPU 0: gone", "end"]
    assert [a.counter_mj for a in trace.anchors[0]] == [1, 7]
    assert trace.info["gpus"][0]["readings_failed"] == 2


def test_a_counter_that_fell_is_recorded_as_it_fell() -> None:
    """A reset is what a recording is for: it is kept, and the stated energy counts only what rose."""
    recording = played({"GPU-0": [reading(1000, 900), reading(2000, 950), reading(3000, 10), reading(4000, 30)]})
    assert [a.counter_mj for a in parse_trace(text(recording)).anchors[0]] == [900, 950, 10, 30]
    assert recording.tapes[0].energy_uj == 70_000


def test_what_runs_backwards_is_dropped_and_counted() -> None:
    """Repeated or backward stamps and anchors would make the file refused: they are left out, and counted."""
    lines: list[Reading | SensorError] = [
        reading(1000, 1, (900, 5), (920, 6)),
        reading(1000, 1, (920, 7), (910, 5)),
        reading(2000, 2, (940, 8)),
    ]
    trace = parse_trace(text(played({"GPU-0": lines})))
    assert trace.samples[0].power_mw == (5, 6, 8)
    assert trace.info["gpus"][0]["dropped"] == 3


def test_a_gpu_without_two_counters_is_left_out() -> None:
    """The format wants two anchors a GPU: one that gave fewer is left out and said so; the others stay."""
    lines: dict[str, list[Reading | SensorError]] = {
        "GPU-0": [reading(1000, 1, (990, 3)), LostGpu("gone")],
        "GPU-1": [reading(1000, 1), reading(2000, 2)],
    }
    trace = parse_trace(text(played(lines)))
    assert len(trace.gpus) == 1
    assert [g["left_out"] for g in trace.info["gpus"]] == [True, False]


def test_no_energy_is_one_clear_line() -> None:
    """Without any two counter readings there is no file, and the first failure is named."""
    with pytest.raises(UnavailableError, match=r"no GPU gave two counter readings \(gone\); record for longer"):
        text(played({"GPU-0": [LostGpu("gone")]}))


def test_a_gpu_that_hangs_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver call that does not return neither stops the other GPU's readings nor the end of the recording."""
    monkeypatch.setattr(record_module, "JOIN_S", 0.05)
    release = threading.Event()

    class Hanging(Scripted):
        def read(self, gpu: Gpu) -> Reading:
            if gpu.index == 1:
                release.wait(60)
            return super().read(gpu)

    sensor = Hanging({"GPU-0": [reading(1000, 1), reading(2000, 2)], "GPU-1": []})
    found = record(sensor, Clock.start(), duration_ns=NS_PER_S // 5, period_ns=NS_PER_MS, stopped=lambda: False)
    release.set()
    assert found.hung
    assert [a.counter_mj for a in found.tapes[0].anchors] == [1, 2]


def test_long_recordings_are_written_in_pieces() -> None:
    """Rows are joined with commas across pieces: more than one piece of samples is still one array."""
    tape = Tape(GPUS[0])
    tape.take(reading(1000, 1))
    tape.take(reading(2_000_000, 2, *((ms, ms % 7) for ms in range(1, 12_002))))
    trace = parse_trace(text(Recording((tape,), 0, 1)))
    assert len(trace.samples[0].end_ns) == 12_001


def test_the_emulated_driver_is_recorded_for_real(nvml: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real pynvml over two emulated GPUs: what is recorded balances and names each GPU's own power."""
    monkeypatch.setenv("ENERGYD_FAKE_NVML_GPUS", "2")
    clock = Clock.start()
    sensor = NvmlSensor.open(clock)
    found = record(sensor, clock, duration_ns=NS_PER_S // 2, period_ns=NS_PER_S // 5, stopped=lambda: False)
    sensor.close()
    trace = parse_trace(text(found))
    assert [set(s.power_mw) for s in trace.samples] == [{300_000}, {350_000}]
    assert trace.info["source"] == "emulated"


def test_a_live_recording_is_settled(tmp_path: Path) -> None:
    """`energyd settle` takes what `energyd record` wrote and books what the replayed GPU drew, to the microjoule."""
    target = tmp_path / "r.json.gz"
    code, out, err = verb("record", "--sensor", "replay", "--trace", str(TRACE), "--seconds", "0.5",
                          "--every", "0.1", "--output", str(target))  # fmt: skip
    assert (code, "book it with" in out) == (0, True), err
    anchors = read_trace(target).anchors[0]
    code, out, err = verb("settle", str(target), "--db", str(tmp_path / "r.db"), "--json")
    assert json.loads(out)["metered_energy_uj"] == (anchors[-1].counter_mj - anchors[0].counter_mj) * 1000
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_a_recording_can_be_replayed_as_a_sensor(tmp_path: Path) -> None:
    """`--sensor replay` takes it too: a problem seen elsewhere runs live here."""
    target = tmp_path / "r.json"
    assert verb("record", "--sensor", "replay", "--trace", str(TRACE), "--seconds", "0.3", "--every", "0.1",
                "--output", str(target))[0] == 0  # fmt: skip
    sensor = ReplaySensor(read_trace(target), Clock.start())
    assert sensor.read(sensor.gpus()[0]).counter is not None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_early_end_keeps_a_whole_file(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C, SIGTERM and a lost terminal end the recording cleanly: exit 0, the file whole under its name, nothing beside it."""
    target = tmp_path / "r.json.gz"
    command = [sys.executable, "-m", "energyd.daemon.cli", "record", "--sensor", "replay", "--trace", str(TRACE)]
    with subprocess.Popen(
        [*command, "--seconds", "600", "--every", "0.05", "--output", str(target)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        assert "Ctrl-C" in process.stderr.readline()
        threading.Event().wait(0.3)
        process.send_signal(number)
        assert process.wait(30) == 0, process.stderr.read()
    assert len(read_trace(target).anchors[0]) >= 2
    assert [p.name for p in tmp_path.iterdir()] == ["r.json.gz"]


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    """When the recording cannot be written to its end, neither it nor its partial is left."""

    def breaking() -> Iterator[bytes]:
        yield b"{"
        raise UnavailableError("nothing")

    with pytest.raises(UnavailableError):
        OutputFile(tmp_path / "r.json").write(breaking())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    """The disk's refusal is a UsageError that names the file, whatever of it had been written."""
    file = OutputFile(tmp_path / "r.json")
    file._file.close()
    file._file = Path("/dev/full").open("wb")  # noqa: SIM115 - closed by write
    with pytest.raises(UsageError, match=r"r\.json: No space left on device; the recording is lost"):
        file.write([b"x" * 100])
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_not_replaced_unless_told(tmp_path: Path) -> None:
    """A second recording under the same name is refused before it begins; --force replaces the file at its end."""
    target = tmp_path / "r.json.gz"
    target.write_bytes(b"mine")
    wanted = ["record", "--sensor", "estimate", "--seconds", "0.1", "--every", "0.05", "--output", str(target)]
    code, _, err = verb(*wanted)
    assert (code, err.count("\n"), target.read_bytes()) == (2, 1, b"mine")
    assert "exists already" in err
    assert verb(*wanted, "--force")[0] == 0
    assert json.loads(gzip.decompress(target.read_bytes()))["info"]["source"] == "estimate"


class Says(Protocol):
    """The control of the emulated driver (see conftest)."""

    def say(self, *lines: str) -> None: ...


def test_a_host_without_a_driver_is_one_line(nvml: Says, tmp_path: Path) -> None:
    """No driver: exit code 2, one line that names the choices, and no file."""
    nvml.say("fail nvmlInitWithFlags 9")
    code, _, err = verb("record", "--output", str(tmp_path / "r.json"))
    assert (code, err.count("\n"), list(tmp_path.glob("r.json*"))) == (2, 1, [])
    assert "--sensor estimate" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sensor", "replay"], "needs --trace FILE"),
        (["--sensor", "estimate", "--trace", "x"], "--trace goes with --sensor replay"),
        (["--sensor", "estimate", "--estimate-watts", "-5"], "--estimate-watts"),
        (["--sensor", "estimate", "--output", "{folder}"], "is a folder"),
        (["--sensor", "estimate", "--output", "."], "is a folder"),
        (["--sensor", "estimate", "--output", "{folder}/none/r.json"], "No such file or directory"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], says: str) -> None:
    """Each wrong input ends with exit code 2 and one line that says what."""
    code, _, err = verb("record", *(a.replace("{folder}", str(tmp_path)) for a in arguments))
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith("energyd: ")
    assert says in err
