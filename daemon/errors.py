"""Everything energyd raises on purpose.

::

    EnergydError              one clear line for the user; the command exits with `exit_code`
    ├── UsageError            the user's input is wrong: a flag, a file, a line of a file        (exit 2)
    │   ├── TraceError        a recorded trace cannot be read or makes no sense                  (exit 2)
    │   └── DataError         a dataset, CSV or JSONL is broken; names file and line             (exit 2)
    ├── UnavailableError      something outside is missing: GPU, driver, upstream, port, daemon  (exit 2)
    │   └── NoGpuError        no GPU can be metered on this host; names the choices              (exit 2)
    ├── LedgerError           the database refuses: newer version, locked, full, damaged         (exit 2)
    │   └── RefusedWindow     a settlement that breaks a law: set it aside, never try it again
    └── SensorError           a reading failed; `action` says what the loop must do
        ├── RetryReading      try again at the next poll; nothing is known to be lost
        ├── LostGpu           the GPU or driver went away: close the epoch, look for it again
        └── EndOfTrace        a recording ended: normal

Handlers map type to exit code or HTTP status in one table each; loops sort `SensorError` into retry, reopen, end.
"""


class EnergydError(Exception):
    """A failure that a user can act on. The message is one line: what was wrong, where, and what to do."""

    exit_code = 2


class UsageError(EnergydError):
    """The user's input is wrong."""


class TraceError(UsageError):
    """A recorded trace cannot be read or contradicts itself."""


class DataError(UsageError):
    """A dataset, CSV or JSONL file is broken; the message names file and line."""


class UnavailableError(EnergydError):
    """Something outside this process is missing or does not answer."""


class NoGpuError(UnavailableError):
    """No GPU can be metered on this host."""


class LedgerError(EnergydError):
    """The database refuses: a newer version, a lock held elsewhere, a full disk, a damaged file."""


class RefusedWindow(LedgerError):  # noqa: N818 - named for what was refused
    """A settlement does not balance, or charges what is not there: a defect of ours that trying again cannot mend."""


class SensorError(EnergydError):
    """A reading failed; the subclass says what the meter loop must do."""


class RetryReading(SensorError):  # noqa: N818 - named for what the loop does with it
    """A transient failure: read again at the next poll; the counter goes on meanwhile."""


class LostGpu(SensorError):  # noqa: N818 - the same
    """The GPU fell off the bus or the driver was reloaded: end the epoch and look for the GPU again by UUID."""


class EndOfTrace(SensorError):  # noqa: N818 - the same
    """A recorded trace has no further reading."""
