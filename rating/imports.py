"""CSV in: figures of a published table or of anybody's own, one row each.

Columns needed: edition, task, model_class (may be empty), model, gpu_energy_wh_per_1000. Columns that describe the
set-up are understood where present (see `_setup`); all columns are passed through.
"""

import csv
import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from energyd.daemon.errors import DataError
from energyd.daemon.records import Source

from .cohort import CLASSES, Entry, Setup, canonical_task
from .official import REFUSED, deviations, is_estimated

ENERGY = "gpu_energy_wh_per_1000"
REQUIRED = ("edition", "task", "model_class", "model", ENERGY)
NO_ENERGY = "no energy in the file"


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
"""What counts as a number: float() alone would also take '1_000', 'nan', 'infinity' and digits of other scripts."""
_COUNT = re.compile(r"\d{1,15}", re.ASCII)


def read_csv(data: bytes, name: str, *, include_estimates: bool = False) -> tuple[tuple[str, ...], list[Entry]]:
    """Header and entries of the CSV in `data` (UTF-8, with or without a byte order mark), in file order.

    An empty energy or edition or, where one is needed, an empty class leaves a row without a star. Raises DataError
    (file `name`, line, column) for anything that cannot be meant: no number, a negative or infinite one, a missing or
    doubled column, a row of another width, an empty task or model, a class other than A, B, C.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data[: e.start].count(b"\n") + 1
        raise DataError(f"{name}, line {line}: not UTF-8; save the file as CSV in UTF-8") from e
    rows = _rows(text, name)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{name}: the file is empty; the first line must name the columns {', '.join(REQUIRED)}")
    header = _header(first[1], name)
    entries = [
        _entry(dict(zip(header, cells, strict=True)), f"{name}, line {line}", include_estimates)
        for line, cells in _full_width(rows, header, name)
    ]
    if not entries:
        raise DataError(f"{name}: no rows below the header")
    return header, entries


def _rows(text: str, name: str) -> Iterator[tuple[int, list[str]]]:
    """(line where the row begins, cells) of each row that is not blank."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    begins = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield begins, cells
            begins = reader.line_num + 1
    except csv.Error as e:
        raise DataError(f"{name}, line {begins}: {e}") from e


def _header(cells: Sequence[str], name: str) -> tuple[str, ...]:
    header = tuple(cell.strip() for cell in cells)
    for column in header:
        if not column:
            raise DataError(f"{name}, line 1: column {header.index(column) + 1} has no name")
        if header.count(column) > 1:
            raise DataError(f"{name}, line 1: column {column} is there {header.count(column)} times")
    if missing := [column for column in REQUIRED if column not in header]:
        raise DataError(f"{name}, line 1: missing column {', '.join(missing)}; needed are {', '.join(REQUIRED)}")
    return header


def _full_width(
    rows: Iterator[tuple[int, list[str]]], header: Sequence[str], name: str
) -> Iterator[tuple[int, list[str]]]:
    for line, cells in rows:
        if len(cells) != len(header):
            raise DataError(f"{name}, line {line}: {len(cells)} cells where the header has {len(header)} columns")
        yield line, cells


def _entry(cells: dict[str, str], where: str, include_estimates: bool) -> Entry:
    for column in ("task", "model"):
        if not cells[column].strip():
            raise DataError(f"{where}, column {column}: empty")
    model_class = cells["model_class"].strip().upper() or None
    if model_class is not None and model_class not in CLASSES:
        raise DataError(f"{where}, column model_class: {cells['model_class']!r} is not one of {', '.join(CLASSES)}")
    energy = _energy(cells[ENERGY], where)
    setup = _setup(cells)
    refusal = NO_ENERGY if energy is None else None
    if is_estimated(setup.source) and not include_estimates:
        refusal = REFUSED.format(source=setup.source)
    return Entry(
        model=cells["model"].strip(),
        task=canonical_task(cells["task"]),
        model_class=model_class,
        edition=cells["edition"].strip() or None,
        energy_wh_per_1000=energy,
        setup=setup,
        refusal=refusal,
        columns=cells,
    )


def _energy(cell: str, where: str) -> float | None:
    text = cell.strip()
    if not text:
        return None
    where = f"{where}, column {ENERGY}"
    if not _NUMBER.fullmatch(text):
        raise DataError(f"{where}: {cell!r} is not a number (Wh per 1,000 queries, as 17.38 or 5.54E-02)")
    energy = float(text)
    if not math.isfinite(energy):
        raise DataError(f"{where}: {cell!r} is too large")
    if energy < 0:
        raise DataError(f"{where}: {cell!r} is negative")
    return energy


def _setup(cells: dict[str, str]) -> Setup:
    """What the file says of the set-up; a `source` counts only if it is one of ours (others cite an origin there)."""

    def told(column: str) -> str | None:
        return cells.get(column, "").strip() or None

    source = told("source")
    rel_u = float(cells["rel_u"]) if _NUMBER.fullmatch(cells.get("rel_u", "")) else None
    stated = Setup(
        basis=told("basis"),
        source=source if source and {*source.split("+")} <= {*Source} else None,
        hardware=told("hardware"),
        engine=told("engine"),
        precision=told("precision"),
        protocol=told("protocol"),
        dataset=told("dataset"),
        batch_size=told("batch_size"),
        n=int(cells["n"]) if _COUNT.fullmatch(cells.get("n", "")) else None,
        rel_u=rel_u if rel_u is not None and math.isfinite(rel_u) and rel_u >= 0 else None,
        run_id=told("run_id"),
    )
    return replace(stated, not_official=deviations(stated))
