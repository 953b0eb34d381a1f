"""CSV in: what is accepted, and which line and column is named when it is not."""

import pytest

from energyd.daemon.errors import DataError
from energyd.rating.imports import read_csv

HEADER = "edition,task,model_class,model,gpu_energy_wh_per_1000"


def _read(*lines: str, header: str = HEADER) -> list[tuple[str, str, float | None]]:
    _, entries = read_csv("\n".join((header, *lines)).encode(), "f.csv")
    return [(e.model, e.task, e.energy_wh_per_1000) for e in entries]


def test_rows_are_read_in_order() -> None:
    """Plain rows, in either spelling of the task, with exponents."""
    assert _read("e,text-generation,A,m1,1.5", "e,text_generation,a,m2,5.54E-02") == [
        ("m1", "text_generation", 1.5),
        ("m2", "text_generation", 0.0554),
    ]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_byte_order_mark_and_line_ends_of_other_systems(ending: str) -> None:
    """Files saved by a spreadsheet are read as they are."""
    data = b"\xef\xbb\xbf" + ending.join((HEADER, "e,asr,,m,1", "")).encode()
    header, entries = read_csv(data, "f.csv")
    assert (header[0], entries[0].energy_wh_per_1000) == ("edition", 1.0)


def test_all_columns_are_kept_as_they_were_written() -> None:
    """Cells are passed through unchanged, quoted line breaks and trailing zeros included."""
    _, entries = read_csv(f'{HEADER},note\ne,asr,,m,1.50,"two\nlines, comma"\n'.encode(), "f.csv")
    assert entries[0].columns["note"] == "two\nlines, comma"
    assert entries[0].columns["gpu_energy_wh_per_1000"] == "1.50"


def test_an_empty_energy_is_unknown_and_not_zero() -> None:
    """A blank cell leaves the row unrated with a reason."""
    _, entries = read_csv(f"{HEADER}\ne,asr,,m,\n".encode(), "f.csv")
    assert (entries[0].energy_wh_per_1000, entries[0].unrated) == (None, "no energy in the file")


@pytest.mark.parametrize(
    "cell",
    [
        "abc",
        "nan",
        "inf",
        "-inf",
        "Infinity",
        "1_000",
        '"1,5"',
        "1e400",
        "-0.1",
        "\N{ARABIC-INDIC DIGIT ONE}",
        "0x10",
        "1 2",
    ],
)
def test_what_is_no_energy_is_refused_by_line_and_column(cell: str) -> None:
    """No number, not finite, negative, or a notation that only Python knows."""
    with pytest.raises(DataError, match=r"^f\.csv, line 3, column gpu_energy_wh_per_1000: "):
        _read("e,asr,,m,1", f"e,asr,,m,{cell}")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["e,asr,,,1"], "f.csv, line 2, column model: empty"),
        (["e, ,,m,1"], "f.csv, line 2, column task: empty"),
        (["e,asr,D,m,1"], "f.csv, line 2, column model_class: 'D' is not one of A, B, C"),
        (["e,asr,,m"], "f.csv, line 2: 4 cells where the header has 5 columns"),
        (["e,asr,,m,1,2"], "f.csv, line 2: 6 cells where the header has 5 columns"),
        ([], "f.csv: no rows below the header"),
        (['e,asr,,"m,1'], "f.csv, line 2: unexpected end of data"),
        (["e,asr,,m,1", "", 'e,asr,,"a\nb",1', "e,asr,,,1"], "f.csv, line 6, column model: empty"),
    ],
)
def test_a_bad_row_is_named_by_its_line(lines: list[str], message: str) -> None:
    """The line is the one that an editor shows, blank lines and line breaks in quotes counted."""
    with pytest.raises(DataError) as caught:
        _read(*lines)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("edition,task,model,gpu_energy_wh_per_1000", "missing column model_class"),
        ("model", "missing column edition, task, model_class, gpu_energy_wh_per_1000"),
        (HEADER + ",model", "column model is there 2 times"),
        (HEADER + ",", "column 6 has no name"),
    ],
)
def test_a_bad_header_is_named(header: str, message: str) -> None:
    """Columns that are missing, doubled or nameless are told, on line 1."""
    with pytest.raises(DataError, match=r"^f\.csv, line 1: ") as caught:
        _read("e,asr,,m,1", header=header)
    assert message in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_told(data: bytes) -> None:
    """Nothing in the file: the columns that it needs are listed."""
    with pytest.raises(DataError, match="the file is empty; the first line must name the columns edition, task"):
        read_csv(data, "f.csv")


def test_another_encoding_is_told_with_its_line() -> None:
    """Bytes that are no UTF-8 are one clear line."""
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        read_csv(HEADER.encode() + b"\ne,asr,,caf\xe9,1\n", "f.csv")


def test_a_cell_beyond_all_measure_is_told() -> None:
    """A cell larger than the csv module takes is no traceback."""
    with pytest.raises(DataError, match="line 2: field larger"):
        _read(f"e,asr,,{'m' * 200_000},1")


def test_estimates_in_a_file_are_refused_unless_asked() -> None:
    """A row whose source says that nothing was measured is rated only on demand."""
    data = f"{HEADER},source\ne,asr,,m,1,estimate\n".encode()
    refused, asked = read_csv(data, "f.csv")[1][0], read_csv(data, "f.csv", include_estimates=True)[1][0]
    assert "--include-estimates" in (refused.unrated or "")
    assert asked.unrated is None
    assert asked.setup.not_official == ("source estimate, not a measurement",)


def test_a_source_that_cites_a_paper_is_no_source_of_ours() -> None:
    """Published tables use the column for their own purpose."""
    _, entries = read_csv(f"{HEADER},source\ne,asr,,m,1,estimates of Doe et al.\n".encode(), "f.csv")
    assert (entries[0].setup.source, entries[0].unrated) == (None, None)
