"""sqlite-utils, without pandas.

sqlite-utils imports pandas where it is installed, to know its column types; the ledger has none of them, and on a GPU host
(where pandas often is) the import took 68 MiB of the daemon's memory. It is hidden for the time of the import only.
"""

import sys

_HIDDEN = "pandas"

_seen = sys.modules.get(_HIDDEN)
if _seen is None:
    sys.modules[_HIDDEN] = None  # type: ignore[assignment]  # the import system's own way to say "not there"
try:
    from sqlite_utils import Database
    from sqlite_utils.migrations import Migrations
finally:
    if _seen is None:
        del sys.modules[_HIDDEN]

__all__ = ["Database", "Migrations"]
