"""Recorded traces: what a GPU's counter and power samples said, and which requests ran meanwhile.

A trace is a JSON object (`.json`, or gzip of it) with these keys; others are ignored::

    info      {"name": GPU name, "driver": version, ...}                          (optional)
    anchors   [[ns before the counter read, ns after, mJ], ...]                   about one a second
    edges     the same at each new counter value; stands in for absent anchors, thinned
    samples   [[µs, mW], ...]     a stamp is the end of its 20 ms slot            (optional)
    marks     [[phase, ns], ...]                                                  (optional)
    requests  [{"t0", "t1", "stream", "chunks": [ns, ...], "status", "prompt_tokens", "completion_tokens",
                "model"?, "phase"?, "kind"?}, ...]   in any order                 (optional)

An anchor or a sample of a host with several GPUs ends with one more element: the GPU's index or its UUID. Times are
unix ns (samples: µs) of one clock. A file that breaks these rules is refused with the key and index that breaks them:
a trace that is half understood would be booked as energy that nobody drew.
"""

import gzip
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec

from .errors import TraceError
from .records import Counter, Gpu, Samples, Source
from .units import NS_PER_MS, NS_PER_US, UJ_PER_MJ

DEFAULT_MODEL: Final = "default"
"""The model of a request that names none."""
THIN_NS: Final = 950 * NS_PER_MS
"""Edges come every 100 ms give or take a few: asking for a full second would give 1.1 s windows."""

_MAX: Final = 2**63 - 1
"""Times (ns) and energies (µJ) end up in SQLite's signed 64 bits."""
_GZIP_MAGIC: Final = b"\x1f\x8b"

_Int = Annotated[int, msgspec.Meta(ge=0, le=_MAX)]
_Row = list[_Int | str]
_SHAPE: Final = {
    "anchors": "[ns before, ns after, mJ]",
    "edges": "[ns before, ns after, mJ]",
    "samples": "[µs, mW]",
}
_Key = int | str
"""What tells GPUs apart in the file: an index, or a UUID."""


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """One recorded request. `index` is its place in the file; times are unix ns, `start_ns` when the client sent it.

    `chunks_ns`: times of the streamed tokens, ascending, empty if it did not stream. Token counts, status, phase and
    kind are None when the recording does not tell.
    """

    index: int
    start_ns: int
    end_ns: int
    chunks_ns: tuple[int, ...]
    stream: bool
    http_status: int | None
    prompt_tokens: int | None
    completion_tokens: int | None
    model: str = DEFAULT_MODEL
    phase: str | None = None
    kind: str | None = None


@dataclass(frozen=True, slots=True)
class Mark:
    """A named instant of the recording, unix ns."""

    name: str
    at_ns: int


@dataclass(frozen=True, slots=True)
class Trace:
    """A validated recording. `anchors[i]` and `samples[i]` belong to `gpus[i]`.

    Each GPU has at least two anchors, ascending in time (the counter may fall: a reset was recorded). Samples are
    ascending; those of a GPU without any are empty. `requests` keep the order of the file, which need not be by time.
    """

    info: dict[str, Any]
    gpus: tuple[Gpu, ...]
    anchors: tuple[tuple[Counter, ...], ...]
    samples: tuple[Samples, ...]
    marks: tuple[Mark, ...]
    requests: tuple[TracedRequest, ...]


class _Request(msgspec.Struct):
    t0: _Int
    t1: _Int
    chunks: list[_Int] | None = None
    stream: bool | None = None
    status: int | None = None
    prompt_tokens: _Int | None = None
    completion_tokens: _Int | None = None
    model: str | None = None
    phase: str | None = None
    kind: str | None = None


class _File(msgspec.Struct):
    info: dict[str, Any] = {}
    anchors: list[_Row] | None = None
    edges: list[_Row] | None = None
    samples: list[_Row] = []
    marks: list[tuple[str, _Int]] = []
    requests: list[_Request] = []


def read_trace(path: Path, *, thin_ns: int = THIN_NS) -> Trace:
    """The trace in the file `path`, gzipped or not (told by its first bytes, not by its name).

    `thin_ns`: least distance of the anchors taken from `edges`. Raises TraceError for a file that cannot be read, is
    cut off, is no JSON or breaks the format.
    """
    try:
        return parse_trace(_unpacked(path), thin_ns=thin_ns)
    except TraceError as e:
        raise TraceError(f"trace {path}: {e}") from e


def parse_trace(text: bytes, *, thin_ns: int = THIN_NS) -> Trace:
    """The trace in the JSON `text`; see `read_trace`. Raises TraceError that names key and index, but no file."""
    try:
        file = msgspec.json.decode(text, type=_File)
    except msgspec.ValidationError as e:
        raise TraceError(f"{e}; `python -m pydoc energyd.daemon.trace` shows the format") from e
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise TraceError(f"not a complete JSON document ({e}); record it again or use another file") from e
    except RecursionError as e:
        raise TraceError("nested too deeply to be a trace; use another file") from e
    key, rows = ("edges", file.edges) if file.anchors is None else ("anchors", file.anchors)
    if rows is None:
        raise TraceError("neither 'anchors' nor 'edges': without counter readings there is no energy to book")
    anchors = _anchors(key, rows)
    if not anchors:
        raise TraceError(f"'{key}' is empty: without counter readings there is no energy to book")
    if key == "edges":
        anchors = {gpu: _thinned(counters, thin_ns) for gpu, counters in anchors.items()}
    samples = _samples(file.samples)
    gpus = _gpus(file.info, key, anchors, samples)
    return Trace(
        info=file.info,
        gpus=tuple(gpus.values()),
        anchors=tuple(tuple(anchors[gpu]) for gpu in gpus),
        samples=tuple(samples.get(gpu, Samples((), ())) for gpu in gpus),
        marks=tuple(Mark(name, at_ns) for name, at_ns in file.marks),
        requests=tuple(_request(i, r) for i, r in enumerate(file.requests)),
    )


def _unpacked(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise TraceError(f"cannot be read: {e.strerror}; check the path") from e
    if not raw.startswith(_GZIP_MAGIC):
        return raw
    try:
        return gzip.decompress(raw)
    except (EOFError, OSError, zlib.error) as e:
        raise TraceError(f"the gzip file is cut off or damaged ({e}); copy or record it again") from e


def _split(key: str, i: int, row: _Row) -> tuple[list[int], _Key]:
    """The numbers of row `i` of `key` and its GPU (0 if it names none); refuses any other shape."""
    width = _SHAPE[key].count(",") + 1
    numbers = [x for x in row[:width] if isinstance(x, int)]
    if len(numbers) < width or len(row) > width + 1:
        raise TraceError(
            f"{key}[{i}] is {row!s:.80}; expected {_SHAPE[key]}, after which a GPU's index or UUID may stand"
        )
    return numbers, row[width] if len(row) > width else 0


def _anchors(key: str, rows: Sequence[_Row]) -> dict[_Key, list[Counter]]:
    found: dict[_Key, list[Counter]] = {}
    for i, row in enumerate(rows):
        (before_ns, after_ns, counter_mj), gpu = _split(key, i, row)
        if before_ns > after_ns:
            raise TraceError(f"{key}[{i}] ends before it begins ({before_ns} > {after_ns})")
        if counter_mj > _MAX // UJ_PER_MJ:
            raise TraceError(f"{key}[{i}] has a counter of {counter_mj} mJ, more than can be booked")
        mine = found.setdefault(gpu, [])
        if mine and (before_ns < mine[-1].after_ns or before_ns == mine[-1].before_ns):
            raise TraceError(f"{key}[{i}] begins before the reading ahead of it has ended: they must ascend in time")
        mine.append(Counter(before_ns, after_ns, counter_mj))
    return found


def _thinned(counters: Sequence[Counter], thin_ns: int) -> list[Counter]:
    """The first, then each at least `thin_ns` after the one kept before it, and the last, so that no energy is lost."""
    kept = list(counters[:1])
    for c in counters[1:-1]:
        if c.before_ns - kept[-1].before_ns >= thin_ns:
            kept.append(c)
    return kept + list(counters[1:][-1:])


def _samples(rows: Sequence[_Row]) -> dict[_Key, Samples]:
    """Samples by GPU, sorted by stamp: overlapping fetches of the driver's ring repeat samples, which count once."""
    found: dict[_Key, dict[int, int]] = {}
    for i, row in enumerate(rows):
        (end_us, power_mw), gpu = _split("samples", i, row)
        if end_us > _MAX // NS_PER_US:
            raise TraceError(f"samples[{i}] has the stamp {end_us}: stamps are µs since 1970")
        if found.setdefault(gpu, {}).setdefault(end_us, power_mw) != power_mw:
            raise TraceError(f"samples[{i}] gives a second value for the stamp {end_us}: one slot has one mean power")
    return {
        gpu: Samples(tuple(us * NS_PER_US for us in sorted(by_stamp)), tuple(by_stamp[us] for us in sorted(by_stamp)))
        for gpu, by_stamp in found.items()
    }


def _gpus(
    info: dict[str, Any], key: str, anchors: dict[_Key, list[Counter]], others: Iterable[_Key]
) -> dict[_Key, Gpu]:
    """The GPUs of the anchors: by index, or UUIDs in order of appearance."""
    for gpu in others:
        if gpu not in anchors:
            raise TraceError(f"samples name GPU {gpu!r}, for which there are no {key}")
    if len({type(gpu) for gpu in anchors}) > 1:
        raise TraceError(f"{key} name some GPUs by index and some by UUID: use one of them throughout")
    for gpu, counters in anchors.items():
        if len(counters) < 2:
            raise TraceError(f"{key} hold one reading of GPU {gpu!r}: energy needs two")
    name, driver = str(info.get("name") or "unnamed GPU"), str(info.get("driver") or "unknown")
    ordered = sorted(anchors) if all(isinstance(gpu, int) for gpu in anchors) else list(anchors)
    return {
        gpu: Gpu(
            uuid=gpu if isinstance(gpu, str) else f"recording-{gpu}",
            index=place if isinstance(gpu, str) else gpu,
            name=name,
            driver=driver,
            source=_source(info),
        )
        for place, gpu in enumerate(ordered)
    }


def _source(info: dict[str, Any]) -> Source:
    """A recorded estimate or emulation stays one: recording it makes no measurement of it."""
    kept = {str(s): s for s in (Source.ESTIMATE, Source.EMULATED)}
    return kept.get(str(info.get("source")), Source.RECORDING)


def _request(i: int, r: _Request) -> TracedRequest:
    chunks = r.chunks or []
    if r.t0 > r.t1:
        raise TraceError(f"requests[{i}] ends before it begins (t0 {r.t0} > t1 {r.t1})")
    if any(a > b for a, b in pairwise([r.t0, *chunks, r.t1])):
        raise TraceError(f"requests[{i}].chunks do not ascend from t0 to t1")
    return TracedRequest(
        index=i,
        start_ns=r.t0,
        end_ns=r.t1,
        chunks_ns=tuple(chunks),
        stream=bool(chunks) if r.stream is None else r.stream,
        http_status=r.status,
        prompt_tokens=r.prompt_tokens,
        completion_tokens=r.completion_tokens,
        model=r.model or DEFAULT_MODEL,
        phase=r.phase,
        kind=r.kind,
    )
