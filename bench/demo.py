"""`energyd demo`: the whole path on one machine, with a real server and nothing downloaded.

Tiny models are made on the spot, served by `transformers serve`, metered by `energyd start`, replayed by
`energyd bench` and rated by `energyd rate`. Each step is the command a user would type, run as its own process: what
the demonstration shows is what the commands do.
"""

import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

import click

from energyd.daemon.clock import Clock
from energyd.daemon.errors import NoGpuError, UnavailableError, UsageError

from . import tinymodels
from .companion import Companion, free_port

SIZES: Final = ("tiny", "small", "medium")
CACHED_ENVIRONMENT: Final = Path(".envs/serve/bin/python")
"""Where `make demo` puts the server's environment, seen from the repository."""
ESTIMATE_WATTS: Final = 100
"""Assumed nameplate of the CPU where no GPU can be metered; printed with every use."""

_NEEDED: Final = ("torch", "transformers", "tokenizers", "fastapi", "uvicorn")
_BANNER: Final = """\
=======================================================================================
 energyd demo: a demonstration with random weights, NOT a rating of any real model.
 It shows the whole path: meter, replay, books that balance, stars.
======================================================================================="""
_SERVER_START_S: Final = 180
_METER_START_S: Final = 30
_IDLE_S: Final = 4
_WARMUP: Final = 3


@dataclass(frozen=True, slots=True)
class Places:
    """Where this demonstration keeps its things and where its parts listen."""

    folder: Path
    server: str
    proxy: str
    admin: str

    @property
    def models(self) -> Path:
        """One folder a model; the server runs here, so that a model's name is its folder's."""
        return self.folder / "models"

    @property
    def db(self) -> Path:
        """The ledger."""
        return self.folder / "energyd.db"


class Steps:
    """Prints numbered steps with the time so far: a silent demonstration looks like a hung one."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._begin = time.monotonic()

    def step(self, text: str) -> None:
        """Begin the next step."""
        self._done += 1
        click.secho(f"\n[{self._done}/{self._total} {self._elapsed_s():4.0f} s] {text}", bold=True)

    def note(self, text: str) -> None:
        """A line within a step."""
        click.echo(f"           {text}")

    def waiting(self, waited_s: float) -> None:
        """Still waiting."""
        self.note(f"still starting ({waited_s:.0f} s)")

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._begin


@click.command(
    epilog="Needs an environment with torch and transformers[serving]; in a clone of the repository `make demo` builds "
    "one beside ours. Example: energyd demo --keep /tmp/energyd-demo"
)
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False), help="Keep models, ledger and logs here.")
@click.option("--samples", type=click.IntRange(1, 1000), default=40, show_default=True, help="Queries for each model.")
@click.option(
    "--serve-python",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Python with torch and transformers[serving] [default: this one, else .envs/serve/bin/python].",
)
def demo(keep: Path | None, samples: int, serve_python: Path | None) -> None:
    """Meter, replay and rate three tiny models on this machine, in a few minutes and offline."""
    click.echo(_BANNER)
    if keep is not None and (keep / "energyd.db").exists():
        raise UsageError(f"--keep {keep} holds an earlier demonstration; name another folder or remove that one")
    python = find_python(serve_python, here=Path.cwd())
    with ExitStack() as stack:
        stack.enter_context(_terminated_as_interrupted())
        places = Places(
            folder=stack.enter_context(_folder(keep)),
            server=f"127.0.0.1:{free_port()}",
            proxy=f"127.0.0.1:{free_port()}",
            admin=f"127.0.0.1:{free_port()}",
        )
        _demonstrate(stack, places, python, samples, kept=keep is not None)


def find_python(given: Path | None, here: Path) -> Path:
    """A Python that can serve Transformers models: `given`, else ours, else `here`/.envs/serve/bin/python.

    Raises UsageError if `given` cannot, UnavailableError if there is none.
    """
    if given is not None:
        if not _can_serve(given):
            raise UsageError(
                f"--serve-python {given} has not all of {', '.join(_NEEDED)}; install transformers[serving] there"
            )
        return given.absolute()
    if all(find_spec(name) for name in _NEEDED):
        return Path(sys.executable)
    cached = here / CACHED_ENVIRONMENT
    if _can_serve(cached):
        return cached.absolute()
    raise UnavailableError(
        "no Python with torch and transformers[serving] found: run `make demo` in a clone of energyd, which builds "
        "one, install energyd[serve], or name one with --serve-python"
    )


def _can_serve(python: Path) -> bool:
    # find_spec instead of import: importing torch takes seconds and proves no more.
    check = f"from importlib.util import find_spec; raise SystemExit(not all(map(find_spec, {_NEEDED!r})))"
    try:
        found = subprocess.run([python, "-c", check], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except OSError:
        return False
    return found.returncode == 0


def _demonstrate(stack: ExitStack, places: Places, python: Path, samples: int, *, kept: bool) -> None:
    steps = Steps(total=6)
    steps.step(f"Making {len(SIZES)} models with random weights (no download)")
    names = _make_models(places, python, steps)

    steps.step("Starting a real server: transformers serve")
    server = stack.enter_context(_server(places, python))
    took_s = server.wait_healthy(f"http://{places.server}/health", _SERVER_START_S, steps.waiting)
    steps.note(f"ready at http://{places.server} after {took_s:.0f} s")

    sensor, why = _sensor()
    steps.step(f"Starting the meter: {why}")
    start = ["start", "--upstream", f"http://{places.server}", "--listen", places.proxy, "--admin", places.admin]
    start += ["--db", str(places.db), *sensor]
    steps.note(_shown(start))
    meter = stack.enter_context(Companion("energyd start", _energyd(start), log=places.folder / "energyd.log"))
    meter.wait_healthy(f"http://{places.admin}/readyz", _METER_START_S, steps.waiting)
    meter.wait_healthy(f"http://{places.proxy}/health", _METER_START_S, steps.waiting)
    steps.note(f"clients now talk to http://{places.proxy} instead of the server: the only change they need")

    steps.step(f"Replaying {samples} queries to each model")
    for name in names:
        _run(["bench", "--url", f"http://{places.proxy}", "--model", name, *_bench_options(places, samples)], steps)

    steps.step("Rating the runs among themselves")
    rate = ["rate", "--db", str(places.db), "--among-runs"]
    _run([*rate, "--include-estimates"], steps)

    steps.step("Checking that the books balance")
    _run(["audit", "--db", str(places.db)], steps)

    _where_next(places, kept=kept)


def _make_models(places: Places, python: Path, steps: Steps) -> list[str]:
    names = [f"demo-{size}" for size in SIZES]
    places.models.mkdir(parents=True, exist_ok=True)
    pairs = [argument for name, size in zip(names, SIZES, strict=True) for argument in (name, size)]
    log = places.folder / "models.log"
    with log.open("wb") as sink:
        made = subprocess.run(
            [python, tinymodels.__file__, *pairs],
            cwd=places.models,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if made.returncode:
        raise UnavailableError(f"the models could not be made with {python}; see {log}")
    for name in names:
        size_mb = (places.models / name / "model.safetensors").stat().st_size / 1e6
        steps.note(f"{name}: {size_mb:.0f} MB")
    return names


def _server(places: Places, python: Path) -> Companion:
    host, port = places.server.split(":")
    return Companion(
        "transformers serve",
        [str(python), "-m", "transformers.cli.transformers", "serve", "--host", host, "--port", port],
        log=places.folder / "server.log",
        cwd=places.models,
        environment={"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )


def _sensor() -> tuple[list[str], str]:
    """The options of `energyd start` for this host, and the line that says plainly what they mean."""
    from energyd.daemon.sensors.nvml import NvmlSensor  # noqa: PLC0415 - loads the driver's library

    try:
        sensor = NvmlSensor.open(Clock.start())
    except NoGpuError:
        return (
            ["--sensor", "estimate", "--estimate-watts", str(ESTIMATE_WATTS)],
            f"no NVIDIA GPU here, so energy is ESTIMATED, not measured (CPU busy share x {ESTIMATE_WATTS} W assumed)",
        )
    try:
        found = ", ".join(f"GPU {gpu.index} {gpu.name}" for gpu in sensor.gpus())
    finally:
        sensor.close()
    return ["--sensor", "nvml"], f"measured by NVML on {found}"


def _bench_options(places: Places, samples: int) -> list[str]:
    options = ["--task", "text-generation", "--samples", str(samples), "--batch-size", "1", "--model-class", "A"]
    return [*options, "--idle-seconds", str(_IDLE_S), "--warmup", str(_WARMUP), "--db", str(places.db)]


def _run(arguments: list[str], steps: Steps) -> None:
    """Run one verb of energyd with its output shown; raises UnavailableError if it fails."""
    steps.note(_shown(arguments))
    sys.stdout.flush()  # else our lines come after those of the process when the output is a pipe
    code = subprocess.run(_energyd(arguments), stdin=subprocess.DEVNULL, check=False).returncode
    if code:
        raise UnavailableError(f"`energyd {arguments[0]}` ended with code {code}; the demonstration stops here")


def _energyd(arguments: list[str]) -> list[str]:
    # Not the console script: it may not be on PATH. -P keeps the current folder out of the import path.
    code = "from energyd.daemon.cli import main; main(prog_name='energyd')"
    return [sys.executable, "-P", "-c", code, *arguments]


def _shown(arguments: list[str]) -> str:
    return f"$ energyd {shlex.join(arguments)}"


def _where_next(places: Places, *, kept: bool) -> None:
    click.secho("\nWhere to look next", bold=True)
    if kept:
        click.echo(f"  energyd export queries --db {places.db} --format csv   # energy of every query")
        click.echo(f"  energyd audit --db {places.db}                         # prove the books again")
        click.echo(f"  logs, models and the ledger: {places.folder}")
    else:
        click.echo("  energyd demo --keep DIR                                # the same, and keep ledger and logs")
    click.echo("  energyd start --upstream http://127.0.0.1:8000         # your own server on a GPU host")
    click.echo("  curl http://127.0.0.1:9709/metrics                     # what Prometheus sees while it runs")
    click.echo("\nRandom weights: none of these stars says anything about a real model.")


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.absolute()
        return
    folder = Path(tempfile.mkdtemp(prefix="energyd-demo-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """A SIGTERM unwinds like Ctrl-C: else the servers would outlive us."""

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
