"""Who was being served, by whom, and until when each proxy worker has told us everything. Pure bookkeeping in memory.

A window may be settled once every worker's watermark has passed its end and no query that overlaps it is still open, or
at the horizon, which counts only time in which daemon and workers were in touch.
"""

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .records import QueryStatus, Service
from .units import NS_PER_S

CONNECTED_NS = 5 * NS_PER_S
"""A worker heard of within this time is in touch; workers speak at least twice a second."""


@dataclass(slots=True)
class Activity:
    """One query from its arrival until its last window is settled. `chunks_ns` as offsets from `start_ns`."""

    query_id: str
    worker: str
    gpus: frozenset[str]
    start_ns: int
    end_ns: int | None = None
    chunks: "array[int]" = field(default_factory=lambda: array("q"))
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    model: str = ""
    status: QueryStatus = QueryStatus.OPEN
    partial: bool = False
    """A window was settled while it was still open."""
    late: bool = False
    """It was reported after a window of its time was settled."""
    source: str | None = None

    def last_seen_ns(self) -> int:
        """The last moment we know of, ns."""
        return self.end_ns if self.end_ns is not None else self.start_ns + (self.chunks[-1] if self.chunks else 0)

    def service(self, now_ns: int) -> Service:
        """What attribution sees; a query that is still open is in service until `now_ns`."""
        return Service(
            query_id=self.query_id,
            model=self.model,
            start_ns=self.start_ns,
            end_ns=self.end_ns if self.end_ns is not None else max(now_ns, self.start_ns + 1),
            chunks_ns=tuple(self.start_ns + c for c in self.chunks),
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
        )


@dataclass(slots=True)
class WorkerState:
    """A proxy worker as settlement sees it; times in ledger time."""

    worker: str
    offset_ns: int
    pid: int
    spool: str
    servers: Mapping[str, frozenset[str]]
    """Server name → UUIDs of its GPUs; empty: all."""
    watermark_ns: int
    heard_ns: int
    """When it last spoke, or when the daemon started, whichever is later."""

    def connected(self, now_ns: int) -> bool:
        """Whether it spoke within the last 5 s."""
        return now_ns - self.heard_ns < CONNECTED_NS


class ActivityBook:
    """The queries that unsettled windows may still need."""

    def __init__(self) -> None:
        self._all: dict[str, Activity] = {}

    def __len__(self) -> int:
        return len(self._all)

    def get(self, query_id: str) -> Activity | None:
        """The query, if it is still needed."""
        return self._all.get(query_id)

    def add(self, activity: Activity) -> None:
        """A query arrived; one that is already known stays as it is."""
        self._all.setdefault(activity.query_id, activity)

    def drop(self, query_ids: Iterable[str]) -> None:
        """These queries are final."""
        for query_id in query_ids:
            self._all.pop(query_id, None)

    def open_queries(self) -> list[Activity]:
        """Queries still running."""
        return [a for a in self._all.values() if a.end_ns is None]

    def closed_queries(self) -> list[Activity]:
        """Queries that ended but are not final yet."""
        return [a for a in self._all.values() if a.end_ns is not None]

    def on(self, gpu: str, start_ns: int, end_ns: int) -> list[Activity]:
        """Queries served on the GPU that touch [start, end), in order of id."""
        found = [
            a
            for a in self._all.values()
            if gpu in a.gpus and a.start_ns < end_ns and (a.end_ns is None or a.end_ns > start_ns)
        ]
        return sorted(found, key=lambda a: a.query_id)
