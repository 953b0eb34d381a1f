"""The house's arrows and fences, read from the syntax trees: what may import what."""

import ast
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent

FOLDERS: Mapping[str, frozenset[str]] = {
    "daemon": frozenset({"daemon"}),
    "proxy": frozenset({"proxy", "daemon"}),
    "bench": frozenset({"bench", "daemon"}),
    "rating": frozenset({"rating", "bench", "daemon"}),
}
"""Folder: the folders it may import. Arrows point inward: rating -> bench -> daemon <- proxy."""

FENCES: Mapping[str, tuple[str, ...]] = {
    "pynvml": ("daemon/sensors/nvml.py",),
    "sqlite3": ("daemon/ledger*.py", "daemon/migrations.py"),
    "sqlite_utils": ("daemon/ledger*.py", "daemon/migrations.py"),
    "prometheus_client": ("daemon/metrics.py",),
    "torch": ("bench/*.py",),
    "transformers": ("bench/*.py",),
    "tokenizers": ("bench/*.py",),
    "vllm": ("bench/*.py",),
    "datasets": ("bench/*.py",),
}
"""Foreign library: the only files that may import it, so that replacing it means replacing them."""

HEAVY = frozenset({"torch", "transformers", "tokenizers", "vllm", "datasets", "zeus", "codecarbon", "PIL", "soundfile"})
"""Imported inside functions only: every base verb works, and starts fast, without them."""

PURE = (
    "daemon/records.py",
    "daemon/units.py",
    "daemon/errors.py",
    "daemon/meter.py",
    "daemon/apportion.py",
    "daemon/audit.py",
    "daemon/attribution/*.py",
    "bench/batching.py",
    "bench/summary.py",
    "rating/bands.py",
    "rating/cohort.py",
)
RIM = frozenset(
    {"aiohttp", "asyncio", "http", "logging", "msgspec", "os", "random", "shutil", "signal", "socket", "sqlite3"}
    | {"sqlite_utils", "subprocess", "tempfile", "threading", "time", "urllib", "uvloop"}
)
"""What a pure module never imports: clocks, sockets, files, databases, loggers, chance."""

NO_AIOHTTP = (*PURE, "daemon/clock.py")


class Import(NamedTuple):
    """One import: the absolute dotted name, its line, and whether it runs when its module is imported."""

    module: str
    line: int
    on_import: bool


def imports(source: str, package: tuple[str, ...]) -> Iterator[Import]:
    """All imports of a module in `package`, relative ones resolved, and the constant arguments of `import_module`."""
    tree = ast.parse(source)
    lazy = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            prefix = ".".join((*base, node.module) if node.module else base)
            # `from energyd import bench` names the folder only in the alias.
            names = [f"{prefix}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"}:
                names = [str(node.args[0].value)]
        for name in names:
            yield Import(name, node.lineno, id(node) not in lazy)  # type: ignore[attr-defined]


def violations(path: str, source: str) -> list[str]:
    """What the module at `path` (relative to the repository) imports against the rules; one line each."""
    folder = Path(path).parts[0]
    package = ("energyd", *Path(path).parts[:-1])
    found = []
    for name, line, on_import in imports(source, package):
        parts = name.split(".")
        top = parts[0]
        reasons = []
        if top in FOLDERS:
            reasons.append(f"bare `{name}`: write energyd.{name}")
        if top == "energyd" and (len(parts) < 2 or parts[1] not in FOLDERS[folder]):
            reasons.append(f"{folder} may not import {name}")
        if top in FENCES and not any(fnmatch(path, allowed) for allowed in FENCES[top]):
            reasons.append(f"{top} is fenced to {', '.join(FENCES[top])}")
        if top in HEAVY and on_import:
            reasons.append(f"{top} may only be imported inside a function")
        if top in RIM and any(fnmatch(path, pure) for pure in PURE):
            reasons.append(f"a pure module may not import {top}")
        if top == "aiohttp" and any(fnmatch(path, pure) for pure in NO_AIOHTTP):
            reasons.append("no aiohttp here")
        found += [f"{path}:{line}: {reason}" for reason in reasons]
    return found


def modules() -> list[Path]:
    """Every module of the four folders."""
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def test_no_module_imports_against_the_table() -> None:
    """Every import in the four folders is allowed by the table."""
    found = [v for path in modules() for v in violations(path.relative_to(ROOT).as_posix(), path.read_text("utf-8"))]
    assert found == []


def test_the_four_folders_are_looked_at() -> None:
    """The check sees modules in each folder: an empty glob would pass for ever."""
    assert {path.relative_to(ROOT).parts[0] for path in modules()} == set(FOLDERS)


def test_tests_import_no_bare_folder() -> None:
    """No test imports `daemon` or `bench` bare, which works in the repository only and names other distributions."""
    found = [
        f"{path.relative_to(ROOT)}:{found.line}: {found.module}"
        for path in (ROOT / "tests").rglob("*.py")
        for found in imports(path.read_text("utf-8"), ("tests",))
        if found.module.split(".")[0] in FOLDERS
    ]
    assert found == []


def test_forbidden_imports_are_found_in_every_spelling() -> None:
    """The checker itself: each forbidden spelling is reported, each allowed one is not."""
    forbidden = [
        ("daemon/x.py", "import energyd.bench.load"),
        ("daemon/x.py", "from energyd import rating"),
        ("daemon/x.py", "from ..bench import load"),
        ("daemon/x.py", "import_module('energyd.proxy.app')"),
        ("bench/x.py", "from daemon.units import joules"),
        ("proxy/x.py", "def f():\n    from energyd.bench import load"),
        ("proxy/x.py", "import sqlite3"),
        ("daemon/service.py", "import pynvml"),
        ("bench/x.py", "import torch"),
        ("daemon/x.py", "def f():\n    import torch"),
        ("daemon/meter.py", "from time import time"),
        ("daemon/attribution/time.py", "import aiohttp"),
        ("daemon/clock.py", "from aiohttp import web"),
    ]
    allowed = [
        ("daemon/sensors/nvml.py", "import pynvml\nfrom ..records import Gpu"),
        ("daemon/ledger_queries.py", "import sqlite3"),
        ("bench/x.py", "def f():\n    import torch"),
        ("rating/x.py", "from energyd.bench import tasks\nfrom energyd.daemon.units import joules"),
        ("daemon/clock.py", "import time"),
    ]
    assert [case for case in forbidden if not violations(*case)] == []
    assert [case for case in allowed if violations(*case)] == []
