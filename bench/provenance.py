"""Where a run's figures come from: everything a reader needs to repeat it, and nothing of the prompts."""

import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from energyd.daemon.wire import Status

from .order import Order
from .payloads import parameters
from .summary import hardware
from .target import Target
from .tasks import class_of

_SIZE = re.compile(r"(?<![A-Za-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)([bBmM])(?![A-Za-z0-9])")
_FACTOR = {"b": 1e9, "m": 1e6}


def class_from_name(model: str) -> str | None:
    """A guess at the model class from a size in the name (`Llama-3.1-8B`, `Mixtral-8x7B`); None without one."""
    found = _SIZE.search(model.rpartition("/")[2])
    if found is None:
        return None
    experts, size, unit = found.groups()
    return class_of(float(size) * int(experts or 1) * _FACTOR[unit.lower()])


def gpu_names(status: Status, chosen: Sequence[str]) -> list[str]:
    """Names of the chosen GPUs (UUID or index; empty: all) as the daemon reports them."""
    return [
        str(g["name"])
        for g in status.gpus
        if "name" in g and (not chosen or g.get("uuid") in chosen or str(g.get("index")) in chosen)
    ]


def detected_hardware(status: Status | None, chosen: Sequence[str]) -> str | None:
    """The hardware for people; None if no daemon told."""
    names = [] if status is None else gpu_names(status, chosen)
    return hardware(names) if names else None


def provenance(
    order: Order, target: Target, where: str | None, samples: int, status: Status | None
) -> dict[str, object]:
    """The provenance of a run as `daemon.records.Run` lists its keys, and more; JSON-able."""
    guessed = class_from_name(order.model) if order.task.has_classes else None
    request: dict[str, Any] = dict(parameters(target.dialect, target.generation))
    return {
        "model_class": order.model_class or guessed,
        "model_class_source": "given" if order.model_class else "name" if guessed else None,
        "precision": order.precision,
        "protocol": order.task.protocol,
        "dataset": order.dataset.name,
        "dataset_sha256": order.dataset.sha256,
        "dataset_is_sample": order.dataset.is_sample,
        "dataset_empty_dropped": order.dataset.empty,
        "samples": samples,
        "warmup": order.warmup,
        "idle_s": order.idle_s,
        "server": target.server.name,
        "server_version": target.server.version,
        "engine": order.engine or target.server.name,
        "hardware": where,
        "api": str(target.dialect.api),
        "exact_tokens": target.dialect.exact,
        "parameters": request,
        "seed": None,  # greedy decoding: none is sent
        "gpus": list(order.gpus),
        "host": status.host_id if status else None,
        "policy": status.policy if status else None,
        "drivers": sorted({str(g["driver"]) for g in status.gpus if "driver" in g}) if status else [],
        "energyd_version": version("energyd"),
        "daemon_version": status.version if status else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
