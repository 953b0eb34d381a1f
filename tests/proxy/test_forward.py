"""Bytes in are bytes out."""

import asyncio
import contextlib
import gzip
import random
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .standins import FakeDaemon, Peer, answering, raw_upstream, worker

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def split(message: bytes) -> tuple[bytes, list[bytes], bytes]:
    """First line, header lines in order, body."""
    head, _, body = message.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    return first, lines, body


async def sent_upstream(db: Path, request: bytes, **options: str) -> Peer:
    """What reaches the upstream when a client sends `request`."""
    async with raw_upstream(answering(OK)) as upstream, worker(upstream.port, db, **options) as proxy:
        assert b"200 OK" in await proxy.exchange(request)
        return upstream.peers[0]


async def received(db: Path, response: bytes, method: bytes = b"GET") -> bytes:
    """What a client gets when the upstream sends `response`."""
    async with raw_upstream(answering(response)) as upstream, worker(upstream.port, db) as proxy:
        return await proxy.exchange(method + b" / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")


async def test_request_head_is_verbatim(db: Path) -> None:
    """Target, order, spelling and duplicates of header fields arrive as sent; only hop-by-hop fields are missing."""
    lines = [b"x-a: 1", b"hOsT: some.where:1", b"X-A: 2", b"x-a:  3", b"Accept: */*", b"Cookie: a=1; b=2", b"X-Empty: "]
    hop = [b"Connection: close, X-Hop", b"X-Hop: 1", b"Keep-Alive: 5", b"TE: trailers", b"Upgrade: h2c"]
    target = b"/a%2Fb/../c//d%zz?x=%20+&y=&y="
    peer = await sent_upstream(db, b"GET " + target + b" HTTP/1.1\r\n" + b"\r\n".join(lines + hop) + b"\r\n\r\n")
    first, got, _ = split(peer.head)
    assert first == b"GET " + target + b" HTTP/1.1"
    assert got == [line.replace(b":  ", b": ") for line in lines]


@pytest.mark.parametrize("target", [b"/p?", b"/", b"/?", b"//x/y", b"/p?a=b?c", b"/%41?%41", b"/a;b=c"])
async def test_targets(db: Path, target: bytes) -> None:
    """Odd request targets arrive byte for byte."""
    peer = await sent_upstream(db, b"GET " + target + b" HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
    assert split(peer.head)[0] == b"GET " + target + b" HTTP/1.1"


async def test_prefix_and_host_of_the_upstream(db: Path) -> None:
    """A path in --upstream is put before the target, and its own Host is sent only if that was asked for."""
    peer = await sent_upstream(
        db, b"GET /v1/models HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n", prefix="/base", own_host="yes"
    )
    first, lines, _ = split(peer.head)
    assert first == b"GET /base/v1/models HTTP/1.1"
    assert lines[0].startswith(b"Host: 127.0.0.1:")


async def test_absolute_form_goes_to_our_upstream(db: Path) -> None:
    """The authority of an absolute request target never chooses where a request goes."""
    peer = await sent_upstream(
        db, b"GET http://other.host:9/p?q=1 HTTP/1.1\r\nHost: other\r\nConnection: close\r\n\r\n"
    )
    assert split(peer.head)[0] == b"GET /p?q=1 HTTP/1.1"


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "OPTIONS", "POST"])
async def test_methods_and_bodies(db: Path, method: str) -> None:
    """Any method passes, with its body and length; nothing is added to a request without a body."""
    raw = method.encode()
    peer = await sent_upstream(
        db, raw + b" / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nConnection: close\r\n\r\na\0b"
    )
    assert (split(peer.head)[0], peer.body) == (raw + b" / HTTP/1.1", b"a\0b")
    peer = await sent_upstream(db, raw + b" / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
    assert split(peer.head)[1] == [b"Host: h"]


async def test_chunked_upload_of_encoded_bytes(db: Path) -> None:
    """A chunked gzip body arrives chunked, still compressed, with its Content-Encoding."""
    body = gzip.compress(b"x" * 100_000)
    request = b"POST /v1/x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nContent-Encoding: gzip\r\n"
    request += b"Connection: close\r\n\r\n"
    request += b"".join(b"%x\r\n%b\r\n" % (len(body[i : i + 7]), body[i : i + 7]) for i in range(0, len(body), 7))
    peer = await sent_upstream(db, request + b"0\r\n\r\n")
    assert peer.body == body
    assert split(peer.head)[1] == [b"Host: h", b"Content-Encoding: gzip", b"Transfer-Encoding: chunked"]


async def test_expect_is_answered(db: Path) -> None:
    """A client that waits for `100 Continue` gets it before it sends its body, and one complete response after it."""
    async with raw_upstream(answering(OK)) as upstream, worker(upstream.port, db) as proxy:
        client = await proxy.connect()
        await client.send(b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send(b"body")
        assert (await client.reader.readexactly(len(OK))) == OK
        assert upstream.peers[0].body == b"body"
        assert b"expect" not in upstream.peers[0].head.lower()
        client.writer.close()


async def test_response_is_verbatim(db: Path) -> None:
    """Status, reason, order, spelling, duplicates and odd bytes of a response arrive; nothing is added."""
    response = (
        b"HTTP/1.1 418 I'm a Teapot\r\nset-cookie: a=1\r\nSet-Cookie: b=2\r\nX-Latin: M\xfcller\r\nX-Utf: \xc3\xa9\r\n"
        b"Retry-After: 7\r\nX-Accel-Buffering: no\r\nContent-Length: 3\r\n\r\na\0b"
    )
    answer = await received(db, response)
    assert answer == response.replace(b"Length: 3\r\n", b"Length: 3\r\nConnection: close\r\n")


@pytest.mark.parametrize(
    "response",
    [
        b"HTTP/1.1 204 No Content\r\nX-A: 1\r\n\r\n",
        b"HTTP/1.1 304 Not Modified\r\nETag: x\r\nContent-Length: 900\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    ],
)
async def test_empty_responses(db: Path, response: bytes) -> None:
    """Responses without a body end with their head, whatever length they name."""
    assert await received(db, response) == response.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")


async def test_head(db: Path) -> None:
    """The answer to HEAD keeps its Content-Length and has no body."""
    response = b"HTTP/1.1 200 OK\r\nContent-Length: 12345\r\nContent-Type: text/x\r\n\r\n"
    assert await received(db, response, b"HEAD") == response.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")


async def test_encoded_response_stays_encoded(db: Path) -> None:
    """A gzip body passes as it is, and its length stays true."""
    body = gzip.compress(b"hello" * 1000)
    answer = await received(
        db, b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    )
    assert answer.endswith(b"\r\n\r\n" + body)


async def test_body_that_ends_with_the_connection(db: Path) -> None:
    """A response without length reaches an HTTP/1.1 client in chunks and an HTTP/1.0 client until the end."""
    response = b"HTTP/1.1 200 OK\r\nX: 1\r\n\r\nabc"
    answer = await received(db, response)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\nX: 1\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n")
    assert answer.endswith(b"0\r\n\r\n")
    async with raw_upstream(answering(response)) as upstream, worker(upstream.port, db) as proxy:
        assert (
            await proxy.exchange(b"GET / HTTP/1.0\r\n\r\n")
            == b"HTTP/1.1 200 OK\r\nX: 1\r\nConnection: close\r\n\r\nabc"
        )


async def test_each_event_is_passed_on_at_once(db: Path) -> None:
    """A streamed event reaches the client before the upstream sends the next one."""
    seen = asyncio.Event()
    events = [b'data: {"choices":[{"text":"%d"}]}\n\n' % i for i in range(5)]

    async def stream(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for event in events:
            await seen.wait()
            seen.clear()
            await peer.send(b"%x\r\n%b\r\n" % (len(event), event))
        await peer.send(b"0\r\n\r\n")

    async with raw_upstream(stream) as upstream, worker(upstream.port, db) as proxy:
        client = await proxy.connect()
        await client.send(b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n")
        head = await client.reader.readuntil(b"\r\n\r\n")  # also the head comes before the first event
        assert b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked" in head
        for event in events:
            seen.set()
            assert int(await client.reader.readline(), 16) == len(event)
            assert await client.reader.readexactly(len(event) + 2) == event + b"\r\n"
        assert await client.reader.readexactly(5) == b"0\r\n\r\n"
        client.writer.close()


async def test_connections_are_reused_and_pipelined(db: Path) -> None:
    """One client connection carries many requests, also sent at once, over one upstream connection."""

    async def serve(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(peer.body), peer.body))

    async with raw_upstream(serve) as upstream, worker(upstream.port, db) as proxy:
        client = await proxy.connect()
        await client.send(b"".join(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\n%d" % i for i in range(5)))
        for i in range(5):
            head = await client.reader.readuntil(b"\r\n\r\n")
            assert b"Content-Length: 1" in head
            assert await client.reader.readexactly(1) == b"%d" % i
        assert len(upstream.peers) == 1
        client.writer.close()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), size=st.integers(0, 300_000), chunked=st.booleans(), encoded=st.booleans())
async def test_any_body_survives(
    db: Path, daemon: FakeDaemon, seed: int, size: int, chunked: bool, encoded: bool
) -> None:
    """Random bodies, cut anywhere, framed either way, come back as they went."""
    body = random.Random(seed).randbytes(size)
    cuts = random.Random(seed + 1)

    async def echo(peer: Peer) -> None:
        await peer.request()
        head = b"HTTP/1.1 200 OK\r\n" + (b"Content-Encoding: gzip\r\n" if encoded else b"")
        if not chunked:
            await peer.send(head + b"Content-Length: %d\r\n\r\n" % len(peer.body) + peer.body)
            return
        await peer.send(head + b"Transfer-Encoding: chunked\r\n\r\n")
        rest = peer.body
        while rest:
            size = cuts.randint(1, 70_000)
            await peer.send(b"%x\r\n%b\r\n" % (len(rest[:size]), rest[:size]))
            rest = rest[size:]
        await peer.send(b"0\r\n\r\n")

    raw = aiohttp.ClientSession(auto_decompress=False)
    async with raw_upstream(echo) as upstream, worker(upstream.port, db) as proxy, raw as session:
        sent = _pieces(body) if chunked else body
        async with session.post(f"http://127.0.0.1:{proxy.port}/v1/completions", data=sent) as answer:
            assert await answer.read() == body


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), 9999):
        yield body[start : start + 9999]


# Failures.


async def test_upstream_unreachable(db: Path, daemon: FakeDaemon) -> None:
    """A dead upstream is a 502 in the shape of OpenAI's errors, marked as ours, and a failed query."""
    async with raw_upstream(answering(OK)) as upstream:
        port = upstream.port
    async with worker(port, db) as proxy:
        answer = await proxy.exchange(b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}")
        assert answer.startswith(b"HTTP/1.1 502 Bad Gateway\r\n")
        assert b"\r\nx-energyd-error: upstream-unreachable\r\n" in answer
        assert b'{"error": {"message": "energyd proxy: the upstream cannot be reached' in answer
        await daemon.wait(daemon.closes)
        assert [(c.status, c.http_status) for c in daemon.closes()] == [("failed", 502)]


@pytest.mark.parametrize(
    ("response", "code"),
    [
        (b"", b"upstream-closed"),
        (b"nonsense\r\n\r\n", b"upstream-invalid"),
        (b"HTTP/1.1 200 OK\r\nX", b"upstream-closed"),
    ],
)
async def test_upstream_that_does_not_answer(db: Path, response: bytes, code: bytes) -> None:
    """An upstream that hangs up, or answers with something else than HTTP, is a 502 that says which."""
    async with raw_upstream(answering(response)) as upstream, worker(upstream.port, db) as proxy:
        answer = await proxy.exchange(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\nx")
        assert answer.startswith(b"HTTP/1.1 502 ")
        assert b"x-energyd-error: " + code in answer
        assert len(upstream.peers) == 1, "a POST is never retried"


@pytest.mark.parametrize(
    "response",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n9\r\nab",
        b"HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\nabc",
    ],
)
async def test_upstream_that_dies_in_the_middle(db: Path, daemon: FakeDaemon, response: bytes) -> None:
    """The client gets what there was and then a broken end, never a complete response; the query failed."""
    async with raw_upstream(answering(response)) as upstream, worker(upstream.port, db) as proxy:
        answer = await proxy.exchange(b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n")
        assert b"abc" in answer
        assert not answer.endswith(b"0\r\n\r\n")
        await daemon.wait(daemon.closes)
        assert [(c.status, c.http_status) for c in daemon.closes()] == [("failed", 200)]


async def test_upstream_that_dies_is_seen_by_an_old_client(db: Path) -> None:
    """An HTTP/1.0 client, to which the end of the connection ends the body, sees a reset instead of an end."""
    dying = answering(b"HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\nabc")
    async with raw_upstream(dying) as upstream, worker(upstream.port, db) as proxy:
        answer = await proxy.exchange(b"GET / HTTP/1.0\r\n\r\n")
        assert b"Content-Length: 30" in answer  # so that it knows that bytes are missing
        assert not answer.endswith(b"abc" * 10)


async def test_early_answer_to_an_upload(db: Path) -> None:
    """An upstream that refuses an upload before its end is heard."""

    async def refuse(peer: Peer) -> None:
        await peer.request(body=False)
        await peer.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nbig")

    async with raw_upstream(refuse) as upstream, worker(upstream.port, db) as proxy:
        client = await proxy.connect()
        await client.send(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000\r\n\r\nstart")
        assert (await client.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 413 Too Large\r\n")
        assert await client.reader.readexactly(3) == b"big"
        client.writer.close()


async def test_malformed_request_body(db: Path, daemon: FakeDaemon) -> None:
    """Broken chunk framing of a client never reaches the upstream as a complete request."""
    complete = asyncio.Event()

    async def wait(peer: Peer) -> None:
        await peer.request(body=False)
        with contextlib.suppress(ValueError):
            await peer.chunks()
            complete.set()

    async with raw_upstream(wait) as upstream, worker(upstream.port, db) as proxy:
        client = await proxy.connect()
        await client.send(b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        await daemon.wait(lambda: upstream.peers)
        await client.send(b"zz\r\n")
        client.writer.close()
        await daemon.wait(daemon.closes)
        assert daemon.closes()[0].status in {"aborted", "failed"}
        assert not complete.is_set()


@pytest.mark.parametrize("request_line", [b"CONNECT a:1 HTTP/1.1", b"OPTIONS * HTTP/1.1"])
async def test_what_is_no_path_is_refused(db: Path, request_line: bytes) -> None:
    """Tunnels and the asterisk are a clean 501 of ours."""
    async with raw_upstream(answering(OK)) as upstream, worker(upstream.port, db) as proxy:
        answer = await proxy.exchange(request_line + b"\r\nHost: h\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 501 ")
        assert not upstream.peers


async def test_websocket_is_refused(db: Path) -> None:
    """A WebSocket handshake is a clean 501 that says so; the server behind hears nothing."""
    handshake = b"GET /v1/realtime HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    handshake += b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    async with raw_upstream(answering(OK)) as upstream, worker(upstream.port, db) as proxy:
        answer = await proxy.exchange(handshake)
        assert answer.startswith(b"HTTP/1.1 501 ")
        assert b"x-energyd-error: websocket-not-supported" in answer
        assert not upstream.peers


# Clients that leave.


@pytest.mark.parametrize("moment", ["upload", "before", "plain", "stream"])
async def test_client_leaves(db: Path, daemon: FakeDaemon, moment: str) -> None:
    """When a client leaves, the upstream's connection closes, whatever the moment, and the query counts as aborted."""
    reached, gone = asyncio.Event(), asyncio.Event()

    async def generate(peer: Peer) -> None:
        await peer.request(body=moment != "upload")
        if moment == "plain":
            await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc")
        elif moment == "stream":
            head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
            event = b'data: {"model":"m","choices":[{"text":"a"}]}\n\n'
            await peer.send(head + b"%x\r\n%b\r\n" % (len(event), event))
        reached.set()
        await peer.gone()
        gone.set()

    async with raw_upstream(generate) as upstream, worker(upstream.port, db) as proxy:
        client = await proxy.connect()
        length = 1000 if moment == "upload" else 0
        await client.send(b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % length)
        await client.send(b"x" * (length // 2))
        await reached.wait()
        if moment in {"plain", "stream"}:
            await client.reader.readuntil(b"\r\n\r\n")
        client.writer.close()
        async with asyncio.timeout(5):
            await gone.wait()
        await daemon.wait(daemon.closes)
        (close,) = daemon.closes()
        assert close.status == "aborted"
        assert close.http_status == (200 if moment in {"plain", "stream"} else None)
        assert close.completion_tokens == (1 if moment == "stream" else None)
        assert close.usage_source == ("estimated" if moment == "stream" else "absent")


async def test_slow_reader_slows_the_upstream(db: Path) -> None:
    """A client that does not read stops the upstream's sending: nothing piles up in the proxy."""
    sent = 0

    async def flood(peer: Peer) -> None:
        nonlocal sent
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (200 << 20))
        with contextlib.suppress(TimeoutError):
            while sent < 200 << 20:
                async with asyncio.timeout(0.5):
                    await peer.send(b"x" * (1 << 20))
                sent += 1 << 20

    async with raw_upstream(flood) as upstream, worker(upstream.port, db) as proxy:
        client = await proxy.connect()
        await client.send(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        await client.reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(1)
        assert sent < 100 << 20
        client.writer.close()
