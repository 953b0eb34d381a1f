"""What proxy and bench say to the daemon over its local socket: HTTP on a Unix socket, msgpack bodies.

The proxy sends `Batch`es of events, each with a sequence number of its worker. The daemon commits a batch in one
transaction and answers 200; only then the worker forgets it. A batch that arrives twice is recognised by its sequence
numbers and skipped, so delivery is exactly once across crashes of either side.

Times are **monotonic** ns of the sender's boot; the `Hello` that precedes them carries boot id and offset, so the daemon
places them on its own ledger time (see `clock`), also after a reboot. Nothing here can hold a prompt, an answer or a key:
only counts, times, names and keyed hashes.

Format history: 1 (0.1.0).
"""

from typing import Final

import msgspec

WIRE_VERSION: Final = 1

PATH_HELLO: Final = "/v1/hello"
PATH_BATCH: Final = "/v1/batch"
PATH_BYE: Final = "/v1/bye"
PATH_RUN_START: Final = "/v1/runs/start"
PATH_RUN_SAMPLES: Final = "/v1/runs/samples"
PATH_RUN_END: Final = "/v1/runs/end"
PATH_ENERGY: Final = "/v1/energy"
PATH_STATUS: Final = "/v1/status"
PATH_RATINGS: Final = "/v1/ratings"

MAX_NAME_BYTES: Final = 256
"""Names come from clients: longer ones are cut."""


class Server(msgspec.Struct, frozen=True):
    """An upstream server: `name` (for people), `url`, and the GPUs (UUIDs or indices as text) it runs on; empty: all."""

    name: str
    url: str
    gpus: tuple[str, ...] = ()


class Hello(msgspec.Struct, frozen=True):
    """A proxy worker (or the spool of a dead one, delivered by its heir) introduces itself.

    `mono_ns` and `unix_ns` are one instant on both clocks of the boot `boot_id`. `adopted`: the worker that wrote these
    events is dead; `pid` is then 0.
    """

    worker: str
    boot_id: str
    mono_ns: int
    unix_ns: int
    pid: int
    servers: tuple[Server, ...]
    spool: str = ""
    adopted: bool = False
    version: int = WIRE_VERSION


class HelloReply(msgspec.Struct, frozen=True):
    """The daemon's answer: it has committed this worker's events up to and including `acked_seq` (0: none)."""

    acked_seq: int


class Open(msgspec.Struct, frozen=True, tag="open"):
    """A request arrived. `query_id`: 32 hex digits (128 random bits). `tenant`: keyed hash or name, None if nobody said."""

    query_id: str
    start_ns: int
    server: str
    tenant: str | None = None


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """Streamed content chunks since the last report: times as deltas in µs from `from_ns` on, each from the one before."""

    query_id: str
    from_ns: int
    deltas_us: tuple[int, ...]


class Close(msgspec.Struct, frozen=True, tag="close", kw_only=True):
    """A query ended. `status`: ok, failed, aborted. Counts are None when unknown.

    `requested`, `served`: model names as the client asked and the server answered (None: not seen). `usage_source`:
    `response`, `estimated` (content chunks counted) or `absent`. `upload_bytes`: size of the request body.
    """

    query_id: str
    end_ns: int
    status: str
    http_status: int | None
    first_byte_ns: int | None = None
    requested: str | None = None
    served: str | None = None
    task: str | None = None
    stream: bool = False
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    usage_source: str = "absent"
    upload_bytes: int | None = None


Event = Open | Progress | Close


class Batch(msgspec.Struct, frozen=True):
    """Events `first_seq`, `first_seq + 1`, … of `worker` (may be none: a heartbeat), and its watermark.

    `watermark_ns` (monotonic): every event of a query that *opened or progressed* before it is in this or an earlier
    batch. `dropped` counts events lost to a full outbox since the worker began, `open_queries` those still running.
    """

    worker: str
    first_seq: int
    events: tuple[Event, ...]
    watermark_ns: int
    dropped: int = 0
    open_queries: int = 0


class Bye(msgspec.Struct, frozen=True):
    """A worker (or the delivery of a dead one's spool) has nothing more to say and must not be waited for."""

    worker: str


class RunStart(msgspec.Struct, frozen=True):
    """A bench run begins; `provenance` is JSON-able and free of prompts."""

    run_id: str
    task: str
    model: str
    batch_size: int
    url: str
    provenance: dict[str, object]


class Sample(msgspec.Struct, frozen=True):
    """One sample of a run, joined to its query by the id that came back in `x-energyd-id` (None: no proxy on the path)."""

    idx: int
    query_id: str | None
    phase: str
    """`warmup` or `measured`."""
    start_ns: int
    end_ns: int
    ok: bool
    http_status: int | None
    error: str | None = None


class RunSamples(msgspec.Struct, frozen=True):
    """Sample rows of a run; (run, phase, idx) is the key, so sending them twice changes nothing. Times: monotonic ns."""

    run_id: str
    boot_id: str
    samples: tuple[Sample, ...]


class RunEnd(msgspec.Struct, frozen=True):
    """A run ended (`status`: `complete`, `failed` or `interrupted`).

    `start_ns`, `end_ns`: the measured span (monotonic ns). `summary`: the statistics of `bench.summary`, JSON-able.
    """

    run_id: str
    status: str
    start_ns: int
    end_ns: int
    summary: dict[str, object]


class EnergyQuestion(msgspec.Struct, frozen=True):
    """Asks how much the GPUs drew over [start_ns, end_ns) (monotonic ns), and with `run_id` the queries of that run."""

    start_ns: int
    end_ns: int
    run_id: str | None = None


class GpuEnergy(msgspec.Struct, frozen=True):
    """One GPU's answer: whole-GPU energy over the span, with its source and one standard deviation (µJ)."""

    uuid: str
    index: int
    name: str
    source: str
    energy_uj: int
    u_uj: int
    idle_floor_mw: int | None


class EnergyAnswer(msgspec.Struct, frozen=True):
    """`settled`: every window of the span is settled and every query of the run final; else figures are provisional.

    `complete`: the meter has read past the end of the span. `queries` counts the run's measured queries, of which
    `queries_with_energy` have a figure; `active_uj` and `standing_uj` are their sums (None: no run asked for).
    """

    settled: bool
    complete: bool
    gpus: tuple[GpuEnergy, ...]
    queries: int | None = None
    queries_with_energy: int | None = None
    active_uj: int | None = None
    standing_uj: int | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Status(msgspec.Struct, frozen=True):
    """What the daemon says of itself: used by `energyd status`, the bench's provenance and the tests."""

    version: str
    host_id: str
    boot_id: str
    offset_ns: int
    db: str
    policy: str
    gpus: tuple[dict[str, object], ...]
    unsettled_uj: int
    oldest_unsettled_age_ns: int | None
    open_queries: int
    workers: int


def encode(message: msgspec.Struct) -> bytes:
    """Msgpack of one message."""
    return msgspec.msgpack.encode(message)
