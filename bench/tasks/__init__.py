"""The tasks of the AI Energy Score: one declarative file each, named by its canonical id.

A new task is a new file; `implemented` says whether this version can bench it. File values are those of the published
protocol (`aies-v1`: February 2025; `aies-v2`: December 2025), so a reader can compare them line by line.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from energyd.daemon.errors import DataError, UsageError

CLASS_BOUNDS: tuple[tuple[str, float], ...] = (("A", 20e9), ("B", 66e9))
"""Upper bounds in total parameters of the model classes; above the last one it is C."""
LAST_CLASS = "C"


@dataclass(frozen=True, slots=True)
class Dataset:
    """Which samples a task is measured on: its id on the Hub, columns, rows; `sample`: our own stand-in, None if none.

    `sha256`: of JSONL exports known to be the whole standard dataset; empty while none has been verified.
    """

    dataset_id: str
    columns: tuple[str, ...]
    count: int
    sample: str | None
    sha256: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Task:
    """One task of the score. `parameters`: the protocol's generation settings; `apis`: endpoints that can run it."""

    task_id: str
    title: str
    pipeline: str
    implemented: bool
    protocol: str
    precision: str
    has_classes: bool
    default_model: str
    phases: tuple[str, ...]
    apis: tuple[str, ...]
    dataset: Dataset
    parameters: Mapping[str, Any]

    @property
    def max_new_tokens(self) -> int | None:
        """The protocol's number of new tokens; None for a task that makes none."""
        value = self.parameters.get("max_new_tokens")
        return value if isinstance(value, int) else None

    @property
    def fixed_tokens(self) -> bool:
        """Whether each answer must have exactly `max_new_tokens` tokens."""
        return self.max_new_tokens is not None and self.parameters.get("min_new_tokens") == self.max_new_tokens


def all_tasks() -> tuple[Task, ...]:
    """Every task, sorted by id; raises DataError if a task file is damaged."""
    folder = files("energyd.bench.tasks")
    found = (f for f in folder.iterdir() if f.name.endswith(".toml"))
    return tuple(
        parse(f.name.removesuffix(".toml"), f.read_text(encoding="utf-8")) for f in sorted(found, key=lambda f: f.name)
    )


def find(name: str) -> Task:
    """The task called `name` (hyphens count as underscores); raises UsageError that lists the tasks."""
    tasks = {t.task_id: t for t in all_tasks()}
    if task := tasks.get(name.strip().lower().replace("-", "_")):
        return task
    raise UsageError(f"there is no task {name!r}; the tasks are {', '.join(tasks)} (see `energyd tasks`)")


def parse(task_id: str, text: str) -> Task:
    """A task from its TOML; raises DataError that names the file and what is wrong with it."""
    try:
        raw = tomllib.loads(text)
        dataset = raw["dataset"]
        return Task(
            task_id=task_id,
            title=str(raw["title"]),
            pipeline=str(raw["pipeline"]),
            implemented=bool(raw["implemented"]),
            protocol=str(raw["protocol"]),
            precision=str(raw["precision"]),
            has_classes=raw.get("class_rule") == "parameters",
            default_model=str(raw["default_model"]),
            phases=tuple(raw["phases"]),
            apis=tuple(raw["apis"]),
            dataset=Dataset(
                dataset_id=str(dataset["id"]),
                columns=tuple(dataset["columns"]),
                count=int(dataset["count"]),
                sample=dataset.get("sample"),
                sha256=tuple(dataset.get("sha256", ())),
            ),
            parameters=MappingProxyType(raw.get("parameters", {})),
        )
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError) as e:
        raise DataError(f"the task file {task_id}.toml is damaged ({type(e).__name__}: {e}); reinstall energyd") from e


def class_of(parameters: float) -> str:
    """The model class of a total (not active) number of parameters: A up to 20 B, B up to 66 B, else C."""
    return next((name for name, bound in CLASS_BOUNDS if parameters <= bound), LAST_CLASS)
