"""Verbs that look at a live host: `record` takes its readings along, `doctor` judges them."""

# ruff: noqa: PLC0415 - a verb imports what it needs when it runs: `energyd --help` stays fast

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .units import joules, ns_from_s, seconds

if TYPE_CHECKING:
    from .config import Settings

_NEVER_OPENED = Path("energyd.db")
"""Settings want a ledger; these verbs have none."""


def sensor_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The daemon's own options that choose a sensor."""
    options = (
        click.option("--sensor", type=click.Choice(["nvml", "estimate", "replay"]), default="nvml", show_default=True,
                     help="nvml: the GPU's counter. estimate: CPU busy share x watts, marked. replay: a recorded trace."),
        click.option("--trace", type=click.Path(path_type=Path), help="The recorded trace for --sensor replay."),
        click.option("--estimate-watts", type=float, help="Nameplate power for --sensor estimate."),
        click.option("--gpu", multiple=True, help="Index of a GPU; repeat for more. [default: all]"),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _settings(sensor: str, trace: Path | None, estimate_watts: float | None, gpu: tuple[str, ...]) -> "Settings":
    from .config import Settings

    return Settings.checked(db=_NEVER_OPENED, sensor=sensor, trace=trace, estimate_watts=estimate_watts, gpus=gpu)


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM has come since: they end a recording, they do not throw it away."""
    asked = False

    def ask(_number: int, _frame: object) -> None:
        nonlocal asked
        asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@click.command(epilog="Example: energyd record --seconds 60 --output problem.json.gz; energyd settle problem.json.gz")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default="recording.json.gz",
    show_default=True,
    help="The file to write; gzipped if its name ends in .gz.",
)
@click.option("--force", is_flag=True, help="Replace the file if it is there.")
@click.option(
    "--seconds",
    "duration",
    type=click.FloatRange(0.1, 86_400),
    default=60.0,
    show_default=True,
    help="How long; Ctrl-C ends it earlier and keeps what was recorded.",
)
@click.option(
    "--every",
    type=click.FloatRange(0.01, 2.0),
    default=1.0,
    show_default=True,
    help="Seconds between two readings; the driver's samples reach back 2.4 s, a counter read costs about 5 ms of CPU.",
)
@sensor_options
def record(
    output: Path,
    duration: float,
    every: float,
    sensor: str,
    trace: Path | None,
    estimate_watts: float | None,
    *,
    gpu: tuple[str, ...],
    force: bool,
) -> None:
    """Record what the GPUs of this host say, to reproduce a problem elsewhere.

    The file holds counters, power samples, times and the names of GPU and driver: no query, no host name, no UUID.
    """
    from importlib.metadata import version

    from .clock import Clock
    from .record import OutputFile, document
    from .record import record as record_from
    from .service import open_sensor

    clock = Clock.start()
    source = open_sensor(_settings(sensor, trace, estimate_watts, gpu), clock)
    assert source is not None  # noqa: S101 - the choices hold no `none`
    file = OutputFile(output, force=force)
    try:
        click.echo(
            f"recording {', '.join(f'GPU {g.index} {g.name} ({g.source})' for g in source.gpus())}"
            f" for {duration:g} s; Ctrl-C ends it earlier and keeps the file",
            err=True,
        )
        with _asked_to_stop() as stopped:
            found = record_from(
                source, clock, duration_ns=ns_from_s(duration), period_ns=ns_from_s(every), stopped=stopped
            )
            info = {
                "energyd": version("energyd"),
                "sensor": sensor,
                "every_s": every,
                "wall_step_ns": clock.wall_step_ns(),
            }
            size = file.write(document(found, info))
    finally:
        file.discard()
    if not found.hung:  # closing the driver under a call that hangs would break it
        source.close()
    for tape in found.tapes:
        left_out = "" if tape.usable else "; left out: it takes two counter readings"
        failed = f", {tape.failed:,} readings failed" if tape.failed else ""
        click.echo(
            f"  GPU {tape.gpu.index}: {len(tape.anchors):,} counter readings, {len(tape.end_us):,} samples,"
            f" {joules(tape.energy_uj):,.3f} J{failed}{left_out}"
        )
    click.echo(
        f"{output}: {seconds(found.end_ns - found.start_ns):.1f} s, {size:,} bytes; book it with `energyd settle {output}`"
    )
