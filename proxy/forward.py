"""Bytes in, bytes out: every method, path and header to the upstream and back, as they arrive, without buffering.

The observer (`record.Watch`) is told of bytes as they pass: it scans, never parses a large body, and cannot fail a request.

What each precaution prevents: `handler_cancellation` lets a client's leaving abort the upstream at once (else a
generation runs on for nobody); `auto_decompress=False` on both sides keeps encoded bodies and their lengths true; own
framing of the response keeps aiohttp from adding Date, Server and Content-Type; no total timeout lets a generation take
an hour; connections to the upstream are reused for less than the 5 s after which uvicorn closes them, because a POST
that meets a closing connection cannot be retried.

Two things are not passed on: trailers (aiohttp's parser drops them) and request header bytes that are no UTF-8 (they
arrive as the UTF-8 of their Latin-1 reading).
"""

import json
import logging
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Final

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from energyd.daemon.records import QueryStatus

from . import headers
from .record import Book, Watch

_MAX_FIELD_BYTES: Final = 256 * 1024
_MAX_FIELDS: Final = 1024
_CONNECT_S: Final = 5.0
_REUSE_S: Final = 4.0

_QUIET: Final = logging.Logger("energyd.proxy.http", logging.CRITICAL + 1)  # noqa: LOG001 - must have no parent
"""aiohttp logs malformed requests with their bytes, which may hold a key: its server logs nowhere."""


@dataclass(frozen=True, slots=True)
class Upstream:
    """The server behind the proxy. `base`: `scheme://host:port` and an optional path prefix, without a final slash.

    `own_host`: send the upstream's own name as `Host`, not what the client sent (endpoints behind a shared front).
    """

    base: str
    own_host: bool = False

    @property
    def host(self) -> str:
        """host[:port] as a `Host` field says it."""
        return URL(self.base).host_port_subcomponent or ""


def upstream_session() -> aiohttp.ClientSession:
    """The tuned client session for one upstream; the caller closes it."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_REUSE_S),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        max_line_size=_MAX_FIELD_BYTES,
        max_field_size=_MAX_FIELD_BYTES,
        max_headers=_MAX_FIELDS,
    )


class _ClientGoneError(Exception):
    """The client's connection is closed."""


class _Refusal(Exception):  # noqa: N818 - an answer, not a defect
    """We answer this request ourselves; `code` goes into `x-energyd-error`, to tell it from upstream's answers."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Reply(web.StreamResponse):
    """The response to one client, framed by ourselves; to aiohttp's server it looks already sent."""

    def __init__(self, request: web.BaseRequest, *, last: bool) -> None:
        super().__init__()
        self._request = request
        self._chunked = False
        self._bodiless = request.method == "HEAD"
        self.begun = False
        self.closing = last or not request.keep_alive
        """The connection ends with this response."""
        self._pending = b""

    @property
    def keep_alive(self) -> bool:
        """Whether aiohttp may read another request from this connection."""
        return not self.closing

    async def prepare(self, request: web.BaseRequest) -> None:
        """Nothing: the head has been sent."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing: the end has been sent."""

    def begin(self, status: int, reason: str, fields: list[headers.Field]) -> None:
        """Take the head; it leaves together with the first bytes of the body, or at `push`."""
        fields = list(fields)
        self.begun = True
        self._bodiless = self._bodiless or status in {204, 304}
        old = self._request.version < (1, 1)
        if not self._bodiless and not headers.value(fields, b"content-length"):
            if old:
                self.closing = True  # HTTP/1.0 knows no chunks: the end of the connection ends the body
            else:
                self._chunked = True
                fields.append((b"Transfer-Encoding", b"chunked"))
        if self.closing:
            fields.append((b"Connection", b"close"))
        elif old:
            fields.append((b"Connection", b"keep-alive"))
        self._pending = headers.head(status, reason, fields)

    async def push(self, data: bytes = b"", *, end: bool = False) -> None:
        """Send what is pending, `data`, and with `end` the end of the body; waits while the client reads slowly.

        Raises _ClientGoneError.
        """
        out, self._pending = self._pending, b""
        if data and not self._bodiless:
            out += b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data
        if end and self._chunked:
            out += b"0\r\n\r\n"
        if not out:
            return
        transport = self._request.transport
        if transport is None or transport.is_closing():
            raise _ClientGoneError
        transport.write(out)
        try:
            await self._request.writer.drain()
        except OSError as e:
            raise _ClientGoneError from e

    def go_on(self) -> None:
        """Answer `Expect: 100-continue`: the client may send its body."""
        if (transport := self._request.transport) is not None and not self.begun:
            transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def break_off(self) -> None:
        """End the connection so that the client sees a failure, never a complete response.

        What was received is flushed: a missing last chunk or missing bytes say enough. Only a body that ends with its
        connection (HTTP/1.0) would look complete, so that one is aborted.
        """
        self.closing = True
        transport = self._request.transport
        if transport is not None and self._request.version < (1, 1):
            transport.abort()
        self._request.protocol.force_close()


class Forwarder:
    """The handler of one worker's data listener."""

    def __init__(self, *, upstream: Upstream, session: aiohttp.ClientSession, book: Book) -> None:
        self._upstream = upstream
        self._session = session
        self._book = book
        self._in_flight: set[object] = set()
        self.draining = False
        """Set at the stop: each connection ends with its current response."""

    def server(self) -> web.Server:
        """The aiohttp server that feeds this handler."""
        return web.Server(
            self.handle,
            handler_cancellation=True,
            auto_decompress=False,
            access_log=None,
            logger=_QUIET,
            max_line_size=_MAX_FIELD_BYTES,
            max_field_size=_MAX_FIELD_BYTES,
            max_headers=_MAX_FIELDS,
        )

    def busy(self, connection: object) -> bool:
        """Whether a request is in flight on this connection of the server."""
        return connection in self._in_flight

    @property
    def in_flight(self) -> int:
        """Requests being served."""
        return len(self._in_flight)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Serve one request. Accounting happens without any await, so that a cancellation cannot skip it."""
        target = _origin_form(request.raw_path)
        watch = self._book.begin(request.method, target.partition("?")[0], list(request.raw_headers))
        reply = Reply(request, last=self.draining)
        self._in_flight.add(request.protocol)
        status = QueryStatus.ABORTED
        try:
            status = await self._serve(request, target, reply, watch)
        except _ClientGoneError:
            reply.break_off()
        finally:
            self._in_flight.discard(request.protocol)
            watch.close(status)
        return reply

    async def _serve(self, request: web.BaseRequest, target: str, reply: Reply, watch: Watch) -> QueryStatus:
        body = _Body(request, reply, watch)
        try:
            _check(request, target)
            answer = await self._ask(request, target, body)
            try:
                watch.head(answer.status, list(answer.raw_headers))
                fields = headers.forwarded(answer.raw_headers) + _report(request, watch)
                reply.begin(answer.status, answer.reason or "", fields)
                await _relay(answer.content, reply, watch)
            finally:
                answer.close()  # no effect on a response read to its end: its connection is back in the pool
        except _Refusal as refusal:
            await _refuse(request, reply, watch, refusal)
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as e:
            if request.transport is None:
                raise _ClientGoneError from e
            if reply.begun:
                reply.break_off()
            else:
                await _refuse(request, reply, watch, _reason(e, body))
        else:
            return QueryStatus.OK
        return QueryStatus.FAILED

    def _ask(self, request: web.BaseRequest, target: str, body: "_Body") -> Awaitable[aiohttp.ClientResponse]:
        fields = headers.upstream_request(request.raw_headers)
        host = self._upstream.host.encode()
        if self._upstream.own_host:
            fields = [(key, host if key.lower() == b"host" else found) for key, found in fields]
        if not headers.value(fields, b"host"):
            fields.insert(0, (b"Host", host))
        length = headers.value(fields, b"content-length")
        chunked = body.exists and not length
        exact = headers.as_text(fields)
        if chunked:
            exact.append(("Transfer-Encoding", "chunked"))

        async def verbatim(asked: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
            # After aiohttp has had its say: order, spelling, duplicates and absences are the client's.
            asked.headers = CIMultiDict(exact)
            return await send(asked)

        return self._session.request(
            request.method,
            _exact_url(self._upstream.base, target),
            headers={"Content-Length": length} if length else None,
            data=body.stream() if body.exists else None,
            chunked=True if chunked else None,
            allow_redirects=False,
            middlewares=(verbatim,),
        )


class _Body:
    """A request's body on its way up."""

    def __init__(self, request: web.BaseRequest, reply: Reply, watch: Watch) -> None:
        self._request = request
        self._reply = reply
        self._watch = watch
        self.exists = request.body_exists
        self.broken = False
        """The client's framing is wrong, or it left in the middle."""

    async def stream(self) -> AsyncIterator[bytes]:
        """The body's bytes as they arrive."""
        if self._request.headers.get("Expect", "").lower() == "100-continue":
            self._reply.go_on()
        try:
            async for data in self._request.content.iter_any():
                self._watch.upload(data)
                yield data
        except (web.RequestPayloadError, OSError):
            self.broken = True
            raise


async def _relay(content: aiohttp.StreamReader, reply: Reply, watch: Watch) -> None:
    """The body of a response, each read written at once; the head leaves with the first read if that is here."""
    data = content.read_nowait()
    if not data and not content.at_eof():
        await reply.push()
    while True:
        end = content.at_eof()
        if data:
            watch.download(data)
        await reply.push(data, end=end)
        if end:
            return
        data = await content.readany()


def _report(request: web.BaseRequest, watch: Watch) -> list[headers.Field]:
    """The id of the query, for a client that asked for it."""
    if watch.query_id is None or not headers.wants_report(request.raw_headers):
        return []
    return [(headers.QUERY_ID, watch.query_id.encode())]


async def _refuse(request: web.BaseRequest, reply: Reply, watch: Watch, refusal: _Refusal) -> None:
    """Answer ourselves, in the shape that OpenAI clients read."""
    error = {"message": refusal.message, "type": "energyd_proxy_error", "param": None, "code": refusal.code}
    body = json.dumps({"error": error}).encode()
    watch.head(refusal.status, [])
    reply.closing = True  # the request's body may be unread
    fields = [
        (b"Content-Type", b"application/json"),
        (b"Content-Length", b"%d" % len(body)),
        (headers.ERROR, refusal.code.encode()),
        *_report(request, watch),
    ]
    reply.begin(refusal.status, _REASONS[refusal.status], fields)
    await reply.push(body, end=True)


_REASONS: Final = {400: "Bad Request", 501: "Not Implemented", 502: "Bad Gateway"}


def _reason(e: BaseException, body: _Body) -> _Refusal:
    """Why there is no answer, in words without the request's path, headers or body."""
    if body.broken:
        return _Refusal(400, "bad-request-body", "energyd proxy: the request body is malformed or was cut off")
    if isinstance(e, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError | ValueError):
        return _Refusal(
            502, "upstream-unreachable", f"energyd proxy: the upstream cannot be reached ({type(e).__name__})"
        )
    if isinstance(e, aiohttp.ClientResponseError):
        return _Refusal(502, "upstream-invalid", "energyd proxy: the upstream answered with something that is not HTTP")
    return _Refusal(502, "upstream-closed", "energyd proxy: the upstream closed the connection before it answered")


def _check(request: web.BaseRequest, target: str) -> None:
    if request.method == "CONNECT" or not target.startswith("/"):
        raise _Refusal(501, "not-supported", "energyd proxy: only requests to a path are forwarded")
    if request.headers.get("Upgrade", "").lower() == "websocket":
        raise _Refusal(
            501, "websocket-not-supported", "energyd proxy: WebSocket is not forwarded; connect to the server itself"
        )


def _origin_form(target: str) -> str:
    """Path and query of a request target; the authority of an absolute form never chooses where a request goes."""
    if target.startswith(("http://", "https://")):
        path = target.split("://", 1)[1]
        cut = min((i for i in (path.find("/"), path.find("?")) if i >= 0), default=len(path))
        return path[cut:] if path[cut : cut + 1] == "/" else "/" + path[cut:]
    return target


def _exact_url(base: str, target: str) -> URL:
    """The URL whose request line is `target`, byte for byte: yarl alone would drop the `?` of an empty query."""
    url = URL(base + target, encoded=True)
    exact = URL(base, encoded=True).raw_path.rstrip("/") + target
    url._cache["raw_path_qs"] = exact  # type: ignore[typeddict-item,unused-ignore]  # noqa: SLF001 - no public way; a test holds it
    return url
