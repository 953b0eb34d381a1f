"""The verb `window`: the energy of stretches of a recorded trace, with their uncertainty."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import click

from .errors import DataError, UsageError
from .units import joules

if TYPE_CHECKING:
    from .trace import Trace
    from .window import WindowEnergy

_LONGEST_LINE = 200
"""Bytes read as one line: two times need 40, and a binary file on standard input may have lines without end."""


@click.command(
    epilog="Example: echo 1795475470914555009 1795475471019904301 | energyd window --trace h200.json.gz --json"
)
@click.option("--trace", type=click.Path(path_type=Path), required=True, help="The recorded trace.")
@click.option("--gpu", default=None, help="Index or UUID of the GPU, if the trace holds several.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a window instead of a line of text.")
def window(trace: Path, gpu: str | None, *, as_json: bool) -> None:
    """Energy of windows of a recorded trace.

    Standard input has one window a line: `start_ns end_ns`, unix ns. One line is printed for each, in the same order.
    """
    from .trace import read_trace  # noqa: PLC0415 - `energyd --help` stays fast
    from .window import recording, window_energy  # noqa: PLC0415 - the same

    found = read_trace(trace)
    place = _gpu(found, gpu)
    readings = recording(found.anchors[place], found.samples[place])
    for number, start_ns, end_ns in _windows(sys.stdin.buffer):
        try:
            energy = window_energy(readings, start_ns, end_ns)
        except UsageError as e:
            raise DataError(f"standard input, line {number}: {e}") from e
        click.echo(json.dumps(_fields(energy)) if as_json else _text(energy))


def _gpu(trace: "Trace", wanted: str | None) -> int:
    """The place in the trace of the GPU that is meant."""
    names = [(str(g.index), g.uuid) for g in trace.gpus]
    if wanted is None:
        if len(names) > 1:
            raise UsageError(
                f"the trace holds {len(names)} GPUs; choose one with --gpu ({', '.join(n[0] for n in names)})"
            )
        return 0
    for place, name in enumerate(names):
        if wanted in name:
            return place
    raise UsageError(f"the trace holds no GPU {wanted!r}; it holds {', '.join(n[0] for n in names)}")


def _windows(lines: BinaryIO) -> Iterator[tuple[int, int, int]]:
    """Line number, start and end of each window; blank lines are skipped."""
    for number, raw in enumerate(iter(lambda: lines.readline(_LONGEST_LINE), b""), start=1):
        line = raw.decode("ascii", errors="replace")
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or not all(_is_time(w) for w in words):
            raise DataError(
                f"standard input, line {number}: {line.strip()[:60]!r} is not `start_ns end_ns`, two whole numbers of"
                " unix nanoseconds"
            )
        yield number, int(words[0]), int(words[1])


def _is_time(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) <= 19


def _fields(energy: "WindowEnergy") -> dict[str, object]:
    return {
        "energy_uj": energy.energy_uj, "net_uj": energy.net_uj, "rel_u": round(energy.rel_u, 6), "abs_uj": energy.abs_uj,
        "method": energy.method, "floor_mw": energy.floor_mw,
    }  # fmt: skip


def _text(energy: "WindowEnergy") -> str:
    return (
        f"{joules(energy.energy_uj):.3f} J ± {energy.rel_u:.2%} (± {joules(energy.abs_uj):.3f} J with the sensor's gain),"
        f" {joules(energy.net_uj):.3f} J of it above idle; {energy.method}"
    )
