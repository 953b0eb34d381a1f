"""Progress of a run for people, on stderr: a live bar on a terminal, plain lines elsewhere."""

import sys
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichBar

_LINE_EVERY_S = 5.0


class Progress(Protocol):
    """What a run tells while it goes on."""

    def phase(self, text: str, total: int | None) -> None:
        """A phase begins; `total` steps, None if their number is unknown."""
        ...

    def advance(self, steps: int) -> None:
        """Steps of the phase are done."""
        ...

    def note(self, text: str) -> None:
        """Something worth knowing."""
        ...

    def warn(self, text: str) -> None:
        """Something that changes what the figures mean."""
        ...


class Lines:
    """Plain lines on stderr, at most one every five seconds within a phase."""

    def __init__(self) -> None:
        self._text = ""
        self._total: int | None = None
        self._done = 0
        self._last = 0.0

    def phase(self, text: str, total: int | None) -> None:
        """A line that names the phase."""
        self._text, self._total, self._done, self._last = text, total, 0, time.monotonic()
        self._print(text)

    def advance(self, steps: int) -> None:
        """A line if the last one is old."""
        self._done += steps
        if time.monotonic() - self._last >= _LINE_EVERY_S:
            self._last = time.monotonic()
            self._print(f"{self._text}: {self._done}" + (f" of {self._total}" if self._total else ""))

    def note(self, text: str) -> None:
        """A line."""
        self._print(text)

    def warn(self, text: str) -> None:
        """A line that says so."""
        self._print(f"warning: {text}")

    def _print(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class Bar:
    """A live bar on a terminal."""

    def __init__(self, bar: RichBar) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=None, start=False)

    def phase(self, text: str, total: int | None) -> None:
        """The bar starts anew."""
        self._bar.reset(self._task, description=text, total=total)

    def advance(self, steps: int) -> None:
        """The bar moves."""
        self._bar.advance(self._task, steps)

    def note(self, text: str) -> None:
        """A line above the bar."""
        self._bar.console.print(text, markup=False, highlight=False)

    def warn(self, text: str) -> None:
        """A coloured line above the bar."""
        self._bar.console.print(f"warning: {text}", style="yellow", markup=False, highlight=False)


def on_stderr() -> AbstractContextManager[Progress]:
    """A bar if stderr is a terminal, plain lines otherwise."""
    if not sys.stderr.isatty():
        return nullcontext(Lines())
    return _Live()


class _Live:
    def __init__(self) -> None:
        self._bar = RichBar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )

    def __enter__(self) -> Progress:
        self._bar.start()
        return Bar(self._bar)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
