"""Numbers for people."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from energyd.rating.figures import plus_minus, printable, significant, star_row


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0554, "0.05540"),
        (0.055, "0.05500"),
        (1.313333, "1.313"),
        (17.376, "17.38"),
        (9.99996, "10.00"),
        (0.000099999, "0.0001000"),
        (1648.505252, "1649"),
        (12791.22, "12790"),
        (308185.51, "308200"),
        (0.0, "0.000"),
    ],
)
def test_four_significant_digits(value: float, text: str) -> None:
    """Small figures keep four digits as large ones do, in plain notation."""
    assert significant(value) == text


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(st.floats(1e-9, 1e9))
def test_rounding_loses_at_most_half_of_the_fourth_digit(value: float) -> None:
    """What is shown is within 0.05 % of the figure, whatever its size."""
    assert float(significant(value)) == pytest.approx(value, rel=5.0001e-4)


def test_uncertainty_has_two_digits_or_a_question_mark() -> None:
    """One standard deviation in the figure's unit; unknown is not zero."""
    assert plus_minus(17.38, 0.0123) == "0.21"
    assert plus_minus(17.38, None) == "?"


def test_stars_as_characters() -> None:
    """Five characters, also where a terminal knows only ASCII; a dash for none."""
    assert star_row(3) == "★★★☆☆"
    assert star_row(3, ascii_only=True) == "***.."
    assert star_row(None) == "-"


def test_control_characters_do_not_reach_the_terminal() -> None:
    """An escape sequence in a name is defused."""
    assert printable("a\x1b[31mb\n") == "a\ufffd[31mb\ufffd"
