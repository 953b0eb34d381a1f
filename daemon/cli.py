"""The `energyd` command: a group whose verbs are loaded only when they are named.

The daemon's own verbs are listed in `_OWN`; the siblings' verbs plug in through the entry-point group
`energyd.commands`, so this module imports none of them and `energyd --help` stays fast and free of torch.
"""

import sys
from importlib import import_module
from importlib.metadata import entry_points, version
from typing import Any

import click

from .errors import EnergydError

_OWN = {
    "start": ("energyd.daemon.start", "start"),
    "daemon": ("energyd.daemon.verbs", "daemon"),
    "settle": ("energyd.daemon.verbs", "settle"),
    "audit": ("energyd.daemon.verbs", "audit"),
    "export": ("energyd.daemon.verbs", "export"),
    "status": ("energyd.daemon.verbs", "status"),
    "record": ("energyd.daemon.doctor_verbs", "record"),
    "doctor": ("energyd.daemon.doctor_verbs", "doctor"),
    "window": ("energyd.daemon.window_verb", "window"),
}
_GROUP = "energyd.commands"


class Verbs(click.Group):
    """A click group that finds verbs by name and turns `EnergydError` into one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's interface
        """Names of all verbs, own and plugged in, sorted."""
        return sorted({*_OWN, *(e.name for e in entry_points(group=_GROUP))})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - the same
        """The verb `cmd_name`, imported now; None if there is none."""
        if own := _OWN.get(cmd_name):
            return _command(getattr(import_module(own[0]), own[1]))
        for entry in entry_points(group=_GROUP, name=cmd_name):
            return _command(entry.load())
        return None

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb; an `EnergydError` ends as one line on stderr and its exit code, never as a traceback."""
        try:
            return super().invoke(ctx)
        except EnergydError as e:
            click.echo(f"energyd: {e}", err=True)
            ctx.exit(e.exit_code)
        except BrokenPipeError:
            sys.stderr.close()  # the reader of our output left (`| head`): nothing to report
            ctx.exit(0)


def _command(found: object) -> click.Command:
    if not isinstance(found, click.Command):
        raise TypeError(f"{found!r} is not a click command")
    return found


@click.command(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "ENERGYD", "max_content_width": 110},
    epilog="Every option can also be set by an environment variable: ENERGYD_<VERB>_<OPTION>. "
    "Start with `energyd demo`, or on a GPU host with `energyd start --upstream http://127.0.0.1:8000`.",
)
@click.version_option(version("energyd"), prog_name="energyd")
def main() -> None:
    """The electricity meter for AI inference: measured energy per query, and stars that anyone can verify."""


if __name__ == "__main__":
    main()
