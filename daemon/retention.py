"""What is kept how long: shapes a day, windows and charges a week, queries a year; closed hours for ever.

Before the detail of an hour is dropped, a closing entry stores its totals by tenant and model, its row count and a hash
that is chained to the entry before (DESIGN §10.8). Runs pin the windows of their span until they are released.
"""

from dataclasses import dataclass
from typing import Self

from .ledger import Ledger
from .ledger_closing import close_hours, drop_queries, drop_shapes
from .units import NS_PER_S, ns_from_s

_DAY_S = 86_400
NS_PER_HOUR = 3_600 * NS_PER_S


@dataclass(frozen=True, slots=True)
class Retention:
    """Ages after which detail goes, ns."""

    shape_ns: int
    windows_ns: int
    queries_ns: int

    @classmethod
    def from_days(cls, shape: float, windows: float, queries: float) -> Self:
        """Ages given in days."""
        return cls(ns_from_s(shape * _DAY_S), ns_from_s(windows * _DAY_S), ns_from_s(queries * _DAY_S))

    def apply(self, ledger: Ledger, now_ns: int) -> int:
        """Drop what is old enough, one hour a transaction; returns how many hours were closed."""
        drop_shapes(ledger, now_ns - self.shape_ns)
        closed = close_hours(ledger, now_ns - self.windows_ns)
        drop_queries(ledger, now_ns - self.queries_ns)
        return closed
