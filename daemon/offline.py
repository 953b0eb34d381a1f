"""Booking a recorded trace: the same meter, settlement and ledger as live, fed by a file and as fast as it goes."""

from collections.abc import Iterator
from heapq import merge
from operator import itemgetter
from pathlib import Path

from .attribution import policy as policy_named
from .errors import EndOfTrace
from .ledger import Ledger
from .meter import Meter
from .records import Gpu, QueryStatus, Reading
from .sensors.recording import RecordingSensor
from .settlement import Books, Limits
from .trace import Trace, TracedRequest
from .units import NS_PER_S, NS_PER_US
from .wire import Batch, Close, Event, Hello, Open, Progress

WORKER = "recording"


def rival_of(policy: str) -> str:
    """The policy whose charges are compared with `policy` for the uncertainty of the split."""
    return "tokens" if policy == "time" else "time"


def settle_trace(
    trace: Trace, ledger: Ledger, *, policy: str, host_id: str = "recording", boot_id: str = "recording"
) -> Books:
    """Book the whole trace into an empty ledger; returns the books, with everything settled and final."""
    start_ns = min(anchors[0].before_ns for anchors in trace.anchors)
    end_ns = max(anchors[-1].after_ns for anchors in trace.anchors)
    latest_ns = max([end_ns, *(r.end_ns for r in trace.requests)]) + NS_PER_S
    ledger.register_host(host_id, host_id, start_ns)
    books = Books(
        ledger, host_id=host_id, boot_id=boot_id, policy=policy_named(policy), rival=policy_named(rival_of(policy)),
        offset_ns=0, now_ns=start_ns, limits=Limits(greeting_ns=0, horizon_ns=latest_ns - start_ns),
    )  # fmt: skip
    meters = {gpu.uuid: Meter(gpu.uuid, gpu.source, books.add_gpu(gpu, None)) for gpu in trace.gpus}
    books.hello(Hello(WORKER, boot_id, 0, 0, 0, ()), start_ns)
    post = _Post(trace)
    for gpu, reading, now_ns in _readings(trace):
        books.take(post.until(now_ns), now_ns)
        books.add_windows(meters[gpu.uuid].feed(reading))
        books.advance(now_ns)
    books.take(post.until(latest_ns), latest_ns)
    books.advance(latest_ns)
    books.finish_recording()
    books.bye(WORKER, latest_ns)
    return books


def _readings(trace: Trace) -> Iterator[tuple[Gpu, Reading, int]]:
    """The readings of all GPUs in order of time, as a daemon would have made them."""
    sensor = RecordingSensor(trace)

    def of(gpu: Gpu) -> Iterator[tuple[int, Gpu, Reading]]:
        while True:
            try:
                reading = sensor.read(gpu)
            except EndOfTrace:
                return
            yield (reading.counter.after_ns if reading.counter else 0), gpu, reading

    for now_ns, gpu, reading in merge(*(of(gpu) for gpu in sensor.gpus()), key=itemgetter(0)):
        yield gpu, reading, now_ns


class _Post:
    """The proxy of a recording: tells of each request when it came and when it ended.

    Queries that are settled leave the books, so a recording of a day costs what a day's daemon costs.
    """

    def __init__(self, trace: Trace) -> None:
        width = max(4, len(str(len(trace.requests))))
        events = (event for r in trace.requests for event in _events(r, query_id(r, width)))
        self._events = sorted(events, key=itemgetter(0))
        self._sent = 0

    def until(self, now_ns: int) -> Batch:
        """Everything up to `now_ns` that was not told yet."""
        first = self._sent
        while self._sent < len(self._events) and self._events[self._sent][0] <= now_ns:
            self._sent += 1
        told = tuple(event for _, event in self._events[first : self._sent])
        return Batch(WORKER, first + 1, told, now_ns)


def query_id(request: TracedRequest, width: int) -> str:
    """The id of a recorded request: its zero-padded place in the file (a recording is not sorted by time)."""
    return f"{request.index:0{width}d}"


def _events(r: TracedRequest, qid: str) -> Iterator[tuple[int, Event]]:
    yield r.start_ns, Open(qid, r.start_ns, WORKER)
    if r.chunks_ns:
        yield max(r.end_ns, r.start_ns), Progress(qid, r.start_ns, _deltas_us(r.start_ns, r.chunks_ns))
    ok = r.http_status is None or 200 <= r.http_status < 300
    close = Close(
        query_id=qid,
        end_ns=r.end_ns,
        status=str(QueryStatus.OK if ok else QueryStatus.FAILED),
        http_status=r.http_status,
        first_byte_ns=r.chunks_ns[0] if r.chunks_ns else None,
        requested=r.model,
        served=r.model,
        task="text_generation",
        stream=r.stream,
        prompt_tokens=r.prompt_tokens,
        completion_tokens=r.completion_tokens,
        usage_source="response" if r.completion_tokens is not None else "absent",
    )
    yield max(r.end_ns, r.start_ns), close


def _deltas_us(from_ns: int, times_ns: tuple[int, ...]) -> tuple[int, ...]:
    """Delta-coded µs whose running sum never strays from the true time by more than 1 µs."""
    deltas, reached_us = [], 0
    for time_ns in times_ns:
        at_us = max(reached_us, (time_ns - from_ns) // NS_PER_US)
        deltas.append(at_us - reached_us)
        reached_us = at_us
    return tuple(deltas)


def default_db(trace: Path) -> Path:
    """Where the books of a trace go if nobody says: beside the working folder, never into the host's own ledger."""
    return Path(trace.name.split(".")[0] + ".db")
