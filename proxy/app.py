"""One proxy worker: composition, start, drain and stop."""

import asyncio
import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from energyd.daemon import wire
from energyd.daemon.clock import boot_id
from energyd.daemon.errors import UnavailableError
from energyd.daemon.paths import make_private, socket_path, spool_dir

from .forward import Forwarder, Upstream, upstream_session
from .link import Link
from .outbox import Outbox
from .record import Book, Counts, Tenants

_LOG = logging.getLogger("energyd.proxy")
_BACKLOG = 1024


@dataclass(frozen=True, slots=True)
class Settings:
    """What a worker needs to know. `name`: of the server, for people. `gpus`: UUIDs or indices, empty for all.

    `db`: the ledger, beside which socket, spools and tenant key lie; it is never opened here. `tenant_key`: 32 bytes.
    """

    upstream: Upstream
    db: Path
    name: str
    tenant_key: bytes
    gpus: tuple[str, ...] = ()
    tenant_header: str | None = None
    tenant_names: Mapping[str, str] = field(default_factory=dict)
    spool_limit_bytes: int = 256 * 1024 * 1024
    drain_s: float = 30.0


def listen(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A bound socket, not yet listening; `shared` for one of several workers. Raises UnavailableError."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, proto)
    except OSError as e:
        raise UnavailableError(
            f"cannot listen on {host}:{port}: {e.strerror}; give --listen an address of this host"
        ) from e
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind(address)
    except OSError as e:
        bound.close()
        hint = "is it in use? stop that program or choose another --listen HOST:PORT"
        raise UnavailableError(f"cannot listen on {host}:{port}: {os.strerror(e.errno or 0)}; {hint}") from e
    return bound


async def work(
    settings: Settings, bound: socket.socket, *, ready: Callable[[], None], parent: int | None = None
) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second SIGINT ends the draining.

    `ready` is called once connections are accepted. `parent`: stop also when that process is no longer our parent.
    """
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_only_the_type)
    stop, hurry = asyncio.Event(), asyncio.Event()

    def interrupted() -> None:
        (hurry if stop.is_set() else stop).set()

    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, interrupted)
    worker = Worker(settings)
    await worker.start(bound)
    ready()
    orphaned = asyncio.create_task(_stop_when_orphaned(parent, stop)) if parent is not None else None
    try:
        await stop.wait()
    finally:
        if orphaned is not None:
            orphaned.cancel()
        await worker.stop(hurry)


class Worker:
    """The parts of one worker, put together."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.counts = Counts()
        folder = make_private(spool_dir(settings.db))
        name = secrets.token_hex(8)
        hello = wire.Hello(
            worker=name,
            boot_id=boot_id(),
            mono_ns=time.monotonic_ns(),
            unix_ns=time.time_ns(),
            pid=os.getpid(),
            servers=(wire.Server(name=settings.name, url=settings.upstream.base, gpus=settings.gpus),),
            spool=f"{name}.spool",
        )
        self._link = Link(socket_path(settings.db))
        self.outbox = Outbox(
            hello=hello,
            link=self._link,
            spool_dir=folder,
            spool_limit_bytes=settings.spool_limit_bytes,
            now_ns=time.monotonic_ns,
        )
        self._book = Book(
            put=self.outbox.put,
            server=settings.name,
            tenants=Tenants(settings.tenant_key, settings.tenant_header, settings.tenant_names),
            now_ns=time.monotonic_ns,
            counts=self.counts,
        )
        self.outbox.ask(tell=self._book.flush, open_queries=lambda: len(self._book))

    async def start(self, bound: socket.socket) -> None:
        """Accept connections on `bound` and deliver events."""
        self._session = upstream_session()
        self.forwarder = Forwarder(upstream=self._settings.upstream, session=self._session, book=self._book)
        self._server = self.forwarder.server()
        self._listener = await asyncio.get_running_loop().create_server(self._server, sock=bound, backlog=_BACKLOG)
        self._delivery = asyncio.create_task(self._deliver())

    async def stop(self, hurry: asyncio.Event | None = None) -> None:
        """Accept nothing more, let requests end (for at most `drain_s`, or until `hurry`), deliver what they told."""
        self._listener.close()
        self.forwarder.draining = True
        for connection in self._server.connections:
            if not self.forwarder.busy(connection):  # closing a busy one would lose the rest of its upload
                connection.force_close()
        until = time.monotonic() + self._settings.drain_s
        while self.forwarder.in_flight and time.monotonic() < until and not (hurry and hurry.is_set()):  # noqa: ASYNC110 - three conditions, one of them a clock
            await asyncio.sleep(0.02)
        if self.forwarder.in_flight:
            _LOG.warning("energyd proxy: %d requests did not end in time and are cut off", self.forwarder.in_flight)
        await self._server.shutdown(timeout=0.1)
        self._delivery.cancel()
        await asyncio.gather(self._delivery, return_exceptions=True)
        await self.outbox.farewell()
        await self._link.close()
        await self._session.close()

    async def _deliver(self) -> None:
        while True:
            try:
                await self.outbox.run()
            except* Exception as e:  # noqa: BLE001 - loop root: the traffic goes on whatever delivery does
                _LOG.warning("energyd proxy: delivery failed and starts again: %s", type(e.exceptions[0]).__name__)
            await asyncio.sleep(1)


async def _stop_when_orphaned(parent: int, stop: asyncio.Event) -> None:
    while os.getppid() == parent:  # noqa: ASYNC110 - nothing tells a process that its parent died
        await asyncio.sleep(1)
    stop.set()


def _only_the_type(_loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
    # asyncio would print the exception's text, which may quote a URL or a header of a client.
    kind = type(context.get("exception")).__name__ if context.get("exception") else context.get("message")
    _LOG.warning("energyd proxy: unhandled on the event loop: %s", kind)
