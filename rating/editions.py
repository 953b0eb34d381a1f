"""The published editions whose bands ship with energyd: data files `data/<edition>.json`, never changed once shipped.

A figure measured today is rated against what was published then, so its star does not move when other runs come and
go. A new edition is a new file; nothing else moves.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from energyd.daemon.errors import DataError

from .bands import Bands
from .cohort import CLASSED_TASKS, NO_CLASS, Entry, Frozen, Key

_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class _CohortFile(BaseModel):
    model_config = _STRICT
    task: str
    model_class: Literal["A", "B", "C"] | None
    n: Annotated[int, Field(ge=2)]
    edges_wh_per_1000: Annotated[list[float], Field(min_length=6, max_length=6)]
    stars_5_to_1: Annotated[list[int], Field(min_length=5, max_length=5)]


class _EditionFile(BaseModel):
    model_config = _STRICT
    edition: str
    title: str
    method: Literal["range"]
    basis: Literal["gpu_run"]
    unit: Literal["Wh per 1,000 queries"]
    hardware: str
    engine: str
    provenance: str
    cohorts: list[_CohortFile]


@dataclass(frozen=True, slots=True)
class Edition:
    """A published edition: its set-up in words, and its cohorts with their bands (Wh per 1,000 queries)."""

    name: str
    title: str
    method: str
    basis: str
    unit: str
    hardware: str
    engine: str
    provenance: str
    cohorts: tuple[Frozen, ...]

    def cohort(self, task: str, model_class: str | None) -> Frozen | None:
        """The cohort of a canonical task (and class, where the task has classes); None if it was not published."""
        key = Key(self.name, task, model_class if task in CLASSED_TASKS else None)
        return next((c for c in self.cohorts if c.key == key), None)


def parse(text: str, name: str) -> Edition:
    """The edition in the JSON `text`; raises DataError, naming the file `name`, if it is damaged."""
    try:
        read = _EditionFile.model_validate_json(text)
        cohorts = tuple(_frozen(read.edition, c) for c in read.cohorts)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(f"{name}: {where}: {first['msg']}; reinstall energyd") from e
    except ValueError as e:
        raise DataError(f"{name}: {e}; reinstall energyd") from e
    return Edition(
        read.edition,
        read.title,
        read.method,
        read.basis,
        read.unit,
        read.hardware,
        read.engine,
        read.provenance,
        cohorts,
    )


def shipped() -> tuple[Edition, ...]:
    """All editions that ship with energyd, newest first."""
    folder = files("energyd.rating").joinpath("data")
    found = [parse(f.read_text(encoding="utf-8"), f.name) for f in folder.iterdir() if f.name.endswith(".json")]
    return tuple(sorted(found, key=lambda e: e.name, reverse=True))


def find(entry: Entry, editions: Sequence[Edition]) -> Frozen | str:
    """The published cohort that rates `entry`: of the first of `editions` that has it; else why there is none."""
    if entry.task in CLASSED_TASKS and entry.model_class is None:
        return NO_CLASS.format(task=entry.task)
    for edition in editions:
        if found := edition.cohort(entry.task, entry.model_class):
            return found
    wanted = entry.task + (f" class {entry.model_class}" if entry.task in CLASSED_TASKS else "")
    if len(editions) == 1:
        return f"edition {editions[0].name} has no cohort {wanted}"
    return f"no published edition has a cohort {wanted}"


def named(name: str, editions: Iterable[Edition]) -> Edition | None:
    """The edition called `name`; None if there is none."""
    return next((e for e in editions if e.name == name), None)


def _frozen(edition: str, cohort: _CohortFile) -> Frozen:
    key = Key(edition, cohort.task, cohort.model_class)
    if (cohort.task in CLASSED_TASKS) != (cohort.model_class is not None):
        raise ValueError(f"{key}: a class belongs to {', '.join(sorted(CLASSED_TASKS))} and to no other task")
    best, first, second, third, fourth, worst = cohort.edges_wh_per_1000
    if any(low >= high for low, high in pairwise(cohort.edges_wh_per_1000)):
        raise ValueError(f"{key}: the edges do not ascend")
    if sum(cohort.stars_5_to_1) != cohort.n:
        raise ValueError(f"{key}: the star counts do not sum to n")
    return Frozen(key, Bands(best, (first, second, third, fourth), worst), cohort.n, tuple(cohort.stars_5_to_1))
