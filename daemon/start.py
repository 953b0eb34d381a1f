"""`energyd start`: daemon and proxy as two processes under one supervisor.

The proxy lives when the daemon dies: it is a process of its own, keeps forwarding and spools what it would have said. A
part that ends with exit code 2 before it was ready had bad input or no GPU: the other is stopped and the code is passed
on. Later deaths are answered with a restart, after a pause that doubles up to 30 s.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from . import paths
from .config import read_config
from .errors import UsageError
from .localclient import listens
from .verbs import DB, daemon_options, ledger_path

_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
_STEADY_S = 60.0
_STOP_DAEMON_S = 15.0
_DAEMON_FIRST_S = 5.0
"""The proxy waits this long for the daemon: what the daemon refuses is then the only line on the screen."""
_BAD_INPUT = 2


class Part:
    """One child process and its restarts."""

    def __init__(self, name: str, arguments: Sequence[str]) -> None:
        self.name = name
        self.command = [sys.executable, "-m", "energyd.daemon.cli", name, *arguments]
        self.pause_s = _FIRST_PAUSE_S
        self.retry_at_s = 0.0
        self.restarts = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.started_s = 0.0

    def spawn(self) -> None:
        """Start the process; a Ctrl-C of the terminal reaches only the supervisor, which stops the parts in order."""
        self.process = subprocess.Popen(self.command, start_new_session=True)
        self.started_s = time.monotonic()

    def ended(self) -> int | None:
        """The exit code, if the process has ended."""
        return None if self.process is None else self.process.poll()

    def schedule_restart(self) -> None:
        """Start again after a pause; a part that had run for a minute starts with the shortest one."""
        if time.monotonic() - self.started_s > _STEADY_S:
            self.pause_s = _FIRST_PAUSE_S
        self.retry_at_s = time.monotonic() + self.pause_s
        self.pause_s = min(self.pause_s * 2, _LONGEST_PAUSE_S)
        self.process = None
        self.restarts += 1

    def stop(self, timeout_s: float) -> None:
        """SIGTERM, then SIGKILL after `timeout_s`."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def supervise(daemon: Part, proxy: Part, drain_s: float, answers: Callable[[], bool]) -> int:
    """Run both until SIGTERM or SIGINT (exit code 0), or until one refuses its input (its exit code).

    `answers`: whether the daemon listens. The proxy starts when it does, or a little later without it.
    """
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _frame: stop.append(n))
    daemon.spawn()
    proxy.retry_at_s = time.monotonic() + _DAEMON_FIRST_S
    code = 0
    while not stop:
        time.sleep(0.1)
        for part in (daemon, proxy):
            if part.process is None:
                if time.monotonic() >= part.retry_at_s or (part is proxy and not proxy.restarts and answers()):
                    part.spawn()
                continue
            ended = part.ended()
            if ended is None:
                continue
            if ended == _BAD_INPUT and not part.restarts and time.monotonic() - part.started_s < _STEADY_S:
                code = ended
                stop.append(0)
                break
            part.schedule_restart()
            print(
                f"energyd: the {part.name} ended with code {ended}; starting it again in"
                f" {part.retry_at_s - time.monotonic():.0f} s",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    proxy.stop(drain_s + 5)  # first: what it still has to say, the daemon must hear
    daemon.stop(_STOP_DAEMON_S)
    return code


@click.command(
    epilog="Example: energyd start --upstream http://127.0.0.1:8000 --listen 127.0.0.1:8088, then point clients at :8088"
)
@click.option("--upstream", required=True, help="The inference server, such as http://127.0.0.1:8000.")
@click.option("--listen", default="127.0.0.1:8088", show_default=True, help="Where clients connect.")
@click.option("--name", default=None, help="Name of the upstream server in the books. [default: its host:port]")
@click.option("--workers", type=click.IntRange(1, 64), default=1, show_default=True, help="Proxy processes.")
@click.option("--tenant-header", default=None, help="Trusted request header that names who asked.")
@click.option(
    "--tenant", multiple=True, metavar="NAME=HASH", help="Name the tenant whose key has this hash; repeat it."
)
@click.option(
    "--host-header",
    type=click.Choice(["client", "upstream"]),
    default="client",
    show_default=True,
    help="Send the client's Host field on, or the upstream's own name (for https endpoints).",
)
@click.option(
    "--spool-limit", type=click.IntRange(1), default=256, show_default=True, help="MiB of disk for a worker's spool."
)
@click.option(
    "--drain",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="Seconds that open streams get at the end.",
)
@DB
@daemon_options
@click.option("--config", type=click.Path(path_type=Path), help="TOML file with any of these options.", is_eager=True,
              callback=lambda ctx, _p, path: _defaults(ctx, path))  # fmt: skip
def start(db: Path | None, config: Path | None, **options: Any) -> None:  # noqa: ARG001 - config fills the defaults
    """Meter this host's GPUs and proxy an inference server: point clients at --listen, scrape the admin port."""
    where = ["--db", str(ledger_path(db))]
    proxy_only = {
        "upstream", "listen", "name", "workers", "tenant_header", "tenant", "host_header", "spool_limit", "drain",
    }  # fmt: skip
    to_daemon = [*where, *_flags({k: v for k, v in options.items() if k not in proxy_only})]
    to_proxy = [*where, *_flags({k: v for k, v in options.items() if k in proxy_only or k == "gpu"})]
    socket = paths.socket_path(ledger_path(db))
    sys.exit(supervise(Part("daemon", to_daemon), Part("proxy", to_proxy), options["drain"], lambda: listens(socket)))


def _defaults(ctx: click.Context, path: Path | None) -> Path | None:
    if path is not None:
        found = read_config(path)
        unknown = sorted(set(found) - {p.name for p in ctx.command.params})
        if unknown:  # a mistyped option that is passed over would leave its default in force, unseen
            raise UsageError(f"{path} has an option that `energyd start` does not know: {unknown[0]}")
        ctx.default_map = {**(ctx.default_map or {}), **found}
    return path


def _flags(options: dict[str, Any]) -> list[str]:
    """The options as arguments of the part, each as `--name value`; None is left out."""
    arguments: list[str] = []
    for key, value in options.items():
        for item in value if isinstance(value, tuple) else (value,):
            if item is not None:
                arguments += [f"--{key.replace('_', '-')}", str(item)]
    return arguments
