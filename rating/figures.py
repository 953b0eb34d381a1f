"""Numbers for people: four significant digits, never fewer because a figure is small. Pure.

Two decimals would turn the published 0.0554 Wh of the smallest model into 0.06, 8 % off and equal to its neighbour.
"""

import math

DIGITS = 4
STAR, NO_STAR = "★", "☆"


def significant(value: float, digits: int = DIGITS) -> str:
    """`value` rounded to `digits` significant digits in plain notation, trailing zeros kept: 0.05540, 17.38, 308200."""
    return fixed(value, decimals(value, digits))


def decimals(value: float, digits: int = DIGITS) -> int:
    """Decimals after the point (negative: before it) for `digits` significant ones; 9.9996 has 2, as 10.00."""
    if value == 0 or not math.isfinite(value):
        return digits - 1
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])
    return digits - 1 - exponent


def fixed(value: float, places: int) -> str:
    """`value` with `places` decimals; a negative number of places rounds before the point."""
    return f"{value:.{places}f}" if places >= 0 else f"{round(value, places):.0f}"


def plus_minus(value: float, rel_u: float | None) -> str:
    """One standard deviation of `value` in its unit, two significant digits; '?' when it is unknown."""
    return "?" if rel_u is None else significant(value * rel_u, 2)


def star_row(stars: int | None, *, ascii_only: bool = False) -> str:
    """Five characters, as ★★★☆☆; a dash where there is no star."""
    if stars is None:
        return "-"
    full, empty = ("*", ".") if ascii_only else (STAR, NO_STAR)
    return full * stars + empty * (5 - stars)


def printable(text: str) -> str:
    """`text` without control characters: names come from files and clients and must not steer a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
