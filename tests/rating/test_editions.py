"""The shipped editions."""

import json
from importlib.resources import files

import pytest

from energyd.daemon.errors import DataError
from energyd.rating import editions
from energyd.rating.cohort import Entry, Frozen


def _entry(task: str, model_class: str | None) -> Entry:
    return Entry("m", task, model_class, None, 1.0)


def test_the_shipped_editions_hold_all_published_models() -> None:
    """2025-12 has 6 cohorts with 40 models, 2025-02 has 12 with 166; newest first."""
    found = [(e.name, len(e.cohorts), sum(c.n for c in e.cohorts)) for e in editions.shipped()]
    assert found == [("2025-12", 6, 40), ("2025-02", 12, 166)]


def test_the_shipped_bands_are_equally_wide() -> None:
    """Every inner edge lies a fifth of the range after the one before."""
    for edition in editions.shipped():
        for cohort in edition.cohorts:
            best, worst = cohort.bands.best, cohort.bands.worst
            assert cohort.bands.edges == pytest.approx([best + k * (worst - best) / 5 for k in range(6)], rel=1e-12)


def test_every_edition_states_unit_method_and_provenance() -> None:
    """A figure without unit and origin is not shipped."""
    for edition in editions.shipped():
        assert (edition.method, edition.basis, edition.unit) == ("range", "gpu_run", "Wh per 1,000 queries")
        assert "H100-80GB" in edition.hardware
        assert "Leaderboard" in edition.provenance


def test_the_newest_edition_with_the_cohort_is_taken() -> None:
    """Text generation is rated by 2025-12, a task that only 2025-02 published by that."""
    shipped = editions.shipped()
    text, asr = editions.find(_entry("text_generation", "A"), shipped), editions.find(_entry("asr", "A"), shipped)
    assert isinstance(text, Frozen)
    assert isinstance(asr, Frozen)
    assert (text.key.edition, asr.key.edition) == ("2025-12", "2025-02")


@pytest.mark.parametrize(
    ("task", "model_class", "why"),
    [
        ("text_generation", None, "no model class: text_generation is rated within class A, B or C"),
        ("poetry", None, "no published edition has a cohort poetry"),
    ],
)
def test_no_cohort_is_explained(task: str, model_class: str | None, why: str) -> None:
    """A missing class and an unpublished task each have their own reason."""
    assert editions.find(_entry(task, model_class), editions.shipped()) == why


def test_one_edition_that_lacks_the_cohort_is_named() -> None:
    """With an edition chosen, the reason names it."""
    december = editions.shipped()[:1]
    assert editions.find(_entry("asr", None), december) == "edition 2025-12 has no cohort asr"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edges_wh_per_1000": [1.0, 2.0, 2.0, 3.0, 4.0, 5.0]}, "the edges do not ascend"),
        ({"edges_wh_per_1000": [1.0]}, "cohorts.0.edges_wh_per_1000"),
        ({"n": 3}, "the star counts do not sum to n"),
        ({"model_class": None}, "a class belongs to"),
        ({"n": "many"}, "cohorts.0.n"),
        ({"surprise": 1}, "cohorts.0.surprise"),
    ],
)
def test_a_damaged_edition_is_refused(change: dict[str, object], message: str) -> None:
    """A file that was edited by mistake is one clear line, never a wrong star."""
    text = files("energyd.rating").joinpath("data", "2025-12.json").read_text(encoding="utf-8")
    damaged = json.loads(text)
    damaged["cohorts"][0] |= change
    with pytest.raises(DataError) as caught:
        editions.parse(json.dumps(damaged), "2025-12.json")
    assert "2025-12.json" in str(caught.value)
    assert message in str(caught.value)


def test_a_file_that_is_no_json_is_refused() -> None:
    """Half a file is named as such."""
    with pytest.raises(DataError, match=r"x\.json"):
        editions.parse('{"edition":', "x.json")
