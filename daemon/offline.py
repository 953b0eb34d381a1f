"""Booking a recorded trace: the same meter, settlement and ledger as live, fed by a file and as fast as it goes."""

from collections.abc import Iterator
from pathlib import Path

from .attribution import policy as policy_named
from .errors import EndOfTrace
from .ledger import Ledger
from .meter import Meter
from .records import QueryStatus
from .sensors.recording import RecordingSensor
from .settlement import Books, Limits
from .trace import Trace, TracedRequest
from .units import NS_PER_S, NS_PER_US
from .wire import Batch, Close, Event, Hello, Open, Progress

WORKER = "recording"
_BATCH = 500


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
        offset_ns=0, now_ns=start_ns, limits=Limits(greeting_ns=0),
    )  # fmt: skip
    meters = {gpu.uuid: Meter(gpu.uuid, gpu.source, books.add_gpu(gpu, None)) for gpu in trace.gpus}
    books.hello(Hello(WORKER, boot_id, 0, 0, 0, ()), latest_ns)
    sequence = 1
    for events in _batches(trace):
        books.take(Batch(WORKER, sequence, tuple(events), 0), latest_ns)
        sequence += len(events)
    books.take(Batch(WORKER, sequence, (), latest_ns), latest_ns)
    sensor = RecordingSensor(trace)
    for gpu in sensor.gpus():
        meter = meters[gpu.uuid]
        while True:
            try:
                reading = sensor.read(gpu)
            except EndOfTrace:
                break
            books.add_windows(meter.feed(reading))
    books.advance(latest_ns)
    books.finish_recording()
    books.bye(WORKER, latest_ns)
    return books


def query_id(request: TracedRequest, width: int) -> str:
    """The id of a recorded request: its zero-padded place in the file (a recording is not sorted by time)."""
    return f"{request.index:0{width}d}"


def _batches(trace: Trace) -> Iterator[list[Event]]:
    width = max(4, len(str(len(trace.requests))))
    events: list[Event] = []
    for request in trace.requests:
        events.extend(_events(request, query_id(request, width)))
        if len(events) >= _BATCH:
            yield events
            events = []
    if events:
        yield events


def _events(r: TracedRequest, qid: str) -> Iterator[Event]:
    yield Open(qid, r.start_ns, WORKER)
    if r.chunks_ns:
        yield Progress(qid, r.start_ns, _deltas_us(r.start_ns, r.chunks_ns))
    ok = r.http_status is None or 200 <= r.http_status < 300
    yield Close(
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
