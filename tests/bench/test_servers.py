"""Detection and probe against real small servers."""

import asyncio
import socket

import pytest

from energyd.bench import load
from energyd.bench.payloads import Api, Generation, ServerKind, dialects
from energyd.bench.servers import Detected, Probed, detect, probe, public, root
from energyd.daemon.errors import EnergydError, UnavailableError, UsageError

from .conftest import FakeServer, Loop, started

TEN = Generation(10, fixed=True)


def detected(url: str) -> Detected:
    """What is found at `url`."""

    async def look() -> Detected:
        async with load.session(10, {}) as client:
            return await detect(client, url)

    return asyncio.run(look())


def probed(server: FakeServer, kind: ServerKind, *apis: Api, stream: bool = True) -> Probed:
    """The way of asking that `server` accepts."""

    async def look() -> Probed:
        async with load.session(10, {}) as client:
            ways = tuple(dialects(kind, apis or (Api.COMPLETIONS, Api.CHAT), TEN, stream=stream))
            return await probe(client, server.url, "m", ways, TEN)

    return asyncio.run(look())


@pytest.mark.parametrize(
    ("style", "kind", "version"),
    [
        ("vllm", ServerKind.VLLM, "0.99.0"),
        ("transformers", ServerKind.TRANSFORMERS, None),
        ("plain", ServerKind.OPENAI, None),
    ],
)
def test_servers_are_told_apart(loop: Loop, style: str, kind: ServerKind, version: str | None) -> None:
    """By /version, by its routes (its /v1/models answers 500), or by nothing of the two."""
    assert detected(started(loop, FakeServer(style=style)).url) == Detected(kind, version)


def test_nothing_listening_is_one_line() -> None:
    """The address is named, and nothing of the URL that may be secret."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        with pytest.raises(UnavailableError, match=rf"no server answers at http://127\.0\.0\.1:{port} \(") as caught:
            detected(f"http://user:key@127.0.0.1:{port}")
    assert "key" not in str(caught.value)


def test_the_best_way_is_taken_first(server: FakeServer) -> None:
    """VLLM takes the exact count; the answer's id shows the proxy."""
    found = probed(server, ServerKind.VLLM)
    assert (found.dialect.api, found.dialect.exact, found.metered) == (Api.COMPLETIONS, True, True)


def test_without_a_proxy_no_id_comes(loop: Loop) -> None:
    """The URL then leads past the meter."""
    assert not probed(started(loop, FakeServer(proxied=False)), ServerKind.VLLM).metered


def test_a_refused_field_leads_to_the_plain_way(loop: Loop) -> None:
    """Told that it is vLLM, a transformers server answers 422, and the plain way is kept."""
    found = probed(started(loop, FakeServer(style="transformers")), ServerKind.VLLM)
    assert (found.dialect.api, found.dialect.exact) == (Api.COMPLETIONS, False)


def test_a_missing_route_leads_to_chat(loop: Loop) -> None:
    """A server with chat only is asked by chat."""
    assert probed(started(loop, FakeServer(completions=False)), ServerKind.VLLM).dialect.api is Api.CHAT


def test_an_error_inside_a_200_is_a_refusal(loop: Loop) -> None:
    """A stream that ends in an error event does not count as accepted."""
    with pytest.raises(UnavailableError, match="error inside a 200 answer"):
        probed(started(loop, FakeServer(error_inside=True)), ServerKind.OPENAI)


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (401, UsageError, r"refuses the key \(HTTP 401\).*--api-key-env"),
        (404, UsageError, r"knows no model 'm' or has no such route \(HTTP 404\): no, not m"),
        (400, UsageError, r"refuses the request \(HTTP 400\): no, not m"),
        (502, UnavailableError, r"the proxy .* answers, but the server behind it does not"),
        (500, UnavailableError, r"fails \(HTTP 500\)"),
        (429, UsageError, r"refuses the request \(HTTP 429\)"),
    ],
)
def test_each_refusal_is_explained(loop: Loop, status: int, kind: type[EnergydError], words: str) -> None:
    """One line with the status, the server's words and what to do."""
    with pytest.raises(kind, match=words) as caught:
        probed(started(loop, FakeServer(probe_status=status)), ServerKind.OPENAI)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://h:8021/v1", "http://h:8021"),
        ("http://h:8021/v1/", "http://h:8021"),
        ("http://h/deep/v1?x=1", "http://h/deep"),
        ("https://h", "https://h"),
    ],
)
def test_the_root_of_a_url_keeps_its_port(url: str, base: str) -> None:
    """`/v1` is removed as a word, not as letters (upstream's `rstrip("/v1")` eats the port's last digit)."""
    assert root(url) == base


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://h", "http://", "http://h:port", "http://[::1", ""])
def test_what_is_no_url_is_refused(url: str) -> None:
    """Before anything is sent."""
    with pytest.raises(UsageError, match="not an http"):
        root(url)


def test_a_stored_url_holds_no_secret() -> None:
    """User, password and query stay out of records."""
    assert public("http://user:pass@h:1/v1?key=2") == "http://h:1/v1"
