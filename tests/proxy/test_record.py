"""From bytes to events: what is told of a query, and what never is."""

import msgspec
import pytest

from energyd.daemon import wire
from energyd.daemon.records import QueryStatus
from energyd.proxy.record import Book, Counts, Tenants, Watch, cut_name

JSON = [(b"Content-Type", b"application/json")]
SSE = [(b"Content-Type", b"text/event-stream")]
REQUEST = b'{"model":"asked","stream":true}'


class Clock:
    """Monotonic time that the test sets."""

    def __init__(self) -> None:
        self.ns = 1_000_000_000

    def __call__(self) -> int:
        return self.ns


class Desk:
    """A book whose events the test reads."""

    def __init__(self, tenants: Tenants | None = None) -> None:
        self.events: list[wire.Event] = []
        self.clock = Clock()
        self.counts = Counts()
        self.book = Book(
            put=self.events.append,
            server="s",
            tenants=tenants or Tenants(b"k" * 32),
            now_ns=self.clock,
            counts=self.counts,
        )

    def begin(self, *fields: tuple[bytes, bytes], path: str = "/v1/completions") -> Watch:
        return self.book.begin("POST", path, [*JSON, *fields])

    @property
    def close(self) -> wire.Close:
        event = self.events[-1]
        assert isinstance(event, wire.Close)
        return event


def times(events: list[wire.Event]) -> list[int]:
    """Chunk times as the daemon reads them."""
    found = []
    for event in events:
        if isinstance(event, wire.Progress):
            at = event.from_ns
            for delta in event.deltas_us:
                at += delta * 1000
                found.append(at)
    return found


def test_a_streamed_query() -> None:
    """Open, progress, close: times, names, counts and sizes."""
    desk = Desk()
    watch = desk.begin()
    watch.upload(REQUEST)
    desk.clock.ns += 50
    watch.head(200, SSE)
    expected = []
    for i in range(5):
        desk.clock.ns += 20_000_000
        watch.download(b'data: {"model":"served","choices":[{"text":"a"}]}\n\n')
        expected.append(desk.clock.ns)
        if i == 2:
            desk.book.flush()
    desk.clock.ns += 7
    watch.close(QueryStatus.OK)
    opened = desk.events[0]
    assert isinstance(opened, wire.Open)
    assert (opened.start_ns, opened.server, opened.tenant, len(opened.query_id)) == (1_000_000_000, "s", None, 32)
    assert [abs(a - b) < 1000 for a, b in zip(times(desk.events), expected, strict=True)] == [True] * 5
    assert desk.close == wire.Close(
        query_id=opened.query_id, end_ns=desk.clock.ns, status="ok", http_status=200, first_byte_ns=expected[0],
        requested="asked", served="served", task="text_generation", stream=True, prompt_tokens=None,
        completion_tokens=5, usage_source="estimated", upload_bytes=len(REQUEST),
    )  # fmt: skip
    assert len(desk.book) == 0


def test_reported_usage_wins() -> None:
    """Usage of the response is taken over the count of chunks."""
    desk = Desk()
    watch = desk.begin()
    watch.head(200, SSE)
    watch.download(b'data: {"choices":[{"text":"a"}],"usage":{"prompt_tokens":4,"completion_tokens":9}}\n\n')
    watch.close(QueryStatus.OK)
    assert (desk.close.prompt_tokens, desk.close.completion_tokens, desk.close.usage_source) == (4, 9, "response")


def test_plain_answer_without_usage_is_absent() -> None:
    """Without usage a plain answer has no counts at all."""
    desk = Desk()
    watch = desk.begin()
    watch.head(200, JSON)
    watch.download(b'{"text":"hello"}')
    watch.close(QueryStatus.OK)
    assert (desk.close.prompt_tokens, desk.close.completion_tokens, desk.close.usage_source) == (None, None, "absent")


def test_names_need_a_2xx() -> None:
    """A name that the server did not accept is not kept, and the query failed."""
    desk = Desk()
    watch = desk.begin()
    watch.upload(REQUEST)
    watch.head(404, JSON)
    watch.download(b'{"model":"made-up","usage":{"prompt_tokens":1}}')
    watch.close(QueryStatus.OK)
    close = desk.close
    assert (close.status, close.http_status) == ("failed", 404)
    assert (close.requested, close.served, close.prompt_tokens, close.usage_source) == (None, None, None, "absent")


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        *[("m", "m"), ("", None), (None, None), ("x" * 300, "x" * 256), ("é" * 200, "é" * 128)],
        *[("a\nb\0c", "abc"), ("\n", None), ("\ud800", "?")],
    ],
)
def test_names_are_bounded(name: str | None, cut: str | None) -> None:
    """Names are at most 256 bytes of clean UTF-8, whatever a client invents, and can be encoded."""
    assert cut_name(name) == cut
    msgspec.msgpack.encode(cut_name(name))


def test_a_tenant_whose_hash_has_a_name_gets_the_name() -> None:
    """The configuration maps the keyed hash of a credential to a name; others keep their hash."""
    digest = Tenants(b"k" * 32).of([(b"Authorization", b"Bearer sk-1")])
    assert digest is not None
    named = Tenants(b"k" * 32, names={digest: "team-a"})
    assert named.of([(b"Authorization", b"Bearer sk-1")]) == "team-a"
    assert named.of([(b"Authorization", b"Bearer sk-2")]) not in {"team-a", None}


def test_tenants() -> None:
    """The same key is the same 16 hex digits under one host key, another under the next, and nobody is None."""
    tenants = Tenants(b"k" * 32)
    hashed = tenants.of([(b"Authorization", b"Bearer sk-1")])
    assert hashed is not None
    assert (len(hashed), int(hashed, 16) >= 0) == (16, True)
    assert tenants.of([(b"X-Api-Key", b"sk-1")]) == hashed
    assert tenants.of([(b"authorization", b"bearer sk-2")]) != hashed
    assert Tenants(b"j" * 32).of([(b"Authorization", b"Bearer sk-1")]) != hashed
    assert tenants.of([]) is None
    assert tenants.of([(b"Authorization", b"Bearer ")]) is None


def test_trusted_header() -> None:
    """With a trusted header its value is the tenant, cut; the key plays no part."""
    tenants = Tenants(b"k" * 32, "X-Tenant")
    assert tenants.of([(b"x-tenant", "équipe".encode()), (b"Authorization", b"Bearer sk-1")]) == "équipe"
    assert tenants.of([(b"x-tenant", b"t" * 999)]) == "t" * 256
    assert tenants.of([(b"Authorization", b"Bearer sk-1")]) is None


def test_a_broken_observer_is_counted_and_closed() -> None:
    """Whatever observing raises stays inside; the query is still closed, with what is sure."""
    desk = Desk()
    watch = desk.begin()
    assert watch.query is not None
    watch.query._request.feed = None  # type: ignore[method-assign, assignment]
    watch.upload(b"x")
    watch.head(200, SSE)
    watch.query._response = 7  # type: ignore[assignment]
    watch.download(b"data: x\n\n")
    watch.close(QueryStatus.OK)
    assert desk.counts.observe_errors == 2
    assert (desk.close.status, desk.close.http_status) == ("ok", 200)
    assert len(desk.book) == 0


def test_a_broken_outbox_stays_inside() -> None:
    """An outbox that raises never reaches the request."""

    def refuse(event: wire.Event) -> None:
        raise MemoryError

    counts = Counts()
    book = Book(put=refuse, server="s", tenants=Tenants(b""), now_ns=Clock(), counts=counts)
    watch = book.begin("POST", "/v1/completions", [])
    watch.upload(b"{}")
    watch.head(200, SSE)
    watch.download(b"data: x\n\n")
    watch.close(QueryStatus.OK)
    assert watch.query_id is None
    assert counts.observe_errors == 1


def test_what_is_no_query_is_not_told() -> None:
    """Polls and control calls are forwarded without a record."""
    desk = Desk()
    for method, path in (("GET", "/v1/models"), ("POST", "/tokenize"), ("HEAD", "/")):
        watch = desk.book.begin(method, path, [])
        watch.upload(b"x")
        watch.head(200, JSON)
        watch.close(QueryStatus.OK)
        assert watch.query_id is None
    assert desk.events == []


def test_many_chunk_times_are_split() -> None:
    """One event holds at most 1,000 chunk times."""
    desk = Desk()
    watch = desk.begin()
    watch.head(200, SSE)
    watch.download(b'data: {"choices":[{"text":"a"}]}\n\n' * 2500)
    watch.close(QueryStatus.OK)
    assert [len(e.deltas_us) for e in desk.events if isinstance(e, wire.Progress)] == [1000, 1000, 500]
