"""A rating as a table for people; the only file that knows rich's tables.

What all rows of a cohort share stands once above it; only what differs gets a column, so the table fits a terminal.
"""

import io
from collections.abc import Callable, Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .bands import METHOD_RANGE
from .cohort import Cohort, Grade, Setup
from .editions import Edition
from .figures import DIGITS, plus_minus, printable, significant, star_row
from .notes import cohort_notes
from .official import is_estimated
from .render import UNIT, Rating, Scope, official

_METHODS = {METHOD_RANGE: "range (five equal-width bands between best and worst)"}
_SHARED: tuple[tuple[str, Callable[[Setup], str | None]], ...] = (
    ("basis", lambda s: s.basis),
    ("hardware", lambda s: s.hardware),
    ("engine", lambda s: s.engine),
    ("batch", lambda s: s.batch_size),
    ("n", lambda s: None if s.n is None else str(s.n)),
    ("precision", lambda s: s.precision),
    ("dataset", lambda s: s.dataset),
    ("source", lambda s: s.source),
)
_ALWAYS = frozenset({"basis", "hardware", "engine", "n"})
"""Named above each cohort even if nobody stated them: a figure without its set-up says little."""


def as_table(rating: Rating, *, width: int, colour: bool = False, ascii_only: bool = False) -> str:
    """The rating as text of at most `width` columns (longer names wrap); `colour` adds terminal codes."""
    console = _console(width, colour)
    console.print(Text(_plain(rating.title, ascii_only), style="bold"))
    method = f"method {_METHODS.get(rating.method, rating.method)}"
    legend = f"{method} · {UNIT}, {DIGITS} significant digits, ± one standard deviation (sensor gain aside)"
    console.print(Text(_plain(legend, ascii_only)))
    for cohort in rating.outcome.cohorts:
        console.print()
        _print_cohort(console, rating, cohort, ascii_only)
    if rating.outcome.without_cohort:
        console.print()
        console.print(Text("No star:", style="bold"))
        for grade in rating.outcome.without_cohort:
            _bullet(console, _without(grade), ascii_only)
    return _text_of(console)


def editions_table(editions: Sequence[Edition], *, width: int, colour: bool = False, ascii_only: bool = False) -> str:
    """The editions that ship, with the bands of each cohort."""
    console = _console(width, colour)
    for edition in editions:
        heading = f"{edition.name}  {edition.title}"
        told = (
            f"method {edition.method} · basis {edition.basis} · {edition.unit} · {edition.hardware} · {edition.engine}"
        )
        console.print(Text(_plain(heading, ascii_only), style="bold"))
        console.print(Text(_plain(told, ascii_only)))
        table = _table(ascii_only)
        for name in ("task", "class"):
            table.add_column(name, no_wrap=True)
        for name in ("n", "best", "5/4", "4/3", "3/2", "2/1", "worst"):
            table.add_column(name, justify="right", no_wrap=True)
        for cohort in edition.cohorts:
            edges = [significant(edge) for edge in cohort.bands.edges]
            table.add_row(cohort.key.task, cohort.key.model_class or "-", str(cohort.n), *edges)
        console.print(table)
        console.print(Text(_plain(edition.provenance, ascii_only), style="dim"))
        console.print()
    return _text_of(console)


def _print_cohort(console: Console, rating: Rating, cohort: Cohort, ascii_only: bool) -> None:
    heading = [f"edition {cohort.key.edition}" if rating.scope is not Scope.RUNS else "these runs", cohort.key.task]
    if cohort.key.model_class:
        heading.append(f"class {cohort.key.model_class}")
    heading.append(_compared(cohort))
    console.print(Text(_plain(" · ".join(heading), ascii_only), style="bold"))
    shared, differing = _split(cohort.grades)
    console.print(Text(_plain(" · ".join(shared), ascii_only)))
    console.print(_cohort_table(rating, cohort, differing, ascii_only))
    for note in cohort_notes(cohort):
        _bullet(console, note, ascii_only)
    for grade in cohort.grades:
        if grade.reason:
            _bullet(console, f"no star ({grade.entry.model}): {grade.reason}", ascii_only)


def _compared(cohort: Cohort) -> str:
    bands = cohort.bands
    span = f", {significant(bands.best)} to {significant(bands.worst)}" if bands else ""
    if cohort.frozen:
        return f"{cohort.frozen.n} published models{span}"
    n = len(cohort.grades)
    return f"{n} model{'s' if n > 1 else ''}{span}"


def _split(grades: Sequence[Grade]) -> tuple[list[str], list[tuple[str, Callable[[Setup], str | None]]]]:
    """What all grades share, as text, and what differs, as columns."""
    shared, differing = [], []
    for name, read in _SHARED:
        values = {read(g.entry.setup) for g in grades}
        if len(values) > 1:
            differing.append((name, read))
        elif (value := values.pop()) is not None:
            shared.append(f"{name} {value}")
        elif name in _ALWAYS:
            shared.append(f"{name} not stated")
    if all(g.entry.setup.rel_u is None for g in grades):
        shared.append("± not stated")
    return shared, differing


def _cohort_table(
    rating: Rating, cohort: Cohort, differing: Sequence[tuple[str, Callable[[Setup], str | None]]], ascii_only: bool
) -> Table:
    grades = cohort.grades
    with_active = any(g.entry.setup.active_wh_per_1000 is not None for g in grades)
    with_u = any(g.entry.setup.rel_u is not None for g in grades)
    with_time = any(g.entry.setup.p50_s is not None for g in grades)
    table = _table(ascii_only)
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("model", overflow="fold", min_width=12)
    table.add_column("stars", no_wrap=True)
    for name in ["Wh/1000"] + ["±"] * with_u + ["x best"] + ["active"] * with_active + ["s/query"] * with_time:
        table.add_column(_plain(name, ascii_only), justify="right", no_wrap=True)
    for name, _ in differing:
        table.add_column(name, overflow="fold")
    for grade in grades:
        setup = grade.entry.setup
        energy = grade.entry.energy_wh_per_1000 or 0.0
        row = [
            str(grade.rank),
            grade.entry.model,
            _star_cell(rating, grade, ascii_only),
            significant(energy),
        ]
        row += [plus_minus(energy, setup.rel_u)] * with_u + [_optional(grade.ratio_to_best, 3)]
        row += [_optional(setup.active_wh_per_1000)] * with_active + [_optional(setup.p50_s, 3)] * with_time
        row += [read(setup) or "not stated" for _, read in differing]
        table.add_row(*(Text(_plain(cell, ascii_only)) for cell in row))
    return table


def _star_cell(rating: Rating, grade: Grade, ascii_only: bool) -> str:
    """The stars, and in the same cell what keeps them from being an official rating."""
    if grade.stars is None:
        return star_row(None)
    marks = []
    if is_estimated(grade.entry.setup.source):
        marks.append(str(grade.entry.setup.source))
    if official(rating, grade) is False:
        marks.append("not official")
    return " ".join([star_row(grade.stars, ascii_only=ascii_only), ", ".join(marks)]).rstrip()


def _without(grade: Grade) -> str:
    entry = grade.entry
    told: Iterable[str | None] = (
        entry.model,
        entry.task,
        entry.setup.batch_size and f"batch {entry.setup.batch_size}",
        entry.setup.hardware,
        None if entry.energy_wh_per_1000 is None else f"{significant(entry.energy_wh_per_1000)} Wh/1000",
        entry.setup.source,
        entry.setup.run_id and f"run {entry.setup.run_id}",
    )
    return f"{', '.join(t for t in told if t)}: {grade.reason}"


def _optional(value: float | None, digits: int = DIGITS) -> str:
    return "-" if value is None else significant(value, digits)


def _bullet(console: Console, line: str, ascii_only: bool) -> None:
    text = Text(_plain(f"• {line}", ascii_only))
    console.print(text, soft_wrap=True)


def _table(ascii_only: bool) -> Table:
    return Table(box=None, pad_edge=False, header_style="dim", safe_box=ascii_only, padding=(0, 2, 0, 0))


def _console(width: int, colour: bool) -> Console:
    return Console(
        file=io.StringIO(),
        width=width,
        force_terminal=colour,
        color_system="auto" if colour else None,
        legacy_windows=False,
        highlight=False,
        markup=False,
        emoji=False,
    )


def _text_of(console: Console) -> str:
    if not isinstance(console.file, io.StringIO):
        raise TypeError("this console does not write to memory")
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def _plain(text: str, ascii_only: bool) -> str:
    text = printable(text)
    if not ascii_only:
        return text
    for sign, plain in (("·", "|"), ("±", "+/-"), ("•", "-")):
        text = text.replace(sign, plain)
    return text.encode("ascii", "replace").decode()
