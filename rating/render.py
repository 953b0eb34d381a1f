"""A rating as CSV or JSON, and the one record that all outputs are drawn from. Pure; the table is in `table`.

CSV: every input column in its order and unchanged, then `stars` and `rank`; and, last, `reason` if any row has no star.
An input column of one of these names comes out with `_in` appended.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from .bands import METHOD_RANGE
from .cohort import Cohort, Entry, Grade, Outcome
from .imports import ENERGY
from .notes import cohort_notes

UNIT = "Wh per 1,000 queries"
FORMAT_VERSION = 1
"""Of the JSON. History: 1 (0.1.0)."""


class Scope(StrEnum):
    """What a star was given against."""

    EDITION = "edition"
    """The frozen bands of a published edition."""
    FILE = "file"
    """The rows of a file among themselves."""
    RUNS = "runs"
    """The runs of a ledger among themselves."""


TITLES: Mapping[Scope, str] = {
    Scope.EDITION: "Rated against the published edition; self-measured, not issued by AI Energy Score",
    Scope.FILE: "The rows of the file rated among themselves, by edition, task and class",
    Scope.RUNS: "These runs rated among themselves: a comparison, not a rating against a published edition",
}


@dataclass(frozen=True, slots=True)
class Rating:
    """Everything that is shown. `header` names the columns of the input file; None for runs of a ledger."""

    scope: Scope
    outcome: Outcome
    header: tuple[str, ...] | None = None
    method: str = METHOD_RANGE

    @property
    def title(self) -> str:
        """One line that says what the stars are, and what they are not."""
        if self.scope is Scope.EDITION and self.header is not None:
            return "The rows of the file rated against the published editions"
        return TITLES[self.scope]


def official(rating: Rating, grade: Grade) -> bool | None:
    """Whether a star is the official method on the official set-up; None where nobody said (rows of a file)."""
    if grade.entry.setup.not_official or rating.scope is Scope.RUNS:
        return False
    return None if rating.header is not None or grade.stars is None else True


def as_csv(rating: Rating) -> str:
    """The rating as CSV, rows in input order, figures in full precision."""
    grades = rating.outcome.in_order
    added = ["stars", "rank"] + (["reason"] if any(g.reason for g in grades) else [])
    columns = rating.header or tuple(_run_cells(rating, None))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*renamed(columns, added), *added])
    for grade in grades:
        cells = _cells(rating, grade)
        results: dict[str, object] = {"stars": grade.stars, "rank": grade.rank, "reason": grade.reason}
        writer.writerow([_text(cells[c]) for c in columns] + [_text(results[c]) for c in added])
    return out.getvalue()


def as_json(rating: Rating) -> str:
    """The rating as one JSON object: cohorts with their bands and notes, and all rows in input order."""
    whole = {
        "format": "energyd-rating",
        "version": FORMAT_VERSION,
        "scope": rating.scope.value,
        "title": rating.title,
        "method": rating.method,
        "unit": UNIT,
        "cohorts": [_cohort(c) for c in rating.outcome.cohorts],
        "rows": rows(rating),
    }
    return json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def rows(rating: Rating) -> list[dict[str, object]]:
    """The graded rows, JSON-able, in input order: the columns as in the CSV, then what the rating found."""
    found = []
    for grade in rating.outcome.in_order:
        results: dict[str, object] = {
            "stars": grade.stars,
            "rank": grade.rank,
            "ratio_to_best": grade.ratio_to_best,
            "stars_within_u": list(grade.stars_within_u) if grade.stars_within_u else None,
            "clamped": grade.clamped.value if grade.clamped else None,
            "reason": grade.reason,
            "official": official(rating, grade),
            "not_official_because": list(grade.entry.setup.not_official),
        }
        cells = _cells(rating, grade)
        if rating.header is None:
            cells = {name: cell for name, cell in cells.items() if name not in results}
        else:
            cells |= {ENERGY: grade.entry.energy_wh_per_1000}
        named = dict(zip(renamed(tuple(cells), tuple(results)), cells.values(), strict=True))
        found.append(named | results)
    return found


def renamed(columns: Sequence[str], taken: Sequence[str]) -> list[str]:
    """`columns` with `_in` appended to those that are `taken`, as often as it needs to be unique."""
    names: list[str] = []
    for column in columns:
        name = column
        while name in taken or (name != column and name in columns):
            name += "_in"
        names.append(name)
    return names


def _cohort(cohort: Cohort) -> dict[str, object]:
    bands = cohort.bands
    return {
        "edition": cohort.key.edition,
        "task": cohort.key.task,
        "model_class": cohort.key.model_class,
        "n": len(cohort.grades),
        "published_n": cohort.frozen.n if cohort.frozen else None,
        "edges_wh_per_1000": list(bands.edges) if bands else None,
        "notes": list(cohort_notes(cohort)),
    }


def _cells(rating: Rating, grade: Grade) -> dict[str, object]:
    return _run_cells(rating, grade) if rating.header is None else dict(grade.entry.columns)


def _run_cells(rating: Rating, grade: Grade | None) -> dict[str, object]:
    """Columns of a run, so named that the CSV can be read again; without a grade only the names count."""
    entry = grade.entry if grade else Entry("", "", None, None, None)
    setup = entry.setup
    return {
        "edition": _edition(rating, grade),
        "task": entry.task,
        "model_class": entry.model_class,
        "model": entry.model,
        ENERGY: entry.energy_wh_per_1000,
        "basis": setup.basis,
        "rel_u": setup.rel_u,
        "source": setup.source,
        "hardware": setup.hardware,
        "engine": setup.engine,
        "precision": setup.precision,
        "protocol": setup.protocol,
        "dataset": setup.dataset,
        "batch_size": setup.batch_size,
        "n": setup.n,
        "failed": setup.failed,
        "active_wh_per_1000": setup.active_wh_per_1000,
        "p50_s": setup.p50_s,
        "idle_w": setup.idle_w,
        "run_id": setup.run_id,
        "official": official(rating, grade) if grade else None,
        "not_official_because": "; ".join(setup.not_official),
    }


def _edition(rating: Rating, grade: Grade | None) -> str | None:
    if grade is None:
        return None
    return next((c.key.edition for c in rating.outcome.cohorts if grade in c.grades), None)


def _text(cell: object) -> str:
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return str(cell)
