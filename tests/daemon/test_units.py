"""Conversions: exact integers inside, floats only at the rim."""

from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from energyd.daemon import units

LAW = settings(deadline=None, derandomize=True)
"""No timing decides, and the same code passes or fails every time."""
POWERS = st.integers(0, 10**9)
SPANS = st.integers(1, 10**18)


def test_known_conversions() -> None:
    """Figures worked out by hand: 350 W for 2 s are 700 J; 3,600 J are 1 Wh."""
    assert units.energy_uj(350_000, 2_000_000_000) == 700_000_000
    assert units.mean_power_mw(700_000_000, 2_000_000_000) == 350_000
    assert units.joules(700_000_000) == 700.0
    assert units.watt_hours(3_600_000_000) == 1.0
    assert units.watts(81_500) == 81.5
    assert units.seconds(1_500_000_000) == 1.5
    assert units.ns_from_s(0.02) == 20_000_000


@LAW
@given(power_mw=POWERS, span_ns=SPANS)
def test_energy_is_rounded_half_up_from_the_exact_product(power_mw: int, span_ns: int) -> None:
    """One mW × ns is 10^-12 J: the integer result is within half a µJ of the exact fraction, a half going up."""
    exact_uj = Fraction(power_mw, 1000) * Fraction(span_ns, 10**9) * 10**6
    error = units.energy_uj(power_mw, span_ns) - exact_uj
    assert Fraction(-1, 2) < error <= Fraction(1, 2)


@LAW
@given(energy_uj=st.integers(0, 2**62), span_ns=SPANS)
def test_mean_power_never_claims_more_than_the_energy(energy_uj: int, span_ns: int) -> None:
    """Rounded down: its energy over the span does not exceed the energy, and 1 mW more would."""
    power_mw = units.mean_power_mw(energy_uj, span_ns)
    assert Fraction(power_mw * span_ns, 10**6) <= energy_uj < Fraction((power_mw + 1) * span_ns, 10**6)


@LAW
@given(st.integers(0, 10**15))
def test_watt_hours_come_back(energy_uj: int) -> None:
    """Up to 277 kWh, a figure in Wh still tells the µJ that it came from, within a float's precision."""
    assert abs(units.watt_hours(energy_uj) * 3_600_000_000 - energy_uj) <= 1
