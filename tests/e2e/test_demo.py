"""`energyd demo`: what it needs, what it says when that is missing, and the whole of it with few queries."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner

from energyd.bench import tinymodels
from energyd.bench.demo import find_python
from energyd.daemon.cli import main
from energyd.daemon.errors import UnavailableError, UsageError


def test_without_a_server_it_names_make_demo(tmp_path: Path) -> None:
    """Where no Python can serve models, one line says how to get one."""
    with pytest.raises(UnavailableError, match="make demo"):
        find_python(None, here=tmp_path)


def test_a_python_that_cannot_serve_is_refused(tmp_path: Path) -> None:
    """`--serve-python` must have what serving needs; it is not replaced silently by another."""
    for python in (Path(sys.executable), tmp_path / "missing"):
        with pytest.raises(UsageError, match="--serve-python"):
            find_python(python, here=tmp_path)


def test_an_earlier_demonstration_is_not_overwritten(tmp_path: Path) -> None:
    """`--keep` with a folder that holds a ledger already is refused: its runs would be rated with the new ones."""
    (tmp_path / "energyd.db").touch()
    done = CliRunner().invoke(main, ["demo", "--keep", str(tmp_path)])
    assert done.exit_code == 2
    assert "earlier demonstration" in done.output


def test_sizes_differ_clearly_in_the_work_of_a_token() -> None:
    """Each size has more than twice the weights of the one before, so that their energies cannot be confused."""

    def weights(shape: tinymodels.Shape) -> int:
        attention = shape.hidden * shape.hidden * 2 + 2 * shape.hidden * shape.hidden * shape.kv_heads // shape.heads
        return shape.layers * (attention + 3 * shape.hidden * shape.intermediate)

    sizes = [weights(tinymodels.SHAPES[size]) for size in ("tiny", "small", "medium")]
    assert all(small * 2 < large for small, large in pairwise(sizes))


def test_tinymodels_refuses_an_unknown_size(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """An unknown size is one line on stderr and exit code 2, before anything is made."""
    assert tinymodels.main([str(tmp_path / "m"), "giant"]) == 2
    assert "unknown size 'giant'" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_the_whole_demonstration_ends_with_stars(serve_python: Path, tmp_path: Path) -> None:
    """With a few queries a model: banner, a star table of three models, books that balance, and no process left."""
    command = [sys.executable, "-P", "-c", "from energyd.daemon.cli import main; main(prog_name='energyd')", "demo"]
    options = ["--samples", "4", "--serve-python", str(serve_python), "--keep", str(tmp_path / "demo")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NOT a rating" in done.stdout
    assert "residual 0 µJ" in done.stdout
    for size in ("tiny", "small", "medium"):
        assert f"demo-{size}" in done.stdout
    assert "★" in done.stdout
    cmdlines = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline")]
    assert [c for c in cmdlines if str(tmp_path).encode() in c] == []
