"""The only conversion factors in energyd.

Inside, energy is an integer number of microjoules (µJ), power of milliwatts (mW) and time of nanoseconds (ns).
J, Wh and seconds appear only at the rim: metrics, API, tables, files for people.
"""

NS_PER_US = 1_000
NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000
UJ_PER_MJ = 1_000
"""µJ per **milli**\\ joule, the unit of the NVML energy counter."""
UJ_PER_J = 1_000_000
UJ_PER_WH = 3_600_000_000
MW_PER_W = 1_000
_MW_NS_PER_UJ = 1_000_000
"""mW x ns = pJ; 10^6 pJ = 1 µJ."""


def energy_uj(power_mw: int, duration_ns: int) -> int:
    """Energy in µJ of a constant `power_mw` over `duration_ns`, rounded half up; exact integers, no float."""
    return (2 * power_mw * duration_ns + _MW_NS_PER_UJ) // (2 * _MW_NS_PER_UJ)


def mean_power_mw(energy: int, duration_ns: int) -> int:
    """Mean power in mW of `energy` µJ over `duration_ns` > 0, rounded down."""
    return energy * _MW_NS_PER_UJ // duration_ns


def joules(energy: float) -> float:
    """µJ to J."""
    return energy / UJ_PER_J


def watt_hours(energy: float) -> float:
    """µJ to Wh."""
    return energy / UJ_PER_WH


def watts(power_mw: float) -> float:
    """MW (milliwatts) to W."""
    return power_mw / MW_PER_W


def seconds(duration_ns: float) -> float:
    """Ns to s."""
    return duration_ns / NS_PER_S


def ns_from_s(duration_s: float) -> int:
    """S to ns, rounded to the nearest integer."""
    return round(duration_s * NS_PER_S)
