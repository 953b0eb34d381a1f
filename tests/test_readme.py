"""README is held to the code: each metric in its table is exported, and each that is exported is in its table."""

import re
from pathlib import Path

from energyd.daemon.metrics import Health, Totals
from energyd.daemon.records import Gpu, Source

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")


def exported() -> set[str]:
    """The names of all metric families, as Prometheus sees them."""
    gpu = Gpu("GPU-1", 0, "test", "1", Source.EMULATED)
    zero = {"GPU-1": 0}
    health = Health(zero, zero, zero, zero, zero, 0, 0, 0, 0, 0, 0, 0)
    page = Totals([gpu]).page(health).decode()
    families = {line.split()[2] for line in page.splitlines() if line.startswith("# TYPE ")}
    return {name for name in families if not name.endswith("_created")}


def test_the_metric_table_is_what_is_exported() -> None:
    """README's table of metrics names every exported metric, and no other."""
    table = set(re.findall(r"^\| `(energyd_\w+)` \|", README, re.MULTILINE))
    assert exported() == table


def test_the_first_screen_has_plain_words() -> None:
    """What a reader sees first speaks of energy per query, idle and unattributed, not of how it is built."""
    first_screen = README.split("\n## ")[0].lower()
    assert [w for w in ("energy per query", "idle", "unattributed", "accuracy") if w not in first_screen] == []
    assert [w for w in ("ledger", "settlement", "shapley", "epoch", "slice") if w in first_screen] == []
