"""Cohorts, ranks and ratios."""

import pytest

from energyd.rating.cohort import Entry, Setup, canonical_task, key_of_run, rate_among


def _entry(model: str, wh: float | None, *, task: str = "asr", model_class: str | None = None, **more: object) -> Entry:
    return Entry(model, task, model_class, "2025-02", wh, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["text-generation", "text_generation", " Text-Generation "])
def test_task_names_have_one_spelling(name: str) -> None:
    """Hyphens, capitals and blanks name the same task."""
    assert canonical_task(name) == "text_generation"


def test_classes_split_only_where_they_count() -> None:
    """Text generation is rated within a class; for other tasks a class in the file changes nothing."""
    split = rate_among(
        [_entry("a", 1.0, task="reasoning", model_class="A"), _entry("b", 2.0, task="reasoning", model_class="B")]
    )
    joint = rate_among([_entry("a", 1.0, model_class="A"), _entry("b", 2.0, model_class="B")])
    assert [g.stars for g in split.in_order] == [None, None]
    assert [g.stars for g in joint.in_order] == [5, 1]


def test_editions_are_not_pooled() -> None:
    """The same task in two editions is two cohorts, in order of their names."""
    new = Entry("b", "asr", None, "2025-12", 9.0)
    outcome = rate_among([new, _entry("a", 1.0)])
    assert [str(c.key) for c in outcome.cohorts] == ["2025-02 asr", "2025-12 asr"]


def test_ties_share_star_and_rank() -> None:
    """Equal figures have equal rank and star; the next rank is skipped; order in the file stays."""
    grades = rate_among([_entry("x", 3.0), _entry("y", 1.0), _entry("z", 1.0), _entry("w", 11.0)]).in_order
    assert [(g.entry.model, g.rank, g.stars) for g in grades] == [("x", 3, 5), ("y", 1, 5), ("z", 1, 5), ("w", 4, 1)]


def test_ratio_to_the_best() -> None:
    """The ratio says how many times the best one's energy a model needs."""
    assert [g.ratio_to_best for g in rate_among([_entry("a", 2.0), _entry("b", 5.0)]).in_order] == [1.0, 2.5]


def test_no_ratio_to_a_zero() -> None:
    """A best figure of zero divides nothing."""
    assert [g.ratio_to_best for g in rate_among([_entry("a", 0.0), _entry("b", 5.0)]).in_order] == [None, None]


@pytest.mark.parametrize(("figures", "reason"), [([4.0], "only model"), ([4.0, 4.0], "same figure")])
def test_no_star_without_a_comparison(figures: list[float], reason: str) -> None:
    """A cohort of one, or of equals, has ranks and a reason but no stars."""
    for grade in rate_among([_entry("m", f) for f in figures]).in_order:
        assert (grade.stars, grade.rank) == (None, 1)
        assert reason in (grade.reason or "")


def test_what_cannot_be_rated_moves_nobody_elses_star() -> None:
    """A refused figure and a missing one take no part in best and worst."""
    outcome = rate_among([_entry("a", 1.0), _entry("b", 2.0), _entry("c", 99.0, refusal="refused"), _entry("d", None)])
    assert [(g.stars, g.reason) for g in outcome.in_order] == [
        (5, None),
        (1, None),
        (None, "refused"),
        (None, "no energy"),
    ]
    assert [g.entry.model for g in outcome.without_cohort] == ["c", "d"]


def test_a_missing_class_is_the_rows_own_reason() -> None:
    """Without a class a text generator gets no star, and its neighbours keep theirs."""
    rows = [
        _entry(m, f, task="text_generation", model_class=c)
        for m, f, c in (("a", 1, "A"), ("b", 2, "A"), ("c", 3, None))
    ]
    grades = rate_among(rows).in_order
    assert [g.stars for g in grades] == [5, 1, None]
    assert grades[2].reason == "no model class: text_generation is rated within class A, B or C"


def test_runs_among_themselves_need_no_class() -> None:
    """Runs are compared by task alone."""
    rows = [Entry("a", "text_generation", None, None, 1.0), Entry("b", "text_generation", "A", None, 2.0)]
    assert [g.stars for g in rate_among(rows, key_of_run).in_order] == [5, 1]


def test_the_uncertainty_of_a_star() -> None:
    """A figure whose uncertainty reaches over an edge could have the next star."""
    rows = [_entry("a", 0.0), _entry("b", 2.1, setup=Setup(rel_u=0.1)), _entry("c", 10.0)]
    assert rate_among(rows).in_order[1].stars_within_u == (4, 5)
