"""Verbs that look at a live host: `record` takes its readings along, `doctor` judges them."""

import json
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .errors import NoGpuError
from .units import NS_PER_MS, joules, ns_from_s, seconds, watts

if TYPE_CHECKING:
    from .config import Settings
    from .doctor import Cost, Finding, GpuFacts, HostFacts

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
    """Whether Ctrl-C, SIGTERM or a hangup has come since: they end a recording, they do not throw it away."""
    asked = False

    def ask(_number: int, _frame: object) -> None:
        nonlocal asked
        asked = True

    numbers = [signal.SIGINT, signal.SIGTERM]
    if (
        signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    ):  # under nohup the recording is meant to outlive the terminal
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, ask) for number in numbers}
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
        with _asked_to_stop() as stopped:
            click.echo(
                f"recording {', '.join(f'GPU {g.index} {g.name} ({g.source})' for g in source.gpus())}"
                f" for {duration:g} s; Ctrl-C ends it earlier and keeps the file",
                err=True,
            )
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


@click.command(epilog="Example: energyd doctor; energyd doctor --json --seconds 30 > doctor.json")
@click.option(
    "--seconds",
    "per_gpu_s",
    type=click.FloatRange(1, 600),
    default=6.0,
    show_default=True,
    help="How long each GPU is looked at; up to 2 s of it are polled hard.",
)
@click.option(
    "--db", type=click.Path(dir_okay=False, path_type=Path), envvar="ENERGYD_DB",
    help="The ledger of a daemon that may be running. [default: the state folder's energyd.db]",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@sensor_options
@click.pass_context
def doctor(
    ctx: click.Context,
    per_gpu_s: float,
    db: Path | None,
    sensor: str,
    trace: Path | None,
    estimate_watts: float | None,
    *,
    gpu: tuple[str, ...],
    as_json: bool,
) -> None:
    """Look at each GPU for some seconds: can it be metered, how well, and what to do about what is wrong.

    A daemon may run meanwhile: it is not disturbed, but polling hard costs up to a core for 2 s a GPU. Exit code 1: a
    problem that spoils measurements; 2: nothing to look at.
    """
    from .clock import Clock
    from .doctor import Severity, examine, verdict
    from .probe import CostClock, device_nodes, probe_host
    from .service import open_sensor

    clock = CostClock(Clock.start().offset_ns)
    try:
        source = open_sensor(_settings(sensor, trace, estimate_watts, gpu), clock)
    except NoGpuError as e:
        nodes = [asdict(node) for node in device_nodes()]
        if as_json:
            click.echo(json.dumps({"verdict": "no GPU", "error": str(e), "host": {"nodes": nodes}, "gpus": []}))
        elif nodes:
            click.echo("device nodes: " + ", ".join(_node(**node) for node in nodes))
        raise
    assert source is not None  # noqa: S101 - the choices hold no `none`
    host = probe_host(
        source, clock, per_gpu_s=per_gpu_s, db=db,
        on_gpu=lambda g: click.echo(f"looking at GPU {g.index} {g.name} for {per_gpu_s:g} s", err=True),
    )  # fmt: skip
    if not any(g.hung for g in host.gpus):  # closing the driver under a call that hangs would break it
        source.close()
    findings = examine(host)
    worst = verdict(findings)
    if as_json:
        click.echo(json.dumps(_report(host, findings, str(worst or "ok"))))
    else:
        _print(host, findings, worst is None)
    if worst is Severity.PROBLEM:
        ctx.exit(1)


def _report(host: "HostFacts", findings: "Sequence[Finding]", verdict: str) -> dict[str, Any]:
    """The report as JSON: facts with units in their names, then findings."""
    facts = asdict(host)
    derived = [
        {"method": g.method, "core_share": g.core_share, "official_hardware": g.official_hardware} for g in host.gpus
    ]
    gpus = [{**told, **more} for told, more in zip(facts.pop("gpus"), derived, strict=True)]
    return {"verdict": verdict, "host": facts, "gpus": gpus, "findings": [asdict(f) for f in findings]}


def _print(host: "HostFacts", findings: "Sequence[Finding]", well: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    if host.nodes:
        console.print("device nodes: " + ", ".join(_node(n.path, n.usable) for n in host.nodes))
    for gpu in host.gpus:
        table = Table("what", "seen", title=f"GPU {gpu.index} {gpu.name}", title_justify="left", show_header=False)
        for what, seen in _rows(gpu):
            table.add_row(what, seen)
        console.print(table)
    where: dict[Finding, list[str]] = {}
    for f in findings:  # eight GPUs with one trouble are one paragraph
        where.setdefault(replace(f, where=""), []).append(f.where)
    for f, places in where.items():
        console.print(f"{f.severity.upper()} {', '.join(places)}: {f.what}", soft_wrap=True)
        console.print(f"    means: {f.meaning}", soft_wrap=True)
        if f.remedy:
            console.print(f"    do: {f.remedy}", soft_wrap=True)
    if well:
        console.print("nothing spoils measurements on this host")


def _node(path: str, usable: bool) -> str:
    return path if usable else f"{path} (no permission)"


def _rows(gpu: "GpuFacts") -> Iterator[tuple[str, str]]:
    """One GPU for people; what was not found out says so."""
    unknown = "not told"
    yield "source, driver", f"{gpu.source}, {gpu.driver}"
    yield "metered by", gpu.method
    yield "persistence mode", unknown if gpu.persistence is None else "on" if gpu.persistence else "off"
    yield "power limit", unknown if gpu.power_limit_mw is None else f"{watts(gpu.power_limit_mw):.0f} W"
    yield "compute processes", unknown if gpu.processes is None else str(gpu.processes)
    mean = "unknown" if gpu.mean_power_mw is None else f"{watts(gpu.mean_power_mw):.1f} W"
    floor = "unknown" if gpu.floor_mw is None else f"{watts(gpu.floor_mw):.1f} W (lowest tenth of the samples)"
    yield "power now", mean
    yield "idle floor seen", floor
    yield "readings", f"{gpu.readings:,}, {gpu.failed:,} failed"
    yield "counter read", _cost_words(gpu.counter_cost)
    yield "samples read", _cost_words(gpu.samples_cost)
    yield "one poll a second", unknown if gpu.core_share is None else f"{gpu.core_share:.2%} of a core"
    if steps := gpu.steps:
        period, phase, scatter = (t / NS_PER_MS for t in (steps.period_ns, steps.phase_ns, steps.scatter_ns))
        told = f"every {period:.2f} ms, phase {phase:.1f} ms, scatter {scatter:.1f} ms ({steps.seen} steps)"
        yield "counter moves", told
    else:
        yield "counter moves", "no regular steps seen"
    if ring := gpu.ring:
        age = "unknown" if ring.age_ns is None else f"{ring.age_ns / NS_PER_MS:.0f} ms"
        gaps = f"every {ring.gap_ns / NS_PER_MS:.1f} ms (widest {ring.widest_gap_ns / NS_PER_MS:.1f} ms)"
        yield "driver's samples", f"{ring.length} over {seconds(ring.span_ns):.2f} s, {gaps}, newest {age} old"
    else:
        yield "driver's samples", "none"
    if gpu.ratio:
        off = f"{gpu.ratio.samples_to_counter:.4f} ± {gpu.ratio.u:.4f} over {seconds(gpu.ratio.over_ns):.1f} s"
        yield "samples / counter", off
    else:
        yield "samples / counter", "unknown"
    yield "official hardware", "yes (H100 80 GB)" if gpu.official_hardware else "no: not an H100 80 GB"


def _cost_words(cost: "Cost | None") -> str:
    if cost is None:
        return "none made"
    cpu = "" if cost.cpu_ns is None else f", {cost.cpu_ns / NS_PER_MS:.2f} ms of CPU"
    return f"{cost.wall_ns / NS_PER_MS:.2f} ms (99 %: {cost.wall_p99_ns / NS_PER_MS:.2f} ms){cpu}"
