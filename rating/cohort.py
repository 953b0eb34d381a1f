"""Who is compared with whom, and what comes of it. Pure.

A cohort is (edition, task), and for text generation and reasoning also the model class (A, B, C). Figures are Wh per
1,000 queries; less is better.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .bands import Bands, NoBands, Side, equal_width

CLASSED_TASKS = frozenset({"text_generation", "reasoning"})
"""Tasks whose cohorts are split by model class; the published tables give the others none."""
CLASSES = ("A", "B", "C")
AMONG_RUNS = "runs"
"""Stands for the edition where runs are rated among themselves."""
NO_CLASS = "no model class: {task} is rated within class A, B or C"


def canonical_task(name: str) -> str:
    """A task id as the published tables spell it: hyphens, capitals and surrounding blanks are accepted."""
    return name.strip().lower().replace("-", "_")


@dataclass(frozen=True, slots=True)
class Setup:
    """How a figure came about. None: not stated.

    `rel_u`: one standard deviation, relative, without the sensor's gain. `n` counts the queries that the figure is of,
    `failed` those beside them. `not_official`: why the figure cannot be official; empty: nothing known against it.
    `class_guessed`: the model class was read off the model's name by the bench, nobody stated it.
    """

    basis: str | None = None
    source: str | None = None
    hardware: str | None = None
    engine: str | None = None
    precision: str | None = None
    protocol: str | None = None
    dataset: str | None = None
    batch_size: str | None = None
    n: int | None = None
    failed: int | None = None
    rel_u: float | None = None
    active_wh_per_1000: float | None = None
    p50_s: float | None = None
    idle_w: float | None = None
    run_id: str | None = None
    class_guessed: bool = False
    not_official: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Entry:
    """One figure that asks for a star.

    `edition` is None for a run of ours until an edition is chosen. `energy_wh_per_1000` is None when it is unknown.
    `refusal`: why it must not be rated, whatever its cohort. `columns` are the cells of the file it came from.
    """

    model: str
    task: str
    model_class: str | None
    edition: str | None
    energy_wh_per_1000: float | None
    setup: Setup = field(default_factory=Setup)
    refusal: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def unrated(self) -> str | None:
        """Why this entry takes part in no cohort; None if it does."""
        return self.refusal or ("no energy" if self.energy_wh_per_1000 is None else None)


@dataclass(frozen=True, slots=True)
class Key:
    """What the members of a cohort share. `model_class` is None where classes do not count."""

    edition: str
    task: str
    model_class: str | None

    def __str__(self) -> str:
        return f"{self.edition} {self.task}" + (f" class {self.model_class}" if self.model_class else "")


@dataclass(frozen=True, slots=True)
class Grade:
    """What an entry got. `stars` is None with a `reason`; `rank` 1 is the best, equal figures share a rank.

    `stars_within_u`: lowest and highest star within one standard deviation, None if that is unknown. `clamped`: the
    figure lies outside the edition's range on this side.
    """

    entry: Entry
    stars: int | None = None
    rank: int | None = None
    ratio_to_best: float | None = None
    reason: str | None = None
    stars_within_u: tuple[int, int] | None = None
    clamped: Side | None = None


@dataclass(frozen=True, slots=True)
class Frozen:
    """The bands of a published cohort: `n` models, `star_counts` of them with 5, 4, 3, 2 and 1 stars."""

    key: Key
    bands: Bands
    n: int
    star_counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cohort:
    """Grades of one cohort, best first. `frozen` is the published cohort whose bands were used, None: its own."""

    key: Key
    bands: Bands | None
    grades: tuple[Grade, ...]
    frozen: Frozen | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """All cohorts in order of their keys, the grades without a cohort, and all grades in the order of the entries."""

    cohorts: tuple[Cohort, ...]
    without_cohort: tuple[Grade, ...]
    in_order: tuple[Grade, ...]


def key_within(entry: Entry) -> Key | str:
    """The cohort of an entry that names its edition, or why it has none."""
    if not entry.edition:
        return "no edition"
    if entry.task not in CLASSED_TASKS:
        return Key(entry.edition, entry.task, None)
    if entry.model_class is None:
        return NO_CLASS.format(task=entry.task)
    return Key(entry.edition, entry.task, entry.model_class)


def rate_among(entries: Sequence[Entry], key_of: Callable[[Entry], Key | str] = key_within) -> Outcome:
    """Rate entries among themselves: the bands of a cohort are drawn between its own best and worst."""

    def bands_of(members: Sequence[Entry], _: Key) -> tuple[Bands | NoBands, Frozen | None]:
        return equal_width(e.energy_wh_per_1000 for e in members if e.energy_wh_per_1000 is not None), None

    return _rate(entries, key_of, bands_of)


def key_of_run(entry: Entry) -> Key:
    """The cohort of a run among other runs: its task alone, since a handful of runs seldom tells its classes."""
    return Key(AMONG_RUNS, entry.task, None)


def rate_against(entries: Sequence[Entry], find: Callable[[Entry], Frozen | str]) -> Outcome:
    """Rate entries against published bands; `find` gives the published cohort of an entry, or why there is none."""
    found: dict[Key, Frozen] = {}

    def key_of(entry: Entry) -> Key | str:
        frozen = find(entry)
        if isinstance(frozen, str):
            return frozen
        found[frozen.key] = frozen
        return frozen.key

    return _rate(entries, key_of, lambda _, key: (found[key].bands, found[key]))


_BandsOf = Callable[[Sequence[Entry], Key], tuple[Bands | NoBands, Frozen | None]]


def _rate(entries: Sequence[Entry], key_of: Callable[[Entry], Key | str], bands_of: _BandsOf) -> Outcome:
    members: dict[Key, list[int]] = {}
    graded: dict[int, Grade] = {}
    for i, entry in enumerate(entries):
        if entry.unrated is not None:
            graded[i] = Grade(entry, reason=entry.unrated)
        elif isinstance(key := key_of(entry), str):
            graded[i] = Grade(entry, reason=key)
        else:
            members.setdefault(key, []).append(i)
    without = tuple(graded[i] for i in sorted(graded))
    cohorts = []
    for key in sorted(members, key=lambda k: (k.edition, k.task, k.model_class or "")):
        bands, frozen = bands_of([entries[i] for i in members[key]], key)
        ranks = _ranks(_figure(entries[i]) for i in members[key])
        for i in members[key]:
            graded[i] = _grade(entries[i], ranks, bands)
        # Equal figures keep the order of the entries: sorted() is stable.
        best_first = sorted((graded[i] for i in members[key]), key=lambda g: g.rank or 0)
        cohorts.append(Cohort(key, bands if isinstance(bands, Bands) else None, tuple(best_first), frozen))
    return Outcome(tuple(cohorts), without, tuple(graded[i] for i in range(len(entries))))


def _figure(entry: Entry) -> float:
    if entry.energy_wh_per_1000 is None:
        raise ValueError(f"{entry.model} has no energy and belongs to no cohort")
    return entry.energy_wh_per_1000


def _ranks(figures: Iterable[float]) -> dict[float, int]:
    ranks: dict[float, int] = {}
    for i, figure in enumerate(sorted(figures)):
        ranks.setdefault(figure, i + 1)
    return ranks


def _grade(entry: Entry, ranks: Mapping[float, int], bands: Bands | NoBands) -> Grade:
    figure = _figure(entry)
    best = min(ranks) if isinstance(bands, NoBands) else bands.best
    ratio = figure / best if best > 0 else None
    if isinstance(bands, NoBands):
        return Grade(entry, rank=ranks[figure], ratio_to_best=ratio, reason=str(bands))
    rel_u = entry.setup.rel_u
    return Grade(
        entry,
        stars=bands.stars(figure),
        rank=ranks[figure],
        ratio_to_best=ratio,
        stars_within_u=None if rel_u is None else bands.stars_within(figure, rel_u * figure),
        clamped=bands.side(figure),
    )
