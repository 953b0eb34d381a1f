"""Which header fields travel through a proxy, and the bytes of a response head. Pure.

Names and values are kept as the bytes that arrived: order, spelling and duplicates (`Set-Cookie`) are not ours.
"""

from collections.abc import Iterable

Field = tuple[bytes, bytes]

_HOP_BY_HOP = frozenset({b"connection", b"proxy-connection", b"keep-alive", b"te", b"transfer-encoding", b"upgrade"})
"""RFC 9110 §7.6.1: fields that speak to the next hop only."""
_NEVER_BY_NAME = frozenset({b"content-length", b"host", b"content-type", b"content-encoding"})
"""`Connection` may name fields to drop, but not those that say where a message goes, what it is and where it ends:
dropping Content-Length because a client named it there is a known way to smuggle a second request past a proxy."""
_REPORT = b"x-energyd-report"
QUERY_ID = b"x-energyd-id"
ERROR = b"x-energyd-error"


def value(fields: Iterable[Field], name: bytes) -> str:
    """The first value of field `name` (lower case), stripped; empty if it is not there."""
    for key, found in fields:
        if key.lower() == name:
            return found.decode("latin-1").strip()
    return ""


def forwarded(fields: Iterable[Field]) -> list[Field]:
    """The end-to-end fields of a message, in order, without RFC 9110 §7.6.1 and what `Connection` names."""
    fields = list(fields)
    dropped = _HOP_BY_HOP
    for key, found in fields:
        if key.lower() == b"connection":
            named = frozenset(token.strip().lower() for token in found.split(b","))
            dropped |= named - _NEVER_BY_NAME
    return [field for field in fields if field[0].lower() not in dropped]


def wants_report(fields: Iterable[Field]) -> bool:
    """Whether the client asked for the id of its query (`x-energyd-report: 1`)."""
    return value(fields, _REPORT) == "1"


def upstream_request(fields: Iterable[Field]) -> list[Field]:
    """What the upstream gets: end-to-end fields without ours and without `Expect`.

    We answer `Expect` ourselves, as nginx does: a server that never sends `100 Continue` would stall the upload.
    """
    return [field for field in forwarded(fields) if field[0].lower() not in {_REPORT, b"expect"}]


def as_text(fields: Iterable[Field]) -> list[tuple[str, str]]:
    """Fields for aiohttp's writer, which encodes text as UTF-8.

    A value that is not UTF-8 is read as Latin-1, as HTTP/1 once defined; the writer would silently drop such bytes.
    """
    return [(key.decode("latin-1"), _text(found)) for key, found in fields]


def head(status: int, reason: str, fields: Iterable[Field]) -> bytes:
    """Status line and fields of an HTTP/1.1 response as bytes."""
    lines = [b"HTTP/1.1 %d %b\r\n" % (status, reason.encode("utf-8", "surrogateescape"))]
    lines += [b"%b: %b\r\n" % field for field in fields]
    lines.append(b"\r\n")
    return b"".join(lines)


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")
