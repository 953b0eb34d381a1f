"""What the daemon is told: one validated value object, filled from the command line, environment or a TOML file."""

import ipaddress
import re
import tomllib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import UsageError

_PORT = re.compile("[0-9]{1,5}")
"""`str.isdigit` takes `²` for a digit, which `int` then refuses."""


class Address(BaseModel):
    """Where to listen."""

    model_config = ConfigDict(frozen=True)

    host: str
    port: int = Field(ge=0, le=65535)

    @classmethod
    def parse(cls, text: str, what: str) -> Self:
        """`HOST:PORT` (IPv6 in brackets); raises UsageError that names `what` is wrong."""
        host, colon, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not colon or not host or not _PORT.fullmatch(port) or int(port) > 65535:
            raise UsageError(f"{what} must be HOST:PORT, such as 127.0.0.1:9709, not {text!r}")
        return cls(host=host, port=int(port))

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Settings(BaseModel):
    """Settings of the daemon. Times in s, powers in W, as people write them; everything inside is ns and mW."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    db: Path
    admin: Address = Address(host="127.0.0.1", port=9709)
    sensor: Literal["nvml", "estimate", "replay", "none"] = "nvml"
    trace: Path | None = None
    estimate_watts: float | None = Field(default=None, gt=0, le=100_000)
    gpus: tuple[str, ...] = ()
    idle_watts: float | None = Field(default=None, ge=0, le=2_000)
    policy: Literal["time", "tokens"] = "time"
    horizon_s: float = Field(default=600, gt=0)
    recovery_wait_s: float = Field(default=120, ge=0)
    keep_shape_days: float = Field(default=1, gt=0)
    keep_windows_days: float = Field(default=7, gt=0)
    keep_queries_days: float = Field(default=400, gt=0)
    keep_runs_days: float = Field(default=90, gt=0)

    @classmethod
    def checked(cls, **values: Any) -> Self:
        """Settings from plain values; raises UsageError with the first thing that is wrong."""
        try:
            return cls(**values)
        except ValidationError as e:
            first = e.errors()[0]
            name = _option(str(first["loc"][0]))
            raise UsageError(f"--{name}: {first['msg']} (given: {first['input']!r})") from e


def _option(field: str) -> str:
    """The command-line option that fills a field, without its dashes."""
    return {"gpus": "gpu"}.get(field, field.removesuffix("_s").replace("_", "-"))


def read_config(path: Path) -> dict[str, Any]:
    """The TOML file as defaults for the options of a verb, `_` and `-` alike; raises UsageError if it is broken."""
    try:
        with path.open("rb") as file:
            found = tomllib.load(file)
    except OSError as e:
        raise UsageError(f"cannot read {path}: {e.strerror}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UsageError(f"{path} is not TOML: {e}") from e
    return {key.replace("-", "_"): value for key, value in found.items()}
