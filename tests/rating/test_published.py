"""The 166 published stars, from the table that ENERGYD_PUBLISHED_CSV names (its rows are not ours to ship)."""

import csv
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

ROWS = 166

Rate = Callable[..., Result]


@pytest.fixture
def published() -> Path:
    """The published table; skips without it."""
    name = os.environ.get("ENERGYD_PUBLISHED_CSV")
    if not name:
        pytest.skip("ENERGYD_PUBLISHED_CSV names no file: the published table is not part of this repository")
    return Path(name)


def _rated(rate: Rate, *arguments: object) -> list[dict[str, str]]:
    result = rate(*arguments, "--format", "csv")
    assert result.exit_code == 0
    return list(csv.DictReader(io.StringIO(result.stdout)))


def test_all_published_stars_come_out(rate: Rate, published: Path) -> None:
    """Rated among themselves, all 166 rows get the star that was published."""
    rows = _rated(rate, "--input", published)
    assert len(rows) == ROWS
    assert [r["stars"] for r in rows] == [r["stars_in"] for r in rows]


def test_the_frozen_bands_give_the_same_stars(rate: Rate, published: Path) -> None:
    """The bands that ship give every published row its star too."""
    rows = _rated(rate, "--input", published, "--frozen")
    assert len(rows) == ROWS
    assert [r["stars"] for r in rows] == [r["stars_in"] for r in rows]


def test_every_cell_is_passed_through(rate: Rate, published: Path) -> None:
    """All columns of the published table come out unchanged and in order, then stars and rank."""
    with published.open(encoding="utf-8", newline="") as file:
        given = list(csv.reader(file))
    result = rate("--input", published, "--format", "csv")
    found = list(csv.reader(io.StringIO(result.stdout)))
    assert found[0] == [*("stars_in" if c == "stars" else c for c in given[0]), "stars", "rank"]
    assert [row[:-2] for row in found[1:]] == given[1:]
