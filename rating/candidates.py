"""Runs of the ledger → figures that ask for a star. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from energyd.daemon.errors import UsageError
from energyd.daemon.records import Basis, Run

from .cohort import CLASSED_TASKS, CLASSES, Entry, Setup, canonical_task
from .official import HARDWARE, REFUSED, deviations, is_estimated

RATEABLE = (Basis.GPU_RUN, Basis.SERVING, Basis.ACTIVE)
COMPLETE = "complete"
_DIGEST_SHOWN = 12
FAILED_SHARE_MAX = 0.01
"""Above it a run has no figure: the energy of failed queries is in it, their number is not in the denominator."""


def entries_of(
    runs: Sequence[Run],
    *,
    basis: Basis = Basis.GPU_RUN,
    every: bool = False,
    include_estimates: bool = False,
    classes: Mapping[str, str] | None = None,
) -> list[Entry]:
    """One entry a run (oldest first in, same order out), with the figure of `basis`.

    Unless `every`, only the latest complete run of each model, task and set-up; a run that did not complete is kept
    only if its model, task and batch size have no complete one. `classes` (model → A, B, C) overrides what the run
    says. What cannot be rated is kept, with the reason.
    """
    chosen = list(runs) if every else _latest(runs)
    return [_entry(run, basis, include_estimates, classes or {}) for run in chosen]


def class_overrides(told: Sequence[str], models: Sequence[str]) -> dict[str, str]:
    """`MODEL=CLASS` pairs as a mapping; raises UsageError for a malformed one or a model that is not in `models`."""
    classes = {}
    for pair in told:
        model, equals, model_class = pair.rpartition("=")
        model_class = model_class.strip().upper()
        if not equals or not model or model_class not in CLASSES:
            raise UsageError(f"--model-class {pair!r}: expected MODEL=CLASS with class A, B or C")
        if model not in models:
            known = ", ".join(sorted(set(models))) or "none"
            raise UsageError(f"--model-class {pair!r}: no model {model!r} here; models: {known}")
        classes[model] = model_class
    return classes


def _latest(runs: Sequence[Run]) -> list[Run]:
    done = {_coarse(run) for run in runs if run.status == COMPLETE}
    latest: dict[tuple[object, ...], Run] = {}
    for run in runs:
        if run.status == COMPLETE:
            latest[_fine(run)] = run
        elif _coarse(run) not in done:
            latest[_coarse(run)] = run
    kept = {run.run_id for run in latest.values()}
    return [run for run in runs if run.run_id in kept]


def _coarse(run: Run) -> tuple[object, ...]:
    return canonical_task(run.task), run.model, run.batch_size


def _fine(run: Run) -> tuple[object, ...]:
    """Runs that are alike in all this repeat each other; runs that differ are different figures."""
    told = [run.summary.get(k) for k in ("hardware", "engine", "source")]
    told += [run.provenance.get(k) for k in ("precision", "protocol", "dataset", "dataset_sha256")]
    return (*_coarse(run), *map(str, told))


def _entry(run: Run, basis: Basis, include_estimates: bool, classes: Mapping[str, str]) -> Entry:
    task = canonical_task(run.task)
    energy = _number(run.summary.get(f"{basis}_wh_per_1000"))
    setup = _setup(run, basis)
    return Entry(
        model=run.model,
        task=task,
        model_class=classes.get(run.model) or _class(run.provenance.get("model_class")),
        edition=None,
        energy_wh_per_1000=energy,
        setup=replace(setup, class_guessed=setup.class_guessed and run.model not in classes),
        refusal=_refusal(run, setup, energy, include_estimates),
    )


def _setup(run: Run, basis: Basis) -> Setup:
    summary, provenance = run.summary, run.provenance
    setup = Setup(
        basis=basis.value,
        source=_text(summary.get("source")),
        hardware=_text(summary.get("hardware")),
        engine=_text(summary.get("engine")),
        precision=_text(provenance.get("precision")),
        protocol=_text(provenance.get("protocol")),
        dataset=_dataset(provenance),
        batch_size=str(run.batch_size),
        n=_count(summary.get("n")),
        failed=_count(summary.get("failed")),
        # What a run knows of its uncertainty is that of the whole-GPU figure; the split among queries has its own.
        rel_u=_number(summary.get("rel_u")) if basis is Basis.GPU_RUN else None,
        active_wh_per_1000=_number(summary.get("active_wh_per_1000")),
        p50_s=_number(summary.get("p50_s")),
        idle_w=_number(summary.get("idle_w")),
        run_id=run.run_id,
        class_guessed=canonical_task(run.task) in CLASSED_TASKS and provenance.get("model_class_source") == "name",
    )
    return replace(setup, not_official=deviations(setup, _told(run)) or _unsaid(run, setup))


def _told(run: Run) -> list[str]:
    told = run.summary.get("not_official_because")
    return [str(reason) for reason in told] if isinstance(told, list | tuple) else []


def _unsaid(run: Run, setup: Setup) -> tuple[str, ...]:
    """A run is official only if it says so itself: silence is no proof."""
    if setup.hardware is None:
        return (f"the run does not say that it ran on {HARDWARE}",)
    if run.summary.get("not_official_because") is None:
        return ("the run does not say whether it kept to the protocol",)
    return ()


def _refusal(run: Run, setup: Setup, energy: float | None, include_estimates: bool) -> str | None:
    if run.status != COMPLETE:
        return f"the run is {run.status}, not complete"
    if setup.failed and setup.n is not None:
        sent = setup.n + setup.failed  # `n` counts the good ones
        if setup.failed > FAILED_SHARE_MAX * sent:
            return f"{setup.failed} of {sent} queries failed, {100 * setup.failed / sent:.1f} % (at most 1 % may)"
    if setup.n == 0:
        return "the run has no measured query"
    if energy is None:
        return f"the run has no {setup.basis} energy"
    if is_estimated(setup.source) and not include_estimates:
        return REFUSED.format(source=setup.source)
    return None


def class_hint(entry: Entry) -> str | None:
    """What to do about a run without a class; None where no class is missing."""
    if entry.task not in CLASSED_TASKS or entry.model_class is not None:
        return None
    return f"give `--model-class {entry.model}=A` here or `--model-class A` to `energyd bench`"


def _dataset(provenance: Mapping[str, object]) -> str | None:
    """Name and the beginning of the hash: files of one name with other contents are other datasets."""
    name, digest = _text(provenance.get("dataset")), _text(provenance.get("dataset_sha256"))
    return f"{name or 'unnamed'}@{digest[:_DIGEST_SHOWN]}" if digest else name


def _class(value: object) -> str | None:
    told = value.strip().upper() if isinstance(value, str) else None
    return told if told in CLASSES else None


def _text(value: object) -> str | None:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or None
    return str(value) if value not in (None, "") else None


def _number(value: object) -> float | None:
    """A finite number of at least 0; anything else is unknown (a negative energy is no figure either)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and value >= 0 else None


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
