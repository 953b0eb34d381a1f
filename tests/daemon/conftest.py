"""Fixtures of the daemon's tests: an emulated NVML that the real pynvml loads."""

import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pynvml
import pytest


class Control:
    """The control file of the emulated NVML: what it does wrong, from the next call on."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def say(self, *lines: str) -> None:
        """Make `lines` (`fail FUNCTION CODE [GPU]`, `set KEY NUMBER`) the only ones in force."""
        # Put in place at once: a reading in another thread must not see half a file.
        fresh = self._path.with_suffix(".new")
        fresh.write_text("".join(f"{line}\n" for line in lines))
        fresh.replace(self._path)


@pytest.fixture(scope="session")
def nvml_fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the emulated `libnvidia-ml.so.1`, for the LD_LIBRARY_PATH of a subprocess."""
    folder = tmp_path_factory.mktemp("nvml")
    source = Path(__file__).parent / "fakelib" / "nvml_fake.c"
    flags = ["-std=c11", "-D_POSIX_C_SOURCE=200809L", "-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, "-o", str(folder / "libnvidia-ml.so.1"), str(source)], check=True)
    return folder


@pytest.fixture
def nvml(nvml_fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Control]:
    """The emulated NVML loaded by pynvml in this process, with its control file."""
    monkeypatch.setenv("ENERGYD_FAKE_NVML_CONTROL", str(tmp_path / "control"))
    monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(nvml_fake / "libnvidia-ml.so.1")))
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    control = Control(tmp_path / "control")
    control.say()
    yield control
    control.say()
    while True:  # leave no session behind: the library stays loaded for the next test
        try:
            pynvml.nvmlShutdown()
        except pynvml.NVMLError:
            break
