"""The local socket: proxies report queries, the bench reports runs. Unix socket, 0600, same user only; see `wire`."""

import json
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec
from aiohttp import web

from . import wire
from .errors import LedgerError, UnavailableError, UsageError
from .localclient import listens
from .questions import energy_answer
from .units import NS_PER_US

if TYPE_CHECKING:
    from .service import Service

log = logging.getLogger(__name__)
T = TypeVar("T", bound=msgspec.Struct)
_MAX_BODY = 64 * 1024 * 1024
_MOST_NS = 1 << 62
"""Clock values beyond this (146 years) are no clock's; two of them still fit SQLite's 64 bits."""
_MOST_PID = 1 << 22
_ENDED = ("ok", "failed", "aborted")


class _Rating(msgspec.Struct, frozen=True):
    rating_id: str
    created_ns: int
    edition: str
    method: str
    basis: str
    rows: list[dict[str, object]]


class LocalApi:
    """HTTP on the local socket; every handler hands its work to the writer thread."""

    def __init__(self, service: "Service") -> None:
        self._service = service
        self._runner: web.AppRunner | None = None
        self._path: Path | None = None

    async def start(self, path: Path) -> None:
        """Listen at `path` (0600); raises UnavailableError if a living daemon listens there."""
        _make_room(path)
        app = web.Application(middlewares=[_guard], client_max_size=_MAX_BODY)
        app.add_routes(
            [
                web.post(wire.PATH_HELLO, self._hello),
                web.post(wire.PATH_BATCH, self._batch),
                web.post(wire.PATH_BYE, self._bye),
                web.post(wire.PATH_RUN_START, self._run_start),
                web.post(wire.PATH_RUN_SAMPLES, self._run_samples),
                web.post(wire.PATH_RUN_END, self._run_end),
                web.post(wire.PATH_ENERGY, self._energy),
                web.post(wire.PATH_RATINGS, self._rating),
                web.get(wire.PATH_STATUS, self._status),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        mask = os.umask(0o177)  # the socket must not exist with wider rights even for an instant
        try:
            await web.UnixSite(self._runner, str(path)).start()
        finally:
            os.umask(mask)
        self._path = path

    async def stop(self) -> None:
        """Stop listening and remove the socket."""
        if self._runner:
            await self._runner.cleanup()
        if self._path:
            self._path.unlink(missing_ok=True)

    async def _hello(self, request: web.Request) -> web.Response:
        hello = await _body(request, wire.Hello)
        if hello.version != wire.WIRE_VERSION:
            raise web.HTTPBadRequest(text=f"format {hello.version} is not spoken here, but {wire.WIRE_VERSION}: update")
        _check(0 <= hello.pid < _MOST_PID and _clock(hello.mono_ns) and _clock(hello.unix_ns), "hello")
        s = self._service
        acked = await s.write(lambda: s.books.hello(hello, s.clock.now_ns()))
        return _answer(wire.HelloReply(acked))

    async def _batch(self, request: web.Request) -> web.Response:
        batch = await _body(request, wire.Batch)
        _check(batch.first_seq > 0 and _clock(batch.watermark_ns) and 0 <= batch.dropped < _MOST_NS, "batch")
        for place, event in enumerate(batch.events):
            _check(_sound(event), f"event {place}")
        s = self._service

        def take() -> bool:
            known = s.books.knows(batch.worker)
            if known:
                s.books.take(batch, s.clock.now_ns())
            return known

        if not await s.write(take):  # asked in the writer thread: it may have given the worker up a moment ago
            return web.Response(status=409, text="unknown worker: say hello again")
        return web.Response()

    async def _bye(self, request: web.Request) -> web.Response:
        bye = await _body(request, wire.Bye)
        s = self._service
        await s.write(lambda: s.books.bye(bye.worker, s.clock.now_ns()))
        return web.Response()

    async def _run_start(self, request: web.Request) -> web.Response:
        run = await _body(request, wire.RunStart)
        _check(_jsonable(run.provenance), "provenance")
        s = self._service
        await s.write(lambda: s.ledger.start_run(s.host_id, run, s.clock.now_ns()))
        return web.Response()

    async def _run_samples(self, request: web.Request) -> web.Response:
        message = await _body(request, wire.RunSamples)
        s = self._service
        moved = [
            msgspec.structs.replace(m, start_ns=m.start_ns + s.clock.offset_ns, end_ns=m.end_ns + s.clock.offset_ns)
            for m in message.samples
        ]
        await s.write(lambda: s.ledger.add_samples(message.run_id, moved))
        return web.Response()

    async def _run_end(self, request: web.Request) -> web.Response:
        end = await _body(request, wire.RunEnd)
        _check(_jsonable(end.summary), "summary")
        s = self._service
        offset_ns = s.clock.offset_ns
        moved = msgspec.structs.replace(end, start_ns=end.start_ns + offset_ns, end_ns=end.end_ns + offset_ns)
        await s.write(lambda: s.ledger.end_run(moved))
        return web.Response()

    async def _energy(self, request: web.Request) -> web.Response:
        question = await _body(request, wire.EnergyQuestion)
        s = self._service
        offset_ns = s.clock.offset_ns
        start_ns, end_ns = question.start_ns + offset_ns, question.end_ns + offset_ns
        gpus = [t.gpu for t in s.meters.values()]
        answer = await s.write(lambda: energy_answer(s.ledger, s.books, gpus, start_ns, end_ns, question.run_id))
        return _answer(answer)

    async def _rating(self, request: web.Request) -> web.Response:
        rating = await _body(request, _Rating)
        _check(_jsonable(rating.rows), "rows")
        s = self._service
        await s.write(lambda: s.ledger.add_rating(**msgspec.structs.asdict(rating)))
        return web.Response()

    async def _status(self, _request: web.Request) -> web.Response:
        return _answer(await status(self._service))


async def status(s: "Service") -> wire.Status:
    """What the daemon says of itself."""
    health = await s.health()
    return wire.Status(
        version=version("energyd"),
        host_id=s.host_id,
        boot_id=s.boot_id,
        offset_ns=s.clock.offset_ns,
        db=str(s.settings.db),
        policy=s.settings.policy,
        gpus=tuple(
            {
                "uuid": uuid, "index": t.gpu.index, "name": t.gpu.name, "driver": t.gpu.driver, "source": str(t.gpu.source),
                "power_limit_mw": t.gpu.power_limit_mw, "power_mw": health.power_mw[uuid],
                "idle_floor_mw": health.idle_floor_mw[uuid], "state": s.meter_state(uuid),
            }
            for uuid, t in s.meters.items()
        ),
        unsettled_uj=sum(health.unsettled_uj.values()),
        oldest_unsettled_age_ns=health.oldest_unsettled_age_ns,
        open_queries=health.open_queries,
        workers=health.workers,
    )  # fmt: skip


async def _body(request: web.Request, kind: type[T]) -> T:
    try:
        return msgspec.msgpack.decode(await request.read(), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise web.HTTPBadRequest(text=f"not a {kind.__name__}: {e}") from e


def _check(sound: bool, what: str) -> None:
    """Refuse what the types let through but the ledger could not hold, or could not read back after a restart."""
    if not sound:
        raise web.HTTPBadRequest(text=f"{what} holds a value that makes no sense")


def _clock(at_ns: int) -> bool:
    return 0 <= at_ns < _MOST_NS


def _sound(event: wire.Event) -> bool:
    if isinstance(event, wire.Open):
        return _clock(event.start_ns) and 0 < len(event.query_id) <= wire.MAX_NAME_BYTES
    if isinstance(event, wire.Progress):
        steps = event.deltas_us
        return _clock(event.from_ns) and min(steps, default=0) >= 0 and _clock(sum(steps) * NS_PER_US)
    times = (event.end_ns, event.first_byte_ns or 0)
    counts = (event.prompt_tokens or 0, event.completion_tokens or 0, event.upload_bytes or 0, event.http_status or 0)
    return event.status in _ENDED and all(map(_clock, times)) and all(0 <= n < _MOST_NS for n in counts)


def _jsonable(value: object) -> bool:
    """Whether the value can be stored as JSON: msgpack also has bytes, stamps and keys that are no text."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _answer(message: msgspec.Struct) -> web.Response:
    return web.Response(body=wire.encode(message), content_type="application/msgpack")


@web.middleware
async def _guard(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Peer credentials first; then failures of the ledger become 503, which tells a proxy to keep its events.

    What the schema refuses is the sender's fault: 400.
    """
    if not _same_user(request):
        raise web.HTTPForbidden(text="this socket answers its own user and root only")
    try:
        return await handler(request)
    except UsageError as e:
        return web.Response(status=400, text=str(e))
    except LedgerError as e:
        return web.Response(status=503, text=str(e))


def _same_user(request: web.Request) -> bool:
    peer = request.transport.get_extra_info("socket") if request.transport else None
    if peer is None:
        return False
    _pid, uid, _gid = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return uid in (0, os.geteuid())


def _make_room(path: Path) -> None:
    """A socket file may be left from a crash; a daemon that answers on it may not be pushed aside."""
    if listens(path):
        raise UnavailableError(f"a daemon already listens at {path}; stop it first, or give this one another --db")
    path.unlink(missing_ok=True)
