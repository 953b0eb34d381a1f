"""What is installed: verbs that are there, light, and free of the heavy libraries."""

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
from click.testing import CliRunner

from energyd.daemon.cli import main

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "transformers", "tokenizers", "vllm", "datasets", "zeus", "codecarbon", "PIL", "soundfile"}
VERBS = sorted(main.list_commands(main.make_context("energyd", ["status"], resilient_parsing=True)))


def loaded_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after `code`."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_no_base_verb_imports_a_heavy_library() -> None:
    """Loading every verb loads neither torch nor transformers nor anything else of the extras."""
    code = (
        "from energyd.daemon.cli import main\n"
        "ctx = main.make_context('energyd', ['status'], resilient_parsing=True)\n"
        "assert all(main.get_command(ctx, verb) for verb in main.list_commands(ctx))"
    )
    assert loaded_after(code) & HEAVY == set()


def test_help_loads_no_driver() -> None:
    """`energyd --help` works on any host: it loads no heavy library and not the NVML binding."""
    code = (
        "from click.testing import CliRunner\n"
        "from energyd.daemon.cli import main\n"
        "assert CliRunner().invoke(main, ['--help']).exit_code == 0"
    )
    assert loaded_after(code) & (HEAVY | {"pynvml"}) == set()


def test_help_lists_every_verb() -> None:
    """`energyd --help` names each verb and says what it does."""
    shown = CliRunner().invoke(main, ["--help"])
    assert shown.exit_code == 0
    listed = {line.split()[0]: line.split()[1:] for line in shown.output.splitlines() if line.startswith("  ")}
    assert [verb for verb in VERBS if not listed.get(verb)] == []


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help(verb: str) -> None:
    """Each verb says in its help what it does, and each of its options what it means."""
    context = main.make_context("energyd", ["status"], resilient_parsing=True)
    command = main.get_command(context, verb)
    assert command is not None
    assert command.help
    silent = [p.name for p in command.params if not (getattr(p, "help", None) or p.param_type_name == "argument")]
    assert silent == []
    assert CliRunner().invoke(main, [verb, "--help"]).exit_code == 0


@pytest.mark.parametrize("verb", VERBS)
def test_readme_explains_each_verb(verb: str) -> None:
    """README names each verb as a command."""
    assert f"energyd {verb}" in (ROOT / "README.md").read_text("utf-8")


def test_the_installed_version_is_the_one_written_down() -> None:
    """The metadata that `--version` prints is that of pyproject.toml, and CHANGELOG has an entry for it."""
    written = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert version("energyd") == written
    assert f"## {written}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_verbs_plug_in_from_the_table_of_entry_points() -> None:
    """Every entry point of `energyd.commands` is a verb: a stale installation would hide a new one."""
    written = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"]["energyd.commands"]
    assert {e.name for e in entry_points(group="energyd.commands")} == set(written)
    assert set(written) <= set(VERBS)


def test_wheel_and_development_tree_hold_the_same_folders() -> None:
    """The links under `.import` and the folders of the wheel are the same four: else one of the two lacks a part."""
    hatch = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]["targets"]["wheel"]
    links = {path.name for path in (ROOT / ".import" / "energyd").iterdir() if path.is_symlink()}
    assert links == set(hatch["only-include"]) == set(hatch["sources"])


def test_the_example_settings_are_options_of_start() -> None:
    """Every key of the shipped example is an option of `energyd start`, so that copying it works."""
    settings = tomllib.loads((ROOT / "deploy" / "energyd.toml.example").read_text("utf-8"))
    command = main.get_command(main.make_context("energyd", ["status"], resilient_parsing=True), "start")
    assert command is not None
    options = {option for p in command.params for option in p.opts}
    assert {f"--{key.replace('_', '-')}" for key in settings} <= options


def test_the_ledger_does_not_load_pandas(tmp_path: Path) -> None:
    """sqlite-utils would import pandas where it is installed (68 MiB); a stand-in that is found first is not imported."""
    (tmp_path / "pandas.py").write_text("raise AssertionError('pandas was imported')\n")
    script = "import energyd.daemon.ledger, sys; assert 'pandas' not in sys.modules; print('ok')"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("ok", "")
