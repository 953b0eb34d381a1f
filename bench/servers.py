"""Who answers at a URL, and how it wants to be asked: detection and the probe that comes before every run.

Detection never depends on `/v1/models`: transformers serve answers 500 there when it is offline.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

import aiohttp

from energyd.daemon.errors import UnavailableError, UsageError

from .answers import Answer
from .datasets import Prompt
from .load import ID_HEADER
from .payloads import Dialect, Generation, ServerKind, body

PROBE: Final = Prompt("The weather in the valley was calm that day, and")
_OTHER_DIALECT: Final = frozenset({400, 404, 405, 415, 422, 500, 501})
"""Answers that another way of asking may avoid: no such route, an unknown field, a model without chat template."""
_DETECT_TIMEOUT: Final = aiohttp.ClientTimeout(total=10, connect=5)
_MESSAGE_CHARS: Final = 300


@dataclass(frozen=True, slots=True)
class Detected:
    """The server found: its kind, and its version (None: it does not tell)."""

    kind: ServerKind
    version: str | None

    @property
    def name(self) -> str:
        """For people: kind and version."""
        return f"{self.kind} {self.version}" if self.version else str(self.kind)


@dataclass(frozen=True, slots=True)
class Probed:
    """A way to ask that was accepted. `metered`: the answer carried our id: the URL leads through energyd's proxy."""

    dialect: Dialect
    metered: bool


@dataclass(frozen=True, slots=True)
class _Refusal:
    status: int
    message: str
    ours: str | None


def root(url: str) -> str:
    """The server's root of a URL given with or without `/v1`; raises UsageError if it is no http(s) URL."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not match, a port that is no number
        sound = False
    if not sound:
        raise UsageError("--url is not an http(s) URL; write for example http://127.0.0.1:8088")
    path = parts.path.rstrip("/")
    return urlunsplit((parts.scheme, parts.netloc, path.removesuffix("/v1"), "", ""))


def public(url: str) -> str:
    """The URL without user, password and query, which may hold a key and must not be stored."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


async def detect(client: aiohttp.ClientSession, base: str) -> Detected:
    """Find out which server answers; an unknown one counts as `openai`. Raises UnavailableError if nothing answers."""
    version = await _get(client, f"{base}/version")
    if isinstance(version, dict) and isinstance(version.get("version"), str):
        return Detected(ServerKind.VLLM, version["version"])
    models = await _get(client, f"{base}/v1/models")
    owners = {m.get("owned_by") for m in _list(models, "data") if isinstance(m, dict)}
    if "vllm" in owners:
        return Detected(ServerKind.VLLM, None)
    routes = await _get(client, f"{base}/openapi.json")
    paths = routes.get("paths") if isinstance(routes, dict) else None
    if isinstance(paths, dict) and {"/load_model", "/v1/chat/completions"} <= set(paths):
        return Detected(ServerKind.TRANSFORMERS, None)
    return Detected(ServerKind.OPENAI, None)


async def probe(
    client: aiohttp.ClientSession, base: str, model: str, ways: Sequence[Dialect], generation: Generation
) -> Probed:
    """Send one request of our own wording in each way until one is accepted.

    Raises UnavailableError (nothing answers, the server fails) or UsageError (key refused, model or route unknown).
    """
    first: _Refusal | None = None
    for way in ways:
        refusal, metered = await _ask(client, base, model, way, generation)
        if refusal is None:
            return Probed(way, metered)
        first = first or refusal
        if refusal.status not in _OTHER_DIALECT:
            first = refusal
            break
    if first is None:
        raise UsageError("no way to ask was given")
    raise _explained(first, public(base), model)


async def _ask(
    client: aiohttp.ClientSession, base: str, model: str, way: Dialect, generation: Generation
) -> tuple[_Refusal | None, bool]:
    data = body(PROBE, model, way, generation)
    try:
        async with client.post(
            base + way.api.path, data=data, headers={"content-type": "application/json"}
        ) as response:
            answer = await response.read()
            metered = ID_HEADER in response.headers
            if response.status == 200:
                return _inside(answer, way), metered
            return _Refusal(response.status, _message(answer), response.headers.get("x-energyd-error")), metered
    except (aiohttp.ClientError, OSError, TimeoutError) as e:
        raise _down(base, e) from e


def _inside(data: bytes, way: Dialect) -> _Refusal | None:
    """A failure reported inside a 200 answer: servers that stream have sent the status before they know."""
    answer = Answer(stream=way.stream)
    answer.feed(data)
    answer.end()
    return None if answer.error is None else _Refusal(500, answer.error, None)


async def _get(client: aiohttp.ClientSession, url: str) -> Any:
    """The JSON at `url`; None if there is none (other status, no JSON). Raises UnavailableError if nothing listens."""
    try:
        async with client.get(url, timeout=_DETECT_TIMEOUT) as response:
            return json.loads(await response.read()) if response.status == 200 else None
    except aiohttp.ClientConnectorError as e:
        raise _down(url, e) from e
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError, RecursionError):
        return None


def _down(url: str, error: BaseException) -> UnavailableError:
    parts = urlsplit(public(url))
    reason = "it took too long to answer" if isinstance(error, TimeoutError) else _reason(error)
    return UnavailableError(
        f"no server answers at {parts.scheme}://{parts.netloc} ({reason}); start it, or correct --url"
    )


def _reason(error: BaseException) -> str:
    cause = getattr(error, "os_error", error)
    return getattr(cause, "strerror", None) or type(error).__name__


def _explained(refusal: _Refusal, base: str, model: str) -> UnavailableError | UsageError:
    said = f": {refusal.message}" if refusal.message else ""
    if refusal.ours is not None or refusal.status in {502, 504}:
        return UnavailableError(
            f"the proxy at {base} answers, but the server behind it does not (HTTP {refusal.status}){said}"
        )
    if refusal.status in {401, 403}:
        return UsageError(
            f"{base} refuses the key (HTTP {refusal.status}); name the variable that holds it with --api-key-env NAME"
        )
    if refusal.status == 404:
        return UsageError(
            f"{base} knows no model {model!r} or has no such route (HTTP 404){said}; check --model, --api and --url"
        )
    if refusal.status < 500:
        return UsageError(f"{base} refuses the request (HTTP {refusal.status}){said}; try another --api or --server")
    return UnavailableError(f"the server at {base} fails (HTTP {refusal.status}){said}; look into its log")


def _message(answer: bytes) -> str:
    """The server's own words, one line. Safe to show: the probe's wording is ours and no prompt can be quoted in it."""
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        return ""
    error = found.get("error") if isinstance(found, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    if message is None and isinstance(found, dict):
        message = found.get("detail") or found.get("message")
    return " ".join(str(message or "").split())[:_MESSAGE_CHARS]


def _list(found: Any, key: str) -> list[Any]:
    value = found.get(key) if isinstance(found, dict) else None
    return value if isinstance(value, list) else []
