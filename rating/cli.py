"""`energyd rate`: stars for the runs of a ledger, or for the rows of a CSV."""

import shutil
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from energyd.daemon.clock import Clock
from energyd.daemon.errors import EnergydError, UsageError
from energyd.daemon.paths import ledger_path
from energyd.daemon.records import Basis, Run

from . import editions as published
from .archive import StoredRating, store
from .bands import METHOD_RANGE
from .candidates import RATEABLE, class_hint, class_overrides, entries_of
from .cohort import Entry, Frozen, canonical_task, key_of_run, rate_against, rate_among
from .editions import Edition
from .figures import star_row
from .imports import read_csv
from .notes import warnings
from .render import Rating, Scope, as_csv, as_json, rows
from .table import as_table, editions_table

_WIDTH_OF_FILES = 160
"""Columns of a table that goes to a file or pipe, where no terminal sets the width."""

_EPILOG = """\b
Examples:
  energyd rate                                        runs of the ledger against the newest published edition
  energyd rate --model-class my/model-8b=A --task text-generation
  energyd rate --among-runs --include-estimates       compare runs with each other (hosts without a GPU too)
  energyd rate --input published.csv --format csv     rate the rows of a file among themselves
  energyd rate --input mine.csv --frozen --edition 2025-12
  energyd rate --editions                             the published bands that ship with energyd

\b
CSV in: edition, task, model_class (A, B, C for text_generation and reasoning), model, gpu_energy_wh_per_1000.
CSV out: every input column, then stars and rank, and last a reason if some row has no star. An input column called
stars comes out as stars_in.

Stars are five equal-width bands between the best and the worst of a cohort (edition, task, class): 5 is the best.
A figure on an edge gets the better star. Exit code 0: rated; 2: bad input.
"""


@click.command(epilog=_EPILOG)
@click.option("--db", type=click.Path(path_type=Path), help="The ledger whose runs are rated.  [default: the daemon's]")
@click.option(
    "--input",
    "input_file",
    type=click.Path(path_type=Path, allow_dash=True),
    metavar="CSV",
    help="Rate the rows of this file instead of runs ('-': standard input).",
)
@click.option(
    "--edition",
    help="Rate against this edition (2025-12, 2025-02); with --input: only its rows."
    "  [default: the newest that has the cohort]",
)
@click.option("--task", help="Only this task, e.g. text-generation.")
@click.option(
    "--basis",
    type=click.Choice([b.value for b in RATEABLE]),
    default=Basis.GPU_RUN.value,
    show_default=True,
    help="Which figure of a run: the whole GPU over the run (as published), or the share of its queries.",
)
@click.option(
    "--method", type=click.Choice([METHOD_RANGE]), default=METHOD_RANGE, show_default=True, help="How stars are given."
)
@click.option(
    "--model-class",
    "model_classes",
    multiple=True,
    metavar="MODEL=CLASS",
    help="Class A, B or C of a model; may be given several times.",
)
@click.option("--among-runs", is_flag=True, help="Compare the runs with each other instead of an edition.")
@click.option("--frozen", is_flag=True, help="With --input: rate each row against the shipped bands of its edition.")
@click.option("--include-estimates", is_flag=True, help="Rate figures that were not measured too, and mark them.")
@click.option("--all", "every", is_flag=True, help="All runs, not only the latest of each model and set-up.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "csv", "json"]),
    default="table",
    show_default=True,
    help="How to print.",
)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Write to this file instead.")
@click.option(
    "--store/--no-store", "keep", default=True, show_default=True, help="Keep the rating of runs in the ledger."
)
@click.option("--editions", "list_editions", is_flag=True, help="List the published bands that ship, and exit.")
def rate(
    *,
    db: Path | None,
    input_file: Path | None,
    edition: str | None,
    task: str | None,
    basis: str,
    method: str,
    model_classes: tuple[str, ...],
    among_runs: bool,
    frozen: bool,
    include_estimates: bool,
    every: bool,
    form: str,
    output: Path | None,
    keep: bool,
    list_editions: bool,
) -> None:
    """Give stars to measured models: 5 for the best fifth of the energy range, 1 for the worst."""
    shipped = published.shipped()
    if list_editions:
        _emit(
            lambda width, colour, plain: editions_table(shipped, width=width, colour=colour, ascii_only=plain), output
        )
        return
    if input_file is not None:
        _refuse_with_input(db=db, among_runs=among_runs, model_classes=model_classes, every=every, basis=basis)
        rating = _of_file(
            path=input_file,
            shipped=shipped,
            edition=edition,
            task=task,
            frozen=frozen,
            include_estimates=include_estimates,
        )
    else:
        if frozen:
            raise UsageError("--frozen belongs to --input; runs are rated against frozen bands anyway")
        if among_runs and edition:
            raise UsageError("--among-runs rates against no edition: leave out --edition or --among-runs")
        path = db or ledger_path()
        runs = _runs(path, task)
        entries = entries_of(
            runs,
            basis=Basis(basis),
            every=every,
            include_estimates=include_estimates,
            classes=class_overrides(model_classes, [r.model for r in runs]),
        )
        rating = _of_runs(entries, shipped, edition, among_runs)
    _print(rating, form, output)
    if input_file is None and keep:
        _keep(rating, path, method, basis)


def _refuse_with_input(**options: object) -> None:
    """Options that speak of runs would be ignored with a file: say so instead."""
    flags = {"db": None, "among_runs": False, "model_classes": (), "every": False, "basis": Basis.GPU_RUN.value}
    spelled = {"model_classes": "--model-class", "every": "--all"}
    for name, value in options.items():
        if value != flags[name]:
            flag = spelled.get(name, "--" + name.replace("_", "-"))
            raise UsageError(
                f"{flag} belongs to the runs of a ledger and does nothing with --input; leave one of them out"
            )


def _of_file(
    *,
    path: Path,
    shipped: Sequence[Edition],
    edition: str | None,
    task: str | None,
    frozen: bool,
    include_estimates: bool,
) -> Rating:
    where = "standard input" if str(path) == "-" else str(path)
    header, entries = read_csv(_bytes(path), where, include_estimates=include_estimates)
    if frozen:
        if edition:
            _edition(edition, shipped)
        entries = _only_task(entries, task, where)
        outcome = rate_against(entries, lambda entry: _find_frozen(entry, shipped, edition))
        return Rating(Scope.EDITION, outcome, header)
    if edition:
        there = sorted({e.edition for e in entries if e.edition})
        entries = [e for e in entries if e.edition == edition]
        if not entries:
            raise UsageError(f"{where}: no row of edition {edition!r}; editions there: {', '.join(there) or 'none'}")
    return Rating(Scope.FILE, rate_among(_only_task(entries, task, where)), header)


def _find_frozen(entry: Entry, shipped: Sequence[Edition], edition: str | None) -> Frozen | str:
    name = edition or entry.edition
    if not name:
        return "no edition"
    found = published.named(name, shipped)
    return published.find(entry, [found]) if found else f"no edition {name} ships with energyd"


def _of_runs(entries: Sequence[Entry], shipped: Sequence[Edition], edition: str | None, among_runs: bool) -> Rating:
    if among_runs:
        return Rating(Scope.RUNS, rate_among(entries, key_of_run))
    candidates = [_edition(edition, shipped)] if edition else shipped

    def find(entry: Entry) -> Frozen | str:
        found = published.find(entry, candidates)
        hint = class_hint(entry)
        return f"{found}; {hint}" if isinstance(found, str) and hint else found

    return Rating(Scope.EDITION, rate_against(entries, find))


def _runs(path: Path, task: str | None) -> list[Run]:
    """The runs of the ledger (of one task); raises UsageError, saying what to do, if there are none."""
    what_to_do = "measure one: `energyd start --upstream URL`, then `energyd bench --url URL --model M --task T`"
    if not path.exists():
        raise UsageError(f"no ledger at {path}; name it with --db, or {what_to_do}")
    from energyd.daemon.ledger import Ledger  # noqa: PLC0415 - rating a file needs no database

    with Ledger.open(path, readonly=True) as ledger:
        runs = ledger.runs()
    if not runs:
        raise UsageError(f"no runs in {path}; {what_to_do}")
    if task is None:
        return runs
    wanted = [run for run in runs if canonical_task(run.task) == canonical_task(task)]
    if not wanted:
        there = ", ".join(sorted({canonical_task(run.task) for run in runs}))
        raise UsageError(f"no runs of task {canonical_task(task)} in {path}; tasks there: {there}")
    return wanted


def _only_task(entries: Sequence[Entry], task: str | None, where: str) -> list[Entry]:
    if task is None:
        return list(entries)
    wanted = [e for e in entries if e.task == canonical_task(task)]
    if not wanted:
        there = ", ".join(sorted({e.task for e in entries}))
        raise UsageError(f"{where}: no row of task {canonical_task(task)}; tasks there: {there}")
    return wanted


def _edition(name: str, shipped: Sequence[Edition]) -> Edition:
    if found := published.named(name, shipped):
        return found
    raise UsageError(f"no edition {name!r} ships with energyd; there are {', '.join(e.name for e in shipped)}")


def _bytes(path: Path) -> bytes:
    try:
        return sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as e:
        raise UsageError(f"cannot read {path}: {e.strerror}") from e


def _print(rating: Rating, form: str, output: Path | None) -> None:
    if form == "csv":
        _write(as_csv(rating), output)
        # A CSV has no place for notes, but figures of different set-ups are never mixed silently.
        for cohort in rating.outcome.cohorts:
            for warning in warnings(cohort.grades):
                click.echo(f"energyd: {cohort.key}: {warning}", err=True)
    elif form == "json":
        _write(as_json(rating), output)
    else:
        _emit(lambda width, colour, plain: as_table(rating, width=width, colour=colour, ascii_only=plain), output)


def _emit(draw: Callable[[int, bool, bool], str], output: Path | None) -> None:
    """Draw a table for where it goes: a terminal's width and colours, or a wide plain text for files and pipes."""
    if output is not None or not sys.stdout.isatty():
        width, colour = _WIDTH_OF_FILES, False
    else:
        width, colour = shutil.get_terminal_size().columns, True
    _write(draw(width, colour, output is None and not _takes_stars()), output)


def _takes_stars() -> bool:
    try:
        star_row(1).encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _write(text: str, output: Path | None) -> None:
    if output is None:
        # As bytes: a CSV with a model name beyond the terminal's encoding must not fail half-way.
        click.echo(text.encode(), nl=False)
        return
    try:
        output.write_text(text, encoding="utf-8", newline="")
    except OSError as e:
        raise UsageError(f"cannot write {output}: {e.strerror}") from e
    click.echo(f"energyd: wrote {output}", err=True)


def _keep(rating: Rating, path: Path, method: str, basis: str) -> None:
    """Keep what was given, one record an edition. The stars are already printed: a failure here is one warning."""
    given = rows(rating)
    try:
        for edition in sorted({str(row["edition"]) for row in given if row["edition"]}):
            of_edition = [row for row in given if row["edition"] == edition]
            store(StoredRating(uuid.uuid4().hex, Clock.start().now_ns(), edition, method, basis, of_edition), path)
    except EnergydError as e:
        why = " ".join(str(e).split())  # a daemon's answer may have several lines
        click.echo(f"energyd: the rating was not kept in the ledger: {why} (--no-store leaves that out)", err=True)
