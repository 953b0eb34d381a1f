"""`energyd proxy`: the data listener alone, with or without a daemon."""

import logging
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

import click

from energyd.daemon.errors import UsageError
from energyd.daemon.paths import ledger_path
from energyd.daemon.wire import MAX_NAME_BYTES

_EXAMPLE = """\b
Example:
  energyd proxy --upstream http://127.0.0.1:8000 --listen 127.0.0.1:8088
  curl http://127.0.0.1:8088/v1/chat/completions -H 'content-type: application/json' \\
       -d '{"model": "m", "messages": [{"role": "user", "content": "Hello"}]}'
"""


@click.command(epilog=_EXAMPLE)
@click.option("--upstream", required=True, metavar="URL", help="The inference server, e.g. http://127.0.0.1:8000.")
@click.option(
    "--listen",
    "listen_on",
    default="127.0.0.1:8088",
    show_default=True,
    metavar="HOST:PORT",
    help="Where clients connect; port 0 picks a free one.",
)
@click.option(
    "--db",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The daemon's ledger: its socket, spools and tenant key lie beside it.  [default: in the state folder]",
)
@click.option("--name", metavar="NAME", help="Name of the server in reports.  [default: host:port of the upstream]")
@click.option(
    "--gpu",
    "gpus",
    multiple=True,
    metavar="UUID_OR_INDEX",
    help="A GPU that the server runs on; repeat it. Without it: all GPUs of the host.",
)
@click.option(
    "--workers", default=1, show_default=True, type=click.IntRange(1, 64), help="Processes that share the port."
)
@click.option(
    "--tenant-header",
    metavar="HEADER",
    help="Take the tenant's name from this header, which something you trust sets, not from a keyed hash of the key.",
)
@click.option(
    "--tenant",
    "tenants",
    multiple=True,
    metavar="NAME=HASH",
    help="Name the tenant whose key has this hash (as exported queries show it); repeat it.",
)
@click.option(
    "--host-header",
    default="client",
    show_default=True,
    type=click.Choice(["client", "upstream"]),
    help="Send the client's Host field on, or the upstream's own name (for https endpoints).",
)
@click.option(
    "--spool-limit",
    default=256,
    show_default=True,
    type=click.IntRange(1),
    metavar="MIB",
    help="Disk that one worker may fill while the daemon is away.",
)
@click.option(
    "--drain",
    default=30.0,
    show_default=True,
    type=click.FloatRange(0),
    metavar="SECONDS",
    help="How long to let requests end after SIGTERM.",
)
def proxy(
    *, upstream: str, listen_on: str, db: Path | None, name: str | None, gpus: tuple[str, ...], workers: int,
    tenant_header: str | None, tenants: tuple[str, ...], host_header: str, spool_limit: int, drain: float,
) -> None:  # fmt: skip
    """Forward every request to an inference server and tell the daemon who asked for what, and when.

    Requests and answers pass unchanged. Without a daemon the proxy works all the same: it keeps the queries on disk and
    delivers them when the daemon is back.
    """
    # Imported here: `energyd --help` shall not wait for the network libraries.
    from .app import Settings  # noqa: PLC0415
    from .forward import Upstream  # noqa: PLC0415
    from .record import cut_name  # noqa: PLC0415
    from .secret import tenant_key  # noqa: PLC0415
    from .workers import run_many, run_one  # noqa: PLC0415

    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    server = Upstream(parse_upstream(upstream), own_host=host_header == "upstream")
    host, port = parse_listen(listen_on)
    if tenant_header is not None and not tenant_header.replace("-", "").replace("_", "").isalnum():
        raise UsageError(f"--tenant-header {tenant_header!r} is not a header name; give one like X-Tenant")
    place = (db or ledger_path()).absolute()
    settings = Settings(
        upstream=server,
        db=place,
        name=cut_name(name) or server.host,
        tenant_key=tenant_key(place),
        gpus=gpus,
        tenant_header=tenant_header,
        tenant_names=parse_tenants(tenants),
        spool_limit_bytes=spool_limit * 1024 * 1024,
        drain_s=drain,
    )

    def announce(at: int) -> None:
        shown = f"[{host}]" if ":" in host else host
        click.echo(f"energyd proxy: http://{shown}:{at} -> {server.base}")

    if workers == 1:
        run_one(settings, host, port, announce=announce)
    else:
        run_many(settings, host, port, workers=workers, announce=announce)


def parse_upstream(url: str) -> str:
    """`url` without its final slash; raises UsageError for anything that is not http(s)://host[:port][/path]."""
    example = "give one like http://127.0.0.1:8000"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as e:
        raise UsageError(f"--upstream is not a URL ({e}); {example}") from e
    if parts.scheme not in {"http", "https"} or not parts.hostname or port == 0:
        raise UsageError(f"--upstream {url!r} is not an http or https URL with a host; {example}")
    if parts.username or parts.password:
        raise UsageError(f"--upstream must not hold a user or password: clients send their own keys; {example}")
    if parts.query or parts.fragment:
        raise UsageError(f"--upstream must end with host, port or path, without '?' or '#'; {example}")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def parse_tenants(named: Iterable[str]) -> dict[str, str]:
    """Hash → name of `NAME=HASH` words; raises UsageError for one that is none."""
    names: dict[str, str] = {}
    for word in named:
        name, _, digest = word.rpartition("=")
        if not name or len(name.encode()) > MAX_NAME_BYTES or not re.fullmatch("[0-9a-f]{16}", digest):
            # the word is not shown: by mistake it may hold the key itself
            raise UsageError("--tenant takes NAME=HASH, with the 16 hex digits that `energyd export queries` shows")
        names[digest] = name
    return names


def parse_listen(address: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT` (`[::1]:8088` for IPv6); raises UsageError."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") if host.startswith("[") else host
    if (
        not colon
        or not host
        or (":" in host and not address.startswith("["))
        or not port.isascii()
        or not port.isdigit()
    ):
        raise UsageError(f"--listen {address!r} is not HOST:PORT; give one like 127.0.0.1:8088")
    if int(port) > 65535:
        raise UsageError(f"--listen {address!r}: a port is at most 65535")
    return host, int(port)
