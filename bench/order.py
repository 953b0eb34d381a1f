"""What the user asked for, and what came of it."""

from dataclasses import dataclass
from typing import Any

from .datasets import Loaded
from .payloads import Api, ServerKind
from .tasks import Task


@dataclass(frozen=True, slots=True)
class Order:
    """A bench to carry out. None means: detect it, or take the protocol's value.

    `gpus`: indices or UUIDs whose energy counts, empty: all metered. `headers` may hold a key and are never stored.
    """

    url: str
    model: str
    task: Task
    dataset: Loaded
    samples: int
    batch_size: int
    warmup: int
    idle_s: float
    max_new_tokens: int | None
    stream: bool
    api: Api | None
    server: ServerKind | None
    model_class: str | None
    precision: str | None
    engine: str | None
    hardware: str | None
    gpus: tuple[str, ...]
    request_limit_s: float
    settle_limit_s: float
    headers: dict[str, str]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished run. `status`: `complete`, `failed` (too many requests failed) or `interrupted`.

    `stored`: the ledger holds the whole run; False also when nothing was metered.
    """

    run_id: str
    status: str
    url: str
    provenance: dict[str, object]
    summary: dict[str, Any]
    stored: bool
