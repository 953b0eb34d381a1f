"""Runs as the bench stores them, ledgers that hold them, and the command as a user calls it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from energyd.daemon.cli import main
from energyd.daemon.ledger import Ledger
from energyd.daemon.records import Run
from energyd.daemon.wire import RunEnd, RunStart

RunFactory = Callable[..., Run]


@pytest.fixture
def run_of() -> RunFactory:
    """A factory of runs, official-looking unless told otherwise; `provenance` and `summary` are merged in."""
    made = 0

    def make(
        model: str = "org/model-a",
        wh: float | None = 17.38,
        *,
        task: str = "text_generation",
        batch_size: int = 1,
        status: str = "complete",
        provenance: dict[str, object] | None = None,
        **summary: object,
    ) -> Run:
        nonlocal made
        made += 1
        told: dict[str, object] = {
            "n": 1000,
            "failed": 0,
            "gpu_run_wh_per_1000": wh,
            "serving_wh_per_1000": None if wh is None else 0.9 * wh,
            "active_wh_per_1000": None if wh is None else 0.6 * wh,
            "rel_u": 0.01,
            "source": "nvml-counter",
            "hardware": "NVIDIA H100 80GB HBM3",
            "engine": "transformers 5.17 in process",
            "p50_s": 0.381,
            "idle_w": 70.0,
            "not_official_because": [],
        }
        return Run(
            run_id=f"run-{made:02d}",
            task=task,
            model=model,
            batch_size=batch_size,
            url="http://127.0.0.1:8088",
            status=status,
            started_ns=made * 1_000_000_000,
            ended_ns=made * 1_000_000_000 + 1,
            provenance={"model_class": "A", "precision": "float16", "dataset": "standard"} | (provenance or {}),
            summary=told | summary,
        )

    return make


@pytest.fixture
def ledger_of(tmp_path: Path) -> Callable[[Sequence[Run]], Path]:
    """Writes runs to a real ledger and returns its path."""

    def write(runs: Sequence[Run]) -> Path:
        path = tmp_path / "energyd.db"
        with Ledger.open(path) as ledger:
            ledger.register_host("host", "host", 1)
            for run in runs:
                begun = RunStart(run.run_id, run.task, run.model, run.batch_size, run.url, dict(run.provenance))
                ledger.start_run("host", begun, run.started_ns)
                if run.status != "running":
                    ended = RunEnd(run.run_id, run.status, run.started_ns, run.started_ns + 1, dict(run.summary))
                    ledger.end_run(ended)
        return path

    return write


@pytest.fixture
def rate() -> Callable[..., Result]:
    """Calls `energyd rate` with arguments; output and errors are kept apart."""

    def call(*args: object, **more: Any) -> Result:
        return CliRunner().invoke(main, ["rate", *map(str, args)], catch_exceptions=False, **more)

    return call
