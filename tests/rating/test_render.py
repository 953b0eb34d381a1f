"""A rating as CSV, JSON and table."""

import csv
import io
import json
from collections.abc import Callable

import pytest

from energyd.daemon.records import Run
from energyd.rating import editions
from energyd.rating.candidates import entries_of
from energyd.rating.cohort import Entry, key_of_run, rate_against, rate_among
from energyd.rating.imports import read_csv
from energyd.rating.render import Rating, Scope, as_csv, as_json, renamed
from energyd.rating.table import as_table, editions_table

RunFactory = Callable[..., Run]
HEADER = "edition,task,model_class,model,gpu_energy_wh_per_1000"
OUTLIER = f"{HEADER}\n" + "".join(f"e,asr,,m{i},{i}\n" for i in range(1, 6)) + "e,asr,,huge,1000\n"


def _file(text: str) -> Rating:
    header, entries = read_csv(text.encode(), "f.csv")
    return Rating(Scope.FILE, rate_among(entries), header)


def _runs(*runs: Run, **options: bool) -> Rating:
    shipped = editions.shipped()
    entries = entries_of(runs, **options)  # type: ignore[arg-type]
    return Rating(Scope.EDITION, rate_against(entries, lambda entry: editions.find(entry, shipped)))


def _table(rating: Rating, **options: bool) -> str:
    return as_table(rating, width=200, **options)


def _line(text: str, part: str) -> str:
    return next(line for line in text.splitlines() if part in line)


def test_csv_passes_every_column_through_in_order() -> None:
    """Cells come out as they went in, then stars and rank; the file's own stars are kept beside ours."""
    text = f'note,{HEADER},stars\n"a, b",e,image-captioning,,m1,1.50,4\n,e,image_captioning,,m2,3,\n'
    assert as_csv(_file(text)).splitlines() == [
        "note,edition,task,model_class,model,gpu_energy_wh_per_1000,stars_in,stars,rank",
        '"a, b",e,image-captioning,,m1,1.50,4,5,1',
        ",e,image_captioning,,m2,3,,1,2",
    ]


def test_csv_gives_a_reason_only_where_a_star_is_missing() -> None:
    """A cohort of one has an empty star and the reason in the last column."""
    (row,) = csv.DictReader(io.StringIO(as_csv(_file(f"{HEADER}\ne,asr,,m,1\n"))))
    assert (row["stars"], row["rank"]) == ("", "1")
    assert row["reason"].startswith("the only model of its cohort")


def test_csv_can_be_rated_again() -> None:
    """Our own output is accepted as input; its columns of the same names are kept under new ones."""
    once = as_csv(_file(f"{HEADER},stars\ne,asr,,a,1,3\ne,asr,,b,2,3\n"))
    twice = as_csv(_file(once))
    assert twice.splitlines()[0] == f"{HEADER},stars_in,stars_in_in,rank_in,stars,rank"
    assert twice.splitlines()[1] == "e,asr,,a,1,3,5,1,5,1"


@pytest.mark.parametrize(
    ("columns", "names"),
    [
        (["a", "stars"], ["a", "stars_in"]),
        (["stars", "stars_in"], ["stars_in_in", "stars_in"]),
        (["rank"], ["rank_in"]),
    ],
)
def test_renamed_columns_stay_unique(columns: list[str], names: list[str]) -> None:
    """No column is lost to a name that is taken."""
    assert renamed(columns, ["stars", "rank"]) == names


def test_csv_of_runs_can_be_read_again(run_of: RunFactory) -> None:
    """Runs come out with full precision, their set-up and the columns that a later rating needs."""
    text = as_csv(_runs(run_of("a", 10 / 3), run_of("b", 81.0)))
    _, entries = read_csv(text.encode(), "f.csv")
    assert [(e.model, e.edition, e.model_class, e.energy_wh_per_1000) for e in entries] == [
        ("a", "2025-12", "A", 10 / 3),
        ("b", "2025-12", "A", 81.0),
    ]
    assert entries[0].setup.source == "nvml-counter"


def test_json_holds_cohorts_rows_and_why(run_of: RunFactory) -> None:
    """One object: the bands that were used, each row with its star, and what keeps it from being official."""
    told = json.loads(as_json(_runs(run_of("a", 4.0, hardware="NVIDIA H200"), run_of("b", None))))
    assert (told["format"], told["method"], told["unit"]) == ("energyd-rating", "range", "Wh per 1,000 queries")
    assert (told["cohorts"][0]["edges_wh_per_1000"][0], told["cohorts"][0]["published_n"]) == (4.2, 12)
    first, second = told["rows"]
    assert (first["stars"], first["clamped"], first["official"]) == (5, "below", False)
    assert first["not_official_because"] == ["hardware NVIDIA H200, not H100-80GB"]
    assert (second["stars"], second["reason"], second["gpu_energy_wh_per_1000"]) == (
        None,
        "the run has no gpu_run energy",
        None,
    )


def test_json_of_a_file_keeps_its_columns() -> None:
    """Rows of a file hold their own columns, the energy as a number, and do not claim to be official."""
    row = json.loads(as_json(_file(f"{HEADER},stars,official\ne,asr,,a,5.54E-02,3,x\ne,asr,,b,2,3,x\n")))["rows"][0]
    assert (row["gpu_energy_wh_per_1000"], row["stars_in"], row["stars"]) == (0.0554, "3", 5)
    assert (row["official_in"], row["official"]) == ("x", None)


def test_the_table_names_edition_method_and_set_up(run_of: RunFactory) -> None:
    """Edition, method, basis, hardware, engine, n, digits and ± stand above the stars."""
    text = _table(_runs(run_of("org/model-a", 17.376)))
    for part in ("edition 2025-12", "class A", "method range", "4 significant digits", "± one standard deviation"):
        assert part in text
    for part in ("basis gpu_run", "hardware NVIDIA H100 80GB HBM3", "engine transformers 5.17", "n 1000"):
        assert part in text
    assert _line(text, "org/model-a").split() == [
        "1",
        "org/model-a",
        "★★★★★",
        "17.38",
        "0.17",
        "4.14",
        "10.43",
        "0.381",
    ]


def test_an_official_run_is_the_only_one_without_a_mark(run_of: RunFactory) -> None:
    """Every other one says so in the line of its star, and why below."""
    text = _table(_runs(run_of("official", 20.0), run_of("other", 21.0, hardware="NVIDIA H200")))
    assert "not official" not in _line(text, "official  ")
    assert "★★★★☆ not official" in _line(text, "other")
    assert "not official (other): hardware NVIDIA H200, not H100-80GB" in text


def test_an_estimate_is_marked_in_its_line(run_of: RunFactory) -> None:
    """A rated estimate never looks like a measurement."""
    text = _table(_runs(run_of("m", 20.0, source="estimate"), include_estimates=True))
    assert "★★★★☆ estimate, not official" in _line(text, "★")


def test_reasons_that_all_share_are_said_once(run_of: RunFactory) -> None:
    """What every figure has in common stands once; what sets one apart names it, with its rank if need be."""
    text = _table(_runs(*(run_of("m", 20.0 + b, hardware="NVIDIA H200", batch_size=b) for b in (1, 32))))
    assert "not official (every figure here): hardware NVIDIA H200, not H100-80GB" in text
    assert "not official (m [rank 2]): batch size 32, not 1" in text


def test_a_guessed_class_is_told(run_of: RunFactory) -> None:
    """The cohort follows from the class, so a guess is no silent matter."""
    text = _table(_runs(run_of("m-8b", 20.0, provenance={"model_class_source": "name"})))
    assert "class guessed from the name (m-8b): state it with --model-class MODEL=CLASS" in text


def test_a_refused_run_is_listed_with_the_reason(run_of: RunFactory) -> None:
    """What has no star is not left out."""
    text = _table(_runs(run_of("m", 20.0, source="estimate")))
    assert "★" not in text
    assert "m, text_generation" in text
    assert "rated only with --include-estimates" in text


def test_a_clamped_star_is_told(run_of: RunFactory) -> None:
    """A figure beyond the edition's range says so."""
    text = _table(_runs(run_of("m", 99.0)))
    assert "clamped (m): 99.00 lies above the edition's worst, 81.82" in text


def test_figures_of_different_set_ups_are_not_mixed_silently(run_of: RunFactory) -> None:
    """A warning names what differs, and it gets columns."""
    text = _table(_runs(run_of("a", 20.0), run_of("b", 21.0, batch_size=32, engine="vllm 0.24")))
    assert "differ in engine (transformers 5.17 in process, vllm 0.24); batch size (1, 32): compare with care" in text
    assert "vllm 0.24" in _line(text, "  b ")


def test_an_outlier_is_pointed_out() -> None:
    """One model that makes all others 5 stars is named with its figure."""
    assert "outlier: huge (1000) alone sets the width of the bands and gives 5 of the other 5 models 5 stars" in _table(
        _file(OUTLIER)
    )


def test_an_outlier_of_the_published_cohort_is_pointed_out(run_of: RunFactory) -> None:
    """The same holds for the frozen bands that a run is rated against."""
    text = _table(_runs(run_of("m", 1.0, task="question_answering")))
    assert "outlier: the worst model in the published cohort (178.1) alone" in text


def test_a_star_near_an_edge_is_unsure(run_of: RunFactory) -> None:
    """Within its standard deviation this figure has 4 or 5 stars."""
    text = _table(_runs(run_of("m", 19.8, rel_u=0.02)))
    assert "unsure (m): within ± one standard deviation it is 4 to 5 stars" in text


def test_a_figure_of_mostly_idle_watts_says_so(run_of: RunFactory) -> None:
    """Small models at batch 1 measure the host's latency: the table points at the active figure."""
    text = _table(_runs(run_of("m", 20.0, active_wh_per_1000=0.6)))
    assert "mostly idle watts x latency (m)" in text


def test_runs_among_themselves_are_titled_so(run_of: RunFactory) -> None:
    """A comparison of runs is no rating against a published edition, and no line of it is official."""
    rating = Rating(Scope.RUNS, rate_among(entries_of([run_of("a", 1.0), run_of("b", 2.0)]), key_of_run))
    text = _table(rating)
    assert "not a rating against a published edition" in text.splitlines()[0]
    assert "★★★★★ not official" in _line(text, "  a ")


def test_the_table_without_unicode() -> None:
    """On a terminal that knows only ASCII everything is still there."""
    text = _table(_file(OUTLIER), ascii_only=True)
    assert text.isascii()
    assert "*****" in text
    assert editions_table(editions.shipped(), width=160, ascii_only=True).isascii()


def test_the_table_fits_its_width() -> None:
    """Long names wrap instead of pushing the stars away."""
    name = "organisation/" + "x" * 90
    text = as_table(_file(f"{HEADER}\ne,asr,,{name},1\ne,asr,,b,2\n"), width=80)
    assert all(len(line) <= 80 for line in text.splitlines() if "★" in line)
    assert text.count("x") >= 90


def test_names_cannot_steer_the_terminal_or_the_markup() -> None:
    """Escape sequences and rich's own markup in names are plain characters."""
    rating = Rating(
        Scope.FILE, rate_among([Entry("[red]a\x1b[2J", "asr", None, "e", 1.0), Entry("b", "asr", None, "e", 2.0)])
    )
    text = _table(rating)
    assert "[red]a" in text
    assert "\x1b" not in text
