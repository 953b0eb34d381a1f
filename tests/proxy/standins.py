"""Small real servers that stand on either side of the proxy."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from energyd.daemon import wire
from energyd.proxy.app import Settings, Worker, listen
from energyd.proxy.forward import Upstream

KEY = bytes(range(32))


class Peer:
    """The upstream's side of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.head = b""
        self.body = b""

    async def request(self, *, body: bool = True) -> None:
        """Read one request: `head` as it came, `body` without chunk framing (a chunked one ends at its last chunk)."""
        self.head = await self.reader.readuntil(b"\r\n\r\n")
        lower = self.head.lower()
        if not body:
            return
        if b"transfer-encoding: chunked" in lower:
            self.body = await self.chunks()
        elif b"content-length:" in lower:
            size = int(lower.split(b"content-length:")[1].split(b"\r\n")[0])
            self.body = await self.reader.readexactly(size)

    async def chunks(self) -> bytes:
        """A chunked body, decoded."""
        body = b""
        while size := int(await self.reader.readline(), 16):
            body += await self.reader.readexactly(size)
            await self.reader.readline()
        await self.reader.readline()
        return body

    async def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.writer.write(data)
        await self.writer.drain()

    async def gone(self) -> None:
        """Wait until the other side has closed."""
        with contextlib.suppress(OSError):
            while await self.reader.read(65536):
                pass


Handler = Callable[[Peer], Awaitable[None]]


@dataclass
class RawUpstream:
    """A server whose every byte the test decides: `handler` gets each connection, which then closes."""

    handler: Handler
    port: int = 0
    peers: list[Peer] = field(default_factory=list)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer)
        self.peers.append(peer)
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            await self.handler(peer)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def raw_upstream(handler: Handler) -> AsyncIterator[RawUpstream]:
    """A RawUpstream on a free port of 127.0.0.1."""
    upstream = RawUpstream(handler)
    server = await asyncio.start_server(upstream._connected, "127.0.0.1", 0, limit=1 << 20)
    upstream.port = server.sockets[0].getsockname()[1]
    try:
        yield upstream
    finally:
        server.close()
        for peer in upstream.peers:
            peer.writer.close()


def answering(response: bytes) -> Handler:
    """A handler that reads one request and answers with `response`, then closes."""

    async def handler(peer: Peer) -> None:
        await peer.request()
        await peer.send(response)

    return handler


@dataclass
class FakeDaemon:
    """The daemon's local API, kept as the contract says: what a 200 has answered is committed, and known by its number.

    `committed`, `acked`: survive `stop` and `start`, as a database does; `known` (who said hello) does not.
    """

    socket: Path
    committed: dict[str, list[wire.Event]] = field(default_factory=dict)
    acked: dict[str, int] = field(default_factory=dict)
    hellos: list[wire.Hello] = field(default_factory=list)
    byes: list[str] = field(default_factory=list)
    watermarks: dict[str, list[int]] = field(default_factory=dict)
    heartbeats: int = 0
    gaps: list[tuple[str, int, int]] = field(default_factory=list)
    lose_replies: int = 0
    refuse: int = 0
    hold: asyncio.Event | None = None
    bodies: bytes = b""
    known: set[str] = field(default_factory=set)
    _runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Listen."""
        app = web.Application()
        app.router.add_post(wire.PATH_HELLO, self._hello)
        app.router.add_post(wire.PATH_BATCH, self._batch)
        app.router.add_post(wire.PATH_BYE, self._bye)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        self.socket.parent.mkdir(parents=True, exist_ok=True)
        self.socket.unlink(missing_ok=True)
        await web.UnixSite(self._runner, str(self.socket)).start()

    async def stop(self) -> None:
        """Die: connections break, who said hello is forgotten."""
        if self._runner is not None:
            self.known.clear()
            await self._runner.cleanup()
            self._runner = None
            self.socket.unlink(missing_ok=True)

    @property
    def events(self) -> list[wire.Event]:
        """All committed events, worker by worker."""
        return [event for worker in self.committed.values() for event in worker]

    def closes(self) -> list[wire.Close]:
        """The committed closes."""
        return [event for event in self.events if isinstance(event, wire.Close)]

    async def wait(self, condition: Callable[[], Any], timeout_s: float = 10) -> None:
        """Wait until `condition` holds; fails after a time that only a defect needs."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.01)

    async def _hello(self, request: web.Request) -> web.Response:
        hello = msgspec.msgpack.decode(await self._read(request), type=wire.Hello)
        self.hellos.append(hello)
        self.known.add(hello.worker)
        return web.Response(body=wire.encode(wire.HelloReply(acked_seq=self.acked.get(hello.worker, 0))))

    async def _batch(self, request: web.Request) -> web.Response:
        batch = msgspec.msgpack.decode(await self._read(request), type=wire.Batch)
        if batch.worker not in self.known:
            return web.Response(status=409)
        if self.hold is not None:
            await self.hold.wait()
        if self.refuse and batch.events:
            self.refuse -= 1
            return web.Response(status=400)
        acked = self.acked.get(batch.worker, 0)
        if batch.events and batch.first_seq > acked + 1:
            self.gaps.append((batch.worker, acked, batch.first_seq))
        self.heartbeats += not batch.events
        fresh = batch.events[max(0, acked + 1 - batch.first_seq) :]
        self.committed.setdefault(batch.worker, []).extend(fresh)
        self.acked[batch.worker] = max(acked, batch.first_seq + len(batch.events) - 1)
        self.watermarks.setdefault(batch.worker, []).append(batch.watermark_ns)
        if self.lose_replies and batch.events:
            self.lose_replies -= 1
            assert request.transport is not None
            request.transport.abort()
        return web.Response()

    async def _bye(self, request: web.Request) -> web.Response:
        self.byes.append(msgspec.msgpack.decode(await self._read(request), type=wire.Bye).worker)
        return web.Response()

    async def _read(self, request: web.Request) -> bytes:
        body = await request.read()
        self.bodies += body
        return body


@dataclass
class Running:
    """A worker that serves on `port`."""

    worker: Worker
    port: int
    stopped: bool = False

    async def stop(self) -> None:
        """Stop as at SIGTERM."""
        if not self.stopped:
            self.stopped = True
            await self.worker.stop()

    async def connect(self) -> Peer:
        """A client's raw connection."""
        return Peer(*await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20))

    async def exchange(self, request: bytes) -> bytes:
        """Send raw bytes on a fresh connection and read until it closes."""
        client = await self.connect()
        await client.send(request)
        answer = await client.reader.read()
        client.writer.close()
        return answer


@contextlib.asynccontextmanager
async def worker(upstream_port: int, db: Path, **settings: Any) -> AsyncIterator[Running]:
    """A proxy worker in this event loop, in front of 127.0.0.1:`upstream_port`."""
    bound = listen("127.0.0.1", 0)
    base = f"http://127.0.0.1:{upstream_port}{settings.pop('prefix', '')}"
    upstream = Upstream(base, own_host=settings.pop("own_host", False))
    chosen = {"drain_s": 0.2, "tenant_key": KEY, "name": "server", **settings}
    made = Worker(Settings(upstream=upstream, db=db, **chosen))
    await made.start(bound)
    running = Running(made, bound.getsockname()[1])
    try:
        yield running
    finally:
        await running.stop()
