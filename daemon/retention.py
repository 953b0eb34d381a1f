"""What is kept how long: shapes a day, windows and charges a week, queries a year; closed hours for ever.

Before the detail of an hour is dropped, a closing entry stores its totals by tenant and model, its row count and a hash
that is chained to the entry before. A run pins the windows of its span until it is released, or for 90 days:
hours close oldest first, so a pin without end would keep all later detail too.
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
    runs_ns: int

    @classmethod
    def from_days(cls, shape: float, windows: float, queries: float, runs: float = 90) -> Self:
        """Ages given in days; `runs`: how long a run pins the detail of its span."""
        return cls(*(ns_from_s(days * _DAY_S) for days in (shape, windows, queries, runs)))

    def apply(self, ledger: Ledger, now_ns: int) -> int:
        """Drop what is old enough, one hour a transaction; returns how many hours were closed."""
        drop_shapes(ledger, now_ns - self.shape_ns, now_ns - self.runs_ns)
        closed = close_hours(ledger, now_ns - self.windows_ns, now_ns - self.runs_ns)
        drop_queries(ledger, now_ns - self.queries_ns)
        return closed
