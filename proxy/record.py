"""One query in flight, and what is told about it: `Open`, `Progress`, `Close`; and the book of those still open.

Whatever fails in here (observing, counting, queueing) is counted and swallowed: the traffic comes first. That rule is
kept in one place, `Watch`, the only thing that forwarding sees.
"""

import hashlib
import hmac
import logging
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from energyd.daemon import wire
from energyd.daemon.records import QueryStatus
from energyd.daemon.units import NS_PER_US

from . import headers
from .observe import RequestWatch, ResponseWatch, is_query, task_of

_LOG = logging.getLogger("energyd.proxy")
_MAX_DELTAS: Final = 1000
"""Chunk times per event: keeps a batch under the size that the daemon accepts."""
_CREDENTIALS: Final = (b"authorization", b"x-api-key", b"api-key")

Put = Callable[[wire.Event], None]


@dataclass(slots=True)
class Counts:
    """What a worker counts. `observe_errors`: steps of observation that broke, while the traffic went on."""

    observe_errors: int = 0
    requests: int = 0


def cut_name(name: str | None) -> str | None:
    """A name from outside, cut to 256 bytes of UTF-8 and freed of control characters; None if nothing is left."""
    if not name:
        return None
    cut = name[: wire.MAX_NAME_BYTES].encode("utf-8", "replace")[: wire.MAX_NAME_BYTES].decode("utf-8", "ignore")
    if not cut.isprintable():
        cut = "".join(letter for letter in cut if letter.isprintable())
    return cut.strip() or None


@dataclass(frozen=True, slots=True)
class Tenants:
    """Who asked: a keyed hash of the credential, or the value of a trusted header. Credentials are never kept."""

    key: bytes
    trusted_header: str | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    """Keyed hash → the name that the configuration gives it."""

    def of(self, fields: Iterable[headers.Field]) -> str | None:
        """Tenant of a request: 16 hex digits of HMAC-SHA256 under the host's key, or its name; None if it named nobody."""
        fields = list(fields)
        if self.trusted_header is not None:
            raw = headers.value(fields, self.trusted_header.lower().encode())
            return cut_name(raw.encode("latin-1").decode("utf-8", "replace"))
        for name in _CREDENTIALS:
            credential = headers.value(fields, name)
            if name == b"authorization":
                credential = credential.partition(" ")[2].strip()
            if credential:
                digest = hmac.new(self.key, credential.encode("latin-1"), hashlib.sha256).hexdigest()[:16]
                return self.names.get(digest, digest)
        return None


class Query:
    """One request on its way. Times are monotonic ns, given by the caller."""

    def __init__(
        self, *, put: Put, server: str, tenant: str | None, path: str, fields: list[headers.Field], now_ns: int
    ) -> None:
        self.query_id = secrets.token_hex(16)
        self._put = put
        self._task = task_of(path)
        content_type = headers.value(fields, b"content-type").lower()
        self._request = RequestWatch(path, content_type, headers.value(fields, b"content-encoding"))
        self._response: ResponseWatch | None = None
        self._http_status: int | None = None
        self._first_byte_ns: int | None = None
        self._last_byte_ns: int | None = None
        self._times: list[int] = []
        put(wire.Open(query_id=self.query_id, start_ns=now_ns, server=server, tenant=tenant))

    def upload(self, data: bytes) -> None:
        """Bytes of the request body went upstream."""
        self._request.feed(data)

    def head(self, status: int, fields: list[headers.Field]) -> None:
        """The response began; an answer of our own making has no fields."""
        self._http_status = status
        if fields:
            content_type = headers.value(fields, b"content-type")
            self._response = ResponseWatch(content_type, headers.value(fields, b"content-encoding"))

    def download(self, data: bytes, now_ns: int) -> None:
        """Bytes of the response body arrived at `now_ns`."""
        if self._first_byte_ns is None:
            self._first_byte_ns = now_ns
        self._last_byte_ns = now_ns
        if self._response is not None:
            self._times += [now_ns] * self._response.feed(data)

    def flush(self) -> None:
        """Tell the chunk times seen since the last call."""
        times, self._times = self._times, []
        for start in range(0, len(times), _MAX_DELTAS):
            part = [at // NS_PER_US for at in times[start : start + _MAX_DELTAS]]
            deltas = tuple(later - earlier for earlier, later in zip([part[0], *part], part, strict=False))
            self._put(wire.Progress(query_id=self.query_id, from_ns=times[start], deltas_us=deltas))

    def close(self, status: QueryStatus, now_ns: int) -> None:
        """The query is over: tell the rest. A non-2xx answer is a failure, and the names in it are nobody's models."""
        seen = self._response
        if seen is not None and (last := seen.finish()):
            self._times += [self._last_byte_ns or now_ns] * last
        self.flush()
        accepted = self._http_status is not None and 200 <= self._http_status < 300
        if status is QueryStatus.OK and not accepted:
            status = QueryStatus.FAILED
        counted = accepted and seen is not None
        prompt = seen.prompt_tokens if counted and seen else None
        completion = seen.completion_tokens if counted and seen else None
        source = "absent"
        if counted and seen and seen.reported:
            source = "response"
        elif counted and seen and seen.chunks:
            completion, source = seen.chunks, "estimated"
        self._put(
            wire.Close(
                query_id=self.query_id,
                end_ns=now_ns,
                status=status.value,
                http_status=self._http_status,
                first_byte_ns=self._first_byte_ns,
                requested=cut_name(self._request.model) if accepted else None,
                served=cut_name(seen.model) if counted and seen else None,
                task=self._task,
                stream=(seen is not None and seen.streamed) or self._request.stream,
                prompt_tokens=prompt,
                completion_tokens=completion,
                usage_source=source,
                upload_bytes=self._request.upload_bytes,
            )
        )

    def close_unread(self, status: QueryStatus, now_ns: int) -> None:
        """The query is over and its bytes could not be read: tell that much, or the daemon would wait for its end."""
        told = status.value
        self._put(wire.Close(query_id=self.query_id, end_ns=now_ns, status=told, http_status=self._http_status))


class Book:
    """The queries in flight of one worker."""

    def __init__(self, *, put: Put, server: str, tenants: Tenants, now_ns: Callable[[], int], counts: Counts) -> None:
        self._put = put
        self._server = server
        self._tenants = tenants
        self._now_ns = now_ns
        self._counts = counts
        self._open: dict[str, Query] = {}

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, method: str, path: str, fields: list[headers.Field]) -> "Watch":
        """A request arrived. Never raises; what is no query, or could not be opened, gets a watch that sees nothing."""
        watch = Watch(None, self._now_ns, self._counts, self._open)
        watch.guard(self._begin, watch, method, path, fields)
        return watch

    def flush(self) -> None:
        """Tell the chunk times of all open queries, so that everything before this moment is told."""
        for query in list(self._open.values()):
            query.flush()

    def _begin(self, watch: "Watch", method: str, path: str, fields: list[headers.Field]) -> None:
        self._counts.requests += 1
        if is_query(method, path):
            tenant = self._tenants.of(fields)
            query = Query(
                put=self._put, server=self._server, tenant=tenant, path=path, fields=fields, now_ns=self._now_ns()
            )
            self._open[query.query_id] = query
            watch.query = query


class Watch:
    """What forwarding tells about a request.

    No call raises, waits or blocks: a failure ends the observation, is counted, and the request goes on.
    """

    def __init__(
        self, query: Query | None, now_ns: Callable[[], int], counts: Counts, open_queries: dict[str, Query]
    ) -> None:
        self.query = query
        self._now_ns = now_ns
        self._counts = counts
        self._open = open_queries
        self._broken = False

    @property
    def query_id(self) -> str | None:
        """The query's id; None if this request is no query."""
        return self.query.query_id if self.query is not None else None

    def upload(self, data: bytes) -> None:
        """Bytes of the request body went upstream."""
        if self.query is not None and not self._broken:
            self.guard(self.query.upload, data)

    def head(self, status: int, fields: list[headers.Field]) -> None:
        """The response began."""
        if self.query is not None:
            self.guard(self.query.head, status, fields)

    def download(self, data: bytes) -> None:
        """Bytes of the response body arrived, now."""
        if self.query is not None and not self._broken:
            self.guard(self.query.download, data, self._now_ns())

    def close(self, status: QueryStatus) -> None:
        """The request is over."""
        if self.query is not None:
            self._open.pop(self.query.query_id, None)
            if not self.guard(self.query.close, status, self._now_ns()):
                self.guard(self.query.close_unread, status, self._now_ns())

    def guard(self, act: Callable[..., None], *args: object) -> bool:
        """Run one step of accounting; whatever it raises is counted and never reaches the request. False: it raised."""
        try:
            act(*args)
        except Exception as e:  # noqa: BLE001 - fail open: no defect of ours may touch a client's request
            self._broken = True
            self._counts.observe_errors += 1
            if self._counts.observe_errors == 1:
                _LOG.warning(
                    "observing a query failed (%s); its traffic goes on, further failures are only counted",
                    type(e).__name__,
                )
            return False
        return True
