"""Verbs on a ledger: `settle`, `audit`, `export`, `status`; and `daemon`, which runs the meter half alone."""

import csv
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from . import paths
from .errors import UsageError
from .units import joules, seconds, watt_hours, watts

if TYPE_CHECKING:
    from .ledger import Ledger

DB = click.option(
    "--db", type=click.Path(dir_okay=False, path_type=Path), default=None, show_default="the state folder's energyd.db",
    envvar="ENERGYD_DB", help="The ledger file.",
)  # fmt: skip


def ledger_path(db: Path | None) -> Path:
    """The ledger that is meant: `db`, else the default one."""
    return db if db is not None else paths.ledger_path()


@click.command(epilog="Example: energyd settle h200.json.gz --db h200.db --policy tokens")
@click.argument("trace", type=click.Path(path_type=Path))
@click.option(
    "--db",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where the books go; must not hold any yet. [default: TRACE's name with .db]",
)
@click.option(
    "--policy",
    type=click.Choice(["time", "tokens"]),
    default="time",
    show_default=True,
    help="How queries share what they caused.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def settle(trace: Path, db: Path | None, policy: str, *, as_json: bool) -> None:
    """Book a recorded trace: every joule of its counter, to the queries and accounts that it belongs to."""
    from .ledger import Ledger
    from .offline import default_db, settle_trace
    from .trace import read_trace

    recording = read_trace(trace)
    target = db if db is not None else default_db(trace)
    with Ledger.open(target) as ledger:
        if ledger.gpus():
            raise UsageError(f"{target} holds books already; name a new file with --db")
        settle_trace(recording, ledger, policy=policy)
        summary = {"trace": str(trace), "db": str(target), "policy": policy, **_summary(ledger)}
    if as_json:
        click.echo(json.dumps(summary))
    else:
        _print_summary(summary)


def _summary(ledger: "Ledger") -> dict[str, Any]:
    """Totals per GPU, account and model in µJ, and per model in Wh per query."""
    accounts: dict[str, int] = {}
    models: dict[str, dict[str, int]] = {}
    for total in ledger.account_totals():
        accounts[total.account] = accounts.get(total.account, 0) + total.energy_uj
        if total.model is not None:
            own = models.setdefault(total.model, {"active_energy_uj": 0, "standing_energy_uj": 0, "queries": 0})
            own[f"{total.account}_energy_uj"] += total.energy_uj
    for row in ledger.query_totals():
        models.setdefault(row["model"] or "other", {"active_energy_uj": 0, "standing_energy_uj": 0, "queries": 0})[
            "queries"
        ] += row["queries"]
    meters = ledger.meter_totals()
    quality = ledger.quality()
    metered_uj = sum(m.settled_uj + m.unsettled_uj for m in meters)
    return {
        "metered_energy_uj": metered_uj,
        "unsettled_energy_uj": sum(m.unsettled_uj for m in meters),
        "residual_uj": metered_uj - sum(m.unsettled_uj for m in meters) - sum(accounts.values()),
        "accounts_uj": dict(sorted(accounts.items())),
        "models": models,
        "queries": quality["queries"],
        "queries_with_energy": quality["with_energy"],
        "rel_u": quality["rel_u"],
        "gpus": [{"uuid": m.uuid, "name": m.name, "source": m.source, "windows": m.windows} for m in meters],
    }


def _print_summary(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    gpus = ", ".join(f"{g['name']} ({g['source']})" for g in summary["gpus"])
    console.print(f"{gpus}: {joules(summary['metered_energy_uj']):,.3f} J metered, policy {summary['policy']}")
    table = Table("model", "queries", "active J", "standing J", "Wh per 1,000 queries (serving)")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, m in sorted(summary["models"].items()):
        serving_uj = m["active_energy_uj"] + m["standing_energy_uj"]
        per_1000 = f"{watt_hours(serving_uj) / m['queries'] * 1000:.4g}" if m["queries"] else ""
        table.add_row(
            name, f"{m['queries']:,}", f"{joules(m['active_energy_uj']):,.3f}", f"{joules(m['standing_energy_uj']):,.3f}",
            per_1000,
        )  # fmt: skip
    console.print(table)
    for account, energy_uj in summary["accounts_uj"].items():
        share = energy_uj / summary["metered_energy_uj"] if summary["metered_energy_uj"] else 0.0
        console.print(f"  {account:<24} {joules(energy_uj):>16,.3f} J  {share:6.1%}")
    console.print(
        f"  {summary['queries_with_energy']:,} of {summary['queries']:,} queries have an energy;"
        f" residual {summary['residual_uj']} µJ; books in {summary['db']}"
    )


@click.command(epilog="Example: energyd audit --db energyd.db")
@DB
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def audit(ctx: click.Context, db: Path | None, *, as_json: bool) -> None:
    """Prove the books again: every joule on one account, none lost, none twice. Exit 1 on any finding."""
    from . import audit as checks
    from .ledger import Ledger

    with Ledger.open(ledger_path(db), readonly=True) as ledger:
        findings = [
            *checks.check_windows(ledger.audit_windows()),
            *checks.check_queries(ledger.audit_queries()),
            *checks.check_orphans(ledger.audit_orphans()),
            *checks.check_days(ledger.audit_days()),
            *checks.check_closings(ledger.audit_closings()),
        ]
        summary = _summary(ledger)
        quality = dict(ledger.quality())
        dropped = sum(ledger.dropped_events().values())
    unattributed_uj = sum(v for k, v in summary["accounts_uj"].items() if k.startswith("unattributed"))
    metered_uj = summary["metered_energy_uj"]
    report = {
        "balanced": not findings,
        "residual_uj": summary["residual_uj"] + sum(abs(f.residual_uj) for f in findings),
        "findings": [{"law": f.law, "where": f.where, "what": f.what, "residual_uj": f.residual_uj} for f in findings],
        "metered_energy_uj": metered_uj,
        "unsettled_energy_uj": summary["unsettled_energy_uj"],
        "accounts_uj": summary["accounts_uj"],
        "unattributed_share": unattributed_uj / metered_uj if metered_uj else None,
        "queries": quality["queries"],
        "queries_with_energy": quality["with_energy"],
        "queries_late": quality["late"],
        "queries_partial": quality["partial"],
        "coverage": None,
        "rel_u": quality["rel_u"],
        "dropped_events": dropped,
        "sources": sorted({g["source"] for g in summary["gpus"]}),
    }
    if summary["residual_uj"] and not findings:
        report["balanced"] = False
    click.echo(json.dumps(report) if as_json else "\n".join(_audit_lines(report)))
    if not report["balanced"]:
        ctx.exit(1)


def _audit_lines(report: dict[str, Any]) -> Iterable[str]:
    for f in report["findings"]:
        yield f"FINDING {f['law']}: {f['where']}: {f['what']}"
    verdict = "the books balance" if report["balanced"] else f"{len(report['findings'])} findings"
    settled_uj = report["metered_energy_uj"] - report["unsettled_energy_uj"]
    yield f"{verdict}: residual {report['residual_uj']} µJ over {joules(settled_uj):,.3f} J settled"
    if report["unsettled_energy_uj"]:
        yield f"  not settled yet: {joules(report['unsettled_energy_uj']):,.3f} J (queries still running, or just ended)"
    yield "balance is not accuracy; of that the ledger says:"
    yield f"  source: {', '.join(report['sources']) or 'no GPU metered'}"
    share = report["unattributed_share"]
    yield f"  unattributed share: {'unknown' if share is None else f'{share:.2%}'}"
    yield (
        f"  queries with an energy: {report['queries_with_energy']:,} of {report['queries']:,}"
        f" ({report['queries_late']:,} late, {report['queries_partial']:,} partial)"
    )
    yield "  coverage of the server's own traffic: unknown (only what came through the proxy is counted)"
    rel = report["rel_u"]
    yield f"  stated uncertainty per query (±1 sd, energy-weighted mean): {'unknown' if rel is None else f'{rel:.1%}'}"
    yield f"  proxy events dropped: {report['dropped_events']:,}"


class _Sink(Protocol):
    def write(self, text: str, /) -> object: ...


@click.command(epilog="Example: energyd export queries --db energyd.db --format csv > queries.csv")
@click.argument("what", type=click.Choice(["queries"]))
@DB
@click.option(
    "--format", "form", type=click.Choice(["csv", "jsonl"]), default="csv", show_default=True, help="Output format."
)
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write to this file instead of the terminal."
)
def export(what: str, db: Path | None, form: str, output: Path | None) -> None:  # noqa: ARG001 - `queries` is the only table yet
    """Write every query with its energy; a cell is empty where a value is unknown."""
    from .ledger import Ledger

    with Ledger.open(ledger_path(db), readonly=True) as ledger:
        if output is None:
            _write_queries(ledger, sys.stdout, form)
            return
        partial = output.with_name(output.name + ".partial")
        try:
            with partial.open("w", newline="", encoding="utf-8") as sink:
                _write_queries(ledger, sink, form)
            partial.replace(output)  # a file that exists is whole
        except OSError as e:
            raise UsageError(f"cannot write {output}: {e.strerror}") from e


def _write_queries(ledger: "Ledger", sink: _Sink, form: str) -> None:
    from .ledger_views import EXPORT_COLUMNS

    if form == "csv":
        writer = csv.DictWriter(sink, EXPORT_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(ledger.export_queries())
        return
    for row in ledger.export_queries():
        sink.write(json.dumps(row) + "\n")


@click.command(epilog="Example: energyd status")
@DB
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def status(db: Path | None, *, as_json: bool) -> None:
    """Ask the running daemon how it is: GPUs, unsettled energy, queries in flight."""
    from .localclient import ask_status

    found = ask_status(paths.socket_path(ledger_path(db)))
    if as_json:
        click.echo(json.dumps(found))
        return
    click.echo(f"energyd {found['version']} on host {found['host_id']}, ledger {found['db']}, policy {found['policy']}")
    for gpu in found["gpus"]:
        power = "unknown" if gpu["power_mw"] is None else f"{watts(gpu['power_mw']):.1f} W"
        click.echo(f"  GPU {gpu['index']} {gpu['name']} ({gpu['source']}): {power} now, {gpu['state']}")
    age_ns = found["oldest_unsettled_age_ns"]
    age = "none" if age_ns is None else f"oldest {seconds(age_ns):.1f} s"
    click.echo(
        f"  not settled: {joules(found['unsettled_uj']):,.1f} J ({age}); {found['open_queries']} queries in flight"
    )
    click.echo(f"  proxy workers: {found['workers']}")


def daemon_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that `daemon` and `start` share."""
    options = (
        click.option("--admin", default="127.0.0.1:9709", show_default=True, help="Where /metrics and the JSON API listen."),
        click.option("--sensor", type=click.Choice(["nvml", "estimate", "replay", "none"]), default="nvml", show_default=True,
                     help="nvml: the GPU's counter. estimate: CPU busy share x watts, marked. replay: a recorded trace."),
        click.option("--trace", type=click.Path(path_type=Path), help="The recorded trace for --sensor replay."),
        click.option("--estimate-watts", type=float, help="Nameplate power for --sensor estimate."),
        click.option("--gpu", multiple=True, help="Index of a GPU to meter; repeat for more. [default: all]"),
        click.option("--idle-watts", type=float, help="Idle power of a GPU until a quiet moment was seen."),
        click.option("--policy", type=click.Choice(["time", "tokens"]), default="time", show_default=True,
                     help="How queries share what they caused."),
        click.option("--horizon", type=float, default=600.0, show_default=True,
                     help="Seconds after which an open query no longer holds up the others' figures."),
        click.option("--recovery-wait", type=float, default=120.0, show_default=True,
                     help="Seconds to wait for a silent proxy after a start or a loss."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@click.command(epilog="Example: energyd daemon --sensor nvml --admin 127.0.0.1:9709")
@DB
@daemon_options
def daemon(db: Path | None, **options: Any) -> None:
    """Run the meter, the ledger and the admin port without a proxy."""
    import asyncio
    import logging

    from .config import Address, Settings
    from .service import Service

    logging.basicConfig(level=logging.INFO, format="energyd daemon: %(levelname)s %(message)s")
    settings = Settings.checked(
        db=ledger_path(db).absolute(),
        admin=Address.parse(options["admin"], "--admin"),
        sensor=options["sensor"],
        trace=options["trace"],
        estimate_watts=options["estimate_watts"],
        gpus=options["gpu"],
        idle_watts=options["idle_watts"],
        policy=options["policy"],
        horizon_s=options["horizon"],
        recovery_wait_s=options["recovery_wait"],
    )
    asyncio.run(Service(settings).run())
