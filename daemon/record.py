"""Recording a live host: what its sensor says, kept in the format of `trace`, so that a problem can be reproduced elsewhere.

A recording holds readings only: counters, power samples, times, the names of GPU and driver. No host name, no GPU's
UUID, no process, no query: it can be handed to others as it is. `energyd settle` and `--sensor replay` take it.

Everything is kept in memory (16 bytes a sample: 3 MB an hour and GPU) and written at the end, under another name until
it is whole: a file that has the name asked for can be trusted.
"""

import contextlib
import gzip
import os
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import msgspec

from .clock import TimeSource
from .errors import EndOfTrace, LostGpu, RetryReading, UnavailableError, UsageError
from .records import Counter, Gpu, Reading
from .sensors import Sensor
from .units import NS_PER_US, UJ_PER_MJ, seconds

JOIN_S: Final = 3.0
"""A last reading takes milliseconds; a thread that takes longer hangs in the driver and is left behind."""
_LOOK_S: Final = 0.1
"""How often the word to stop is looked for."""
_MOST_TROUBLES: Final = 100
"""Failures kept with their words, per GPU: a GPU that is away for hours must not fill the file with one sentence."""
_ROWS: Final = 5_000
_GZIP_LEVEL: Final = 6


@dataclass(slots=True)
class Tape:
    """One GPU's readings so far. Written by one thread, read after it has ended (or was given up).

    `end_us`, `power_mw`: its samples, ascending. `failed` counts readings that failed, `dropped` the samples and anchors
    that would have run backwards. `troubles`: the first failures, ledger ns and words.
    """

    gpu: Gpu
    anchors: list[Counter] = field(default_factory=list)
    end_us: "array[int]" = field(default_factory=lambda: array("q"))
    power_mw: "array[int]" = field(default_factory=lambda: array("q"))
    failed: int = 0
    dropped: int = 0
    troubles: list[tuple[int, str]] = field(default_factory=list)

    def take(self, reading: Reading) -> None:
        """Keep one reading. What would run backwards is dropped and counted: the format refuses it."""
        if reading.samples:
            for end_ns, power_mw in zip(reading.samples.end_ns, reading.samples.power_mw, strict=True):
                end_us = end_ns // NS_PER_US
                if end_us < 0 or power_mw < 0 or (self.end_us and end_us <= self.end_us[-1]):
                    self.dropped += 1
                    continue
                self.power_mw.append(power_mw)
                self.end_us.append(end_us)
        if counter := reading.counter:
            last = self.anchors[-1] if self.anchors else None
            if last and (counter.before_ns < last.after_ns or counter.before_ns == last.before_ns):
                self.dropped += 1
            else:
                self.anchors.append(counter)

    def fail(self, at_ns: int, why: str) -> None:
        """Note a reading that failed."""
        self.failed += 1
        if len(self.troubles) < _MOST_TROUBLES:
            self.troubles.append((at_ns, why))

    @property
    def usable(self) -> bool:
        """Whether there is energy in it: it takes two readings of the counter."""
        return len(self.anchors) >= 2

    @property
    def energy_uj(self) -> int:
        """What the counter gained from the first reading to the last, µJ; falls of it (a reset) count as 0."""
        values = [a.counter_mj for a in self.anchors]
        return sum(max(0, b - a) for a, b in pairwise(values)) * UJ_PER_MJ


@dataclass(frozen=True, slots=True)
class Recording:
    """Readings of all GPUs from `start_ns` to `end_ns` (ledger ns). `hung`: some reading never returned."""

    tapes: tuple[Tape, ...]
    start_ns: int
    end_ns: int
    hung: bool = False

    @property
    def kept(self) -> tuple[Tape, ...]:
        """The GPUs that the file can hold: those with two readings of their counter."""
        return tuple(t for t in self.tapes if t.usable)


def record(
    sensor: Sensor, clock: TimeSource, *, duration_ns: int, period_ns: int, stopped: Callable[[], bool]
) -> Recording:
    """Read every GPU each `period_ns` for `duration_ns`, or until `stopped()`; blocks.

    Failed readings are noted and tried again; a GPU that hangs holds up neither the others nor the end.
    """
    start_ns = clock.now_ns()
    tapes = tuple(Tape(gpu) for gpu in sensor.gpus())
    stop = threading.Event()
    threads = [
        threading.Thread(target=_follow, args=(sensor, clock, tape, period_ns, stop), daemon=True) for tape in tapes
    ]
    for thread in threads:
        thread.start()
    pause = threading.Event()  # never set: a plain wait that a signal handler does not have to touch
    while not stopped() and (left_ns := start_ns + duration_ns - clock.now_ns()) > 0:
        if not any(thread.is_alive() for thread in threads):
            break
        pause.wait(min(_LOOK_S, seconds(left_ns)))
    stop.set()
    for thread in threads:
        thread.join(JOIN_S)
    return Recording(tapes, start_ns, clock.now_ns(), hung=any(thread.is_alive() for thread in threads))


def _follow(sensor: Sensor, clock: TimeSource, tape: Tape, period_ns: int, stop: threading.Event) -> None:
    """Read one GPU until told to stop, and once more then, so that no energy before the word is left out."""
    due_ns = clock.now_ns()
    while True:
        last = stop.is_set()
        try:
            tape.take(sensor.read(tape.gpu))
        except (RetryReading, LostGpu) as e:
            tape.fail(clock.now_ns(), str(e))
        except EndOfTrace:
            return
        if last:
            return
        due_ns = max(due_ns + period_ns, clock.now_ns())
        stop.wait(seconds(due_ns - clock.now_ns()))


def document(recording: Recording, info: Mapping[str, Any]) -> Iterator[bytes]:
    """The trace file's JSON, piece by piece. GPUs without two counter readings are left out.

    `info` is added to what the recording itself knows. Raises UnavailableError if no GPU is left.
    """
    tapes = recording.kept
    if not tapes:
        raise UnavailableError(
            "nothing was recorded: no GPU gave two counter readings"
            f"{_first_trouble(recording)}; record for longer, or see `energyd doctor`"
        )
    several = len(tapes) > 1
    yield b'{"info":' + msgspec.json.encode({**_about(recording), **info})
    marks = [("start", recording.start_ns), *_marks(tapes), ("end", recording.end_ns)]
    yield b',"marks":' + msgspec.json.encode(marks)
    yield b',"anchors":['
    yield from _rows(
        (a.before_ns, a.after_ns, a.counter_mj, *([t.gpu.index] if several else [])) for t in tapes for a in t.anchors
    )
    yield b'],"samples":['
    yield from _rows(
        (end_us, power_mw, *([t.gpu.index] if several else []))
        for t in tapes
        for end_us, power_mw in zip(t.end_us, t.power_mw, strict=False)  # a thread given up may be between the two
    )
    yield b'],"requests":[]}\n'


def _rows(rows: Iterable[tuple[int, ...]]) -> Iterator[bytes]:
    """JSON arrays with commas between, a few thousand at a time: a day of samples is never one string."""
    batch: list[tuple[int, ...]] = []
    comma = b""
    for row in rows:
        batch.append(row)
        if len(batch) == _ROWS:
            yield comma + msgspec.json.encode(batch)[1:-1]
            batch, comma = [], b","
    if batch:
        yield comma + msgspec.json.encode(batch)[1:-1]


def _about(recording: Recording) -> dict[str, Any]:
    """Name and driver of the first GPU as the format wants them, and each GPU's own. No UUIDs: they name a machine."""
    gpus = [
        {
            "index": t.gpu.index,
            "name": t.gpu.name,
            "driver": t.gpu.driver,
            "source": str(t.gpu.source),
            "power_limit_mw": t.gpu.power_limit_mw,
            "anchors": len(t.anchors),
            "samples": len(t.end_us),
            "readings_failed": t.failed,
            "dropped": t.dropped,
            "left_out": not t.usable,
        }
        for t in recording.tapes
    ]
    first = recording.kept[0].gpu
    return {
        "name": first.name,
        "driver": first.driver,
        "source": str(first.source),
        "gpus": gpus,
        "hung": recording.hung,
    }


def _marks(tapes: Iterable[Tape]) -> list[tuple[str, int]]:
    """What failed and when, by time."""
    return sorted(
        ((f"GPU {t.gpu.index}: {why}", at_ns) for t in tapes for at_ns, why in t.troubles), key=lambda mark: mark[1]
    )


def _first_trouble(recording: Recording) -> str:
    words = [why for t in recording.tapes for _, why in t.troubles]
    return f" ({words[0]})" if words else ""


class OutputFile:
    """A file that is there only when it is whole: written beside its place, then renamed.

    Opened before the recording begins, so that a folder that takes no file is found out then and not after an hour.
    Gzipped if the name ends in `.gz`. Raises UsageError for a place that cannot be written or (without `force`) that
    holds a file already.
    """

    def __init__(self, path: Path, *, force: bool = False) -> None:
        self._path = path
        if path.is_dir():
            raise UsageError(f"{path} is a folder; name a file, such as {path / 'recording.json.gz'}")
        self._partial = path.with_name(path.name + ".partial")
        if path.exists() and not force:
            raise UsageError(f"{path} exists already; name another file with --output, or give --force")
        try:
            self._file = self._partial.open("wb")
        except OSError as e:
            raise UsageError(f"cannot write {path}: {e.strerror}; name another file with --output") from e

    def write(self, pieces: Iterable[bytes]) -> int:
        """Write `pieces`, put the file in its place, and return its size in bytes.

        Raises UsageError if the disk refuses; then, and if `pieces` raises, nothing is left behind.
        """
        try:
            with self._file:
                if self._path.name.endswith(".gz"):
                    with gzip.GzipFile(filename="", mode="wb", fileobj=self._file, compresslevel=_GZIP_LEVEL) as packed:
                        packed.writelines(pieces)
                else:
                    self._file.writelines(pieces)
                self._file.flush()
                os.fsync(self._file.fileno())
            size = self._partial.stat().st_size
            self._partial.replace(self._path)
        except OSError as e:
            self.discard()
            raise UsageError(f"cannot write {self._path}: {e.strerror or e}; the recording is lost") from e
        except BaseException:
            self.discard()
            raise
        return size

    def discard(self) -> None:
        """Leave nothing behind; harmless when there is nothing."""
        with contextlib.suppress(OSError):  # closing flushes, and a full disk refuses that too
            self._file.close()
        self._partial.unlink(missing_ok=True)
