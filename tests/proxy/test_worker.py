"""One worker put together: what a request leaves with the daemon, and what it never does."""

import asyncio
import contextlib
import json
import logging
from pathlib import Path

import pytest

from energyd.daemon import wire
from energyd.daemon.errors import UnavailableError, UsageError
from energyd.proxy.app import listen
from energyd.proxy.cli import parse_listen, parse_upstream
from energyd.proxy.secret import tenant_key

from .standins import FakeDaemon, Peer, answering, raw_upstream, worker

PROMPT, ANSWER, SECRET = "MARKED-PROMPT", "MARKED-ANSWER", "sk-MARKED-KEY"
BODY = json.dumps({"model": "asked", "messages": [{"role": "user", "content": PROMPT}], "stream": True}).encode()
CHUNK = b'data: {"model":"served","choices":[{"index":0,"delta":{"content":"' + ANSWER.encode() + b'"}}]}\n\n'
USAGE = b'data: {"model":"served","choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\ndata: [DONE]\n\n'
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + CHUNK * 3 + USAGE


def post(body: bytes = BODY, *fields: bytes, path: bytes = b"/v1/chat/completions?key=" + SECRET.encode()) -> bytes:
    """A request that carries marked secrets."""
    head = [b"POST " + path + b" HTTP/1.1", b"Host: h", b"Content-Type: application/json", b"Connection: close"]
    head += [b"Authorization: Bearer " + SECRET.encode(), b"Content-Length: %d" % len(body), *fields]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


async def test_a_query_is_told(db: Path, daemon: FakeDaemon) -> None:
    """A streamed chat leaves names, counts, times and the server's description with the daemon."""
    settings = {"name": "llm", "gpus": ("0", "1")}
    async with raw_upstream(answering(STREAM)) as upstream, worker(upstream.port, db, **settings) as proxy:
        assert ANSWER.encode() in await proxy.exchange(post())
        await daemon.wait(daemon.closes)
        (close,) = daemon.closes()
        server = wire.Server(name="llm", url=f"http://127.0.0.1:{upstream.port}", gpus=("0", "1"))
        assert daemon.hellos[0].servers == (server,)
    (opened,) = [e for e in daemon.events if isinstance(e, wire.Open)]
    assert opened.server == "llm"
    assert opened.tenant is not None
    assert (close.status, close.http_status, close.task, close.stream) == ("ok", 200, "text_generation", True)
    assert (close.requested, close.served, close.upload_bytes) == ("asked", "served", len(BODY))
    assert (close.prompt_tokens, close.completion_tokens, close.usage_source) == (7, 3, "response")
    assert close.first_byte_ns is not None
    assert opened.start_ns <= close.first_byte_ns <= close.end_ns
    assert sum(len(e.deltas_us) for e in daemon.events if isinstance(e, wire.Progress)) == 3
    assert daemon.byes == [daemon.hellos[0].worker]


async def test_progress_is_told_while_it_happens(db: Path, daemon: FakeDaemon) -> None:
    """Chunks of a running query reach the daemon before it ends, and it counts as open."""
    go_on = asyncio.Event()

    async def stream(peer: Peer) -> None:
        await peer.request()
        await peer.send(STREAM.removesuffix(USAGE))
        await go_on.wait()
        await peer.send(USAGE)

    async with raw_upstream(stream) as upstream, worker(upstream.port, db) as proxy:
        running = asyncio.create_task(proxy.exchange(post()))
        await daemon.wait(lambda: any(isinstance(e, wire.Progress) for e in daemon.events))
        assert not daemon.closes()
        go_on.set()
        await running
        await daemon.wait(daemon.closes)


async def test_id_on_request_only(db: Path, daemon: FakeDaemon) -> None:
    """`x-energyd-report: 1` brings the id, and goes no further; nobody else sees anything of ours."""
    async with raw_upstream(answering(STREAM)) as upstream, worker(upstream.port, db) as proxy:
        answer = await proxy.exchange(post(BODY, b"X-Energyd-Report: 1"))
        assert b"energyd" not in upstream.peers[0].head.lower()
        assert b"energyd" not in await proxy.exchange(post())
        await daemon.wait(lambda: len(daemon.closes()) == 2)
    name = next(line for line in answer.split(b"\r\n") if line.startswith(b"x-energyd-id: "))
    assert name.split()[1].decode() == daemon.closes()[0].query_id


async def test_a_dead_daemon_changes_nothing(db: Path) -> None:
    """With no daemon at all, clients get the same bytes, and the query waits in the spool."""
    async with raw_upstream(answering(STREAM)) as upstream, worker(upstream.port, db) as proxy:
        answer = await proxy.exchange(post())
        assert CHUNK in answer
    assert len(list(db.with_suffix(".spool").glob("*.spool"))) == 1


async def test_accounting_that_breaks_changes_nothing(db: Path, daemon: FakeDaemon) -> None:
    """With an outbox that raises on every event, clients get the same bytes, and the failures are counted."""

    def broken(event: wire.Event) -> None:
        raise RuntimeError

    async with raw_upstream(answering(STREAM)) as upstream, worker(upstream.port, db) as proxy:
        expected = await proxy.exchange(post())
        proxy.worker._book._put = broken
        assert await proxy.exchange(post()) == expected
        assert proxy.worker.counts.observe_errors > 0


async def test_secrets_are_nowhere(db: Path, daemon: FakeDaemon, caplog: pytest.LogCaptureFixture) -> None:
    """Prompt, answer, key and query string are in no event, spool, file or log line, whatever goes wrong."""
    caplog.set_level(logging.DEBUG)
    marks = [PROMPT.encode(), ANSWER.encode(), SECRET.encode(), b"MARKED"]
    malformed = b"POST /" + SECRET.encode() + b" HTTP/1.1\r\nAuthorization\x01: " + SECRET.encode() + b"\r\n\r\n" + BODY
    async with raw_upstream(answering(STREAM)) as upstream, worker(upstream.port, db) as proxy:
        await proxy.exchange(post())
        await proxy.exchange(malformed)
        await daemon.wait(daemon.closes)
        upstream.handler = answering(
            b"HTTP/1.1 500 " + ANSWER.encode() + b"\r\nX: " + ANSWER.encode() + b"\x01\r\n\r\n"
        )
        await proxy.exchange(post())
        upstream.handler = answering(STREAM[:-300])
        await daemon.stop()
        await proxy.exchange(post())
        client = await proxy.connect()
        await client.send(post()[:-10])
        client.writer.close()
        await daemon.wait(lambda: list(db.with_suffix(".spool").glob("*.spool")))
        files = [p.read_bytes() for p in db.parent.rglob("*") if p.is_file()]
    written = b"".join(files) + daemon.bodies + caplog.text.encode()
    assert len(daemon.bodies) > 100
    assert any(b"open" in content for content in files)
    assert [mark for mark in marks if mark in written] == []


async def test_stop_lets_streams_end(db: Path, daemon: FakeDaemon) -> None:
    """A stop accepts nothing new, closes idle connections and waits for requests in flight, uploads included."""
    arrived, go_on = asyncio.Event(), asyncio.Event()

    async def stream(peer: Peer) -> None:
        await peer.request(body=False)
        arrived.set()
        await peer.chunks()
        await peer.send(STREAM.removesuffix(USAGE))
        await go_on.wait()
        await peer.send(USAGE)

    async with raw_upstream(stream) as upstream, worker(upstream.port, db, drain_s=10.0) as proxy:
        idle = await proxy.connect()
        client = await proxy.connect()
        await client.send(b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        await arrived.wait()
        stopping = asyncio.create_task(proxy.stop())
        assert await idle.reader.read() == b""
        with pytest.raises(OSError):
            await proxy.connect()
        await client.send(b"0\r\n\r\n")
        await client.reader.readuntil(CHUNK)
        go_on.set()
        assert (await client.reader.read()).endswith(b"0\r\n\r\n")
        await stopping
        idle.writer.close()
        client.writer.close()
    assert [c.status for c in daemon.closes()] == ["ok"]
    assert daemon.byes


async def test_stop_cuts_off_what_does_not_end(db: Path, daemon: FakeDaemon) -> None:
    """After the drain time a request is cut off, and still accounted for."""

    async def never(peer: Peer) -> None:
        await peer.request()
        await peer.send(STREAM.removesuffix(USAGE))
        await peer.gone()

    async with raw_upstream(never) as upstream, worker(upstream.port, db, drain_s=0.1) as proxy:
        client = await proxy.connect()
        await client.send(post())
        await client.reader.readuntil(CHUNK)
        await proxy.stop()
        assert not (await client.reader.read()).endswith(b"0\r\n\r\n")
        client.writer.close()
    assert [(c.status, c.completion_tokens, c.usage_source) for c in daemon.closes()] == [("aborted", 3, "estimated")]


async def test_a_large_upload_is_streamed(db: Path, daemon: FakeDaemon) -> None:
    """An upload far beyond any buffer arrives whole; it is counted, not kept."""
    size = 64 << 20

    async def count(peer: Peer) -> None:
        await peer.request(body=False)
        left = size
        while left:
            left -= len(await peer.reader.read(1 << 20))
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    async with raw_upstream(count) as upstream, worker(upstream.port, db) as proxy:
        client = await proxy.connect()
        await client.send(b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(64):
            await client.send(b"x" * (1 << 20))
        assert (await client.reader.readline()).startswith(b"HTTP/1.1 200")
        client.writer.close()
        await daemon.wait(daemon.closes)
    assert (daemon.closes()[0].upload_bytes, daemon.closes()[0].task) == (size, "asr")


# Settings.


def test_the_tenant_key(db: Path) -> None:
    """The key is made once, 32 bytes, 0600, and stays; a damaged one is refused by name."""
    key = tenant_key(db)
    file = db.with_suffix(".tenant-key")
    assert (len(key), file.stat().st_mode & 0o777, tenant_key(db)) == (32, 0o600, key)
    assert [p.name for p in db.parent.glob("*key*")] == [file.name]
    file.chmod(0o644)
    tenant_key(db)
    assert file.stat().st_mode & 0o777 == 0o600
    file.write_bytes(b"short")
    with pytest.raises(UsageError, match=r"e\.tenant-key has 5 bytes"):
        tenant_key(db)


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8000", "ftp://h", "http://", "http://h:99999", "http://h:x", "http://u:p@h", "http://h/?a=1", "http://h/#x"]
)  # fmt: skip
def test_bad_upstreams(url: str) -> None:
    """Anything that is not a plain URL of a server is refused in one line with an example."""
    with pytest.raises(UsageError, match=r"http://127\.0\.0\.1:8000") as refused:
        parse_upstream(url)
    assert "\n" not in str(refused.value)


def test_good_addresses() -> None:
    """URLs lose a final slash; IPv6 addresses stand in brackets."""
    assert parse_upstream("http://h:8000/") == "http://h:8000"
    assert parse_upstream("https://h/base/") == "https://h/base"
    assert parse_listen("127.0.0.1:8088") == ("127.0.0.1", 8088)
    assert parse_listen("[::1]:0") == ("::1", 0)


@pytest.mark.parametrize("address", ["", "8088", ":8088", "h:", "h:x", "h:70000", "::1:80", "h:-1", "h:²"])
def test_bad_listen_addresses(address: str) -> None:
    """Anything that is not HOST:PORT is refused in one line."""
    with pytest.raises(UsageError, match="--listen"):
        parse_listen(address)


def test_a_taken_port() -> None:
    """A port in use, or an address of another host, is one clear line."""
    with contextlib.closing(listen("127.0.0.1", 0)) as bound:
        bound.listen()
        port = bound.getsockname()[1]
        with pytest.raises(UnavailableError, match=rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use"):
            listen("127.0.0.1", port)
    with pytest.raises(UnavailableError, match="cannot listen on"):
        listen("192.0.2.1", 0)
    with pytest.raises(UnavailableError, match="cannot listen on"):
        listen("no.such.host.invalid", 0)
