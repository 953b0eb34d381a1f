"""What all tests share: a clean environment, and the real servers that end-to-end tests talk to.

The servers are real programs with tiny random models: vLLM's CPU build and `transformers serve`, from the environments
that `.ci/environment` caches under `.envs`. A test that needs one is skipped only where that environment is missing and
`ENERGYD_REQUIRE_SERVERS` is not set; `make test` sets it, so CI never skips.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from energyd.bench.companion import Companion, free_port

ROOT = Path(__file__).parent.parent
MODEL = "tiny"
KEPT = frozenset({"ENERGYD_REQUIRE_SERVERS", "ENERGYD_PUBLISHED_CSV"})
"""Variables that speak to the tests and not to energyd."""
START_S = 300
"""A real vLLM is up in 40 s on two idle cores; a busy CI machine takes longer."""


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the machine reaches a test, and no test writes to the machine's state folder."""
    for name in [name for name in os.environ if name.startswith("ENERGYD_") and name not in KEPT]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ENERGYD_STATE_DIR", str(tmp_path / "state"))


@pytest.fixture(scope="session")
def vllm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A real vLLM (CPU build): its URL and the name of its model."""
    python = environment("vllm")
    folder = tmp_path_factory.mktemp("vllm")
    make_model(python, folder)
    port = free_port()
    arguments = ["-m", "vllm.entrypoints.openai.api_server", "--model", MODEL, "--served-model-name", MODEL]
    arguments += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "512", "--enforce-eager"]
    arguments += ["--dtype", "bfloat16"]
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    yield from running("vLLM", [str(python), *arguments], folder, port, quiet)


@pytest.fixture(scope="session")
def transformers_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A real `transformers serve`: its URL and the name of its model (answers name it `tiny@main`)."""
    python = environment("serve")
    folder = tmp_path_factory.mktemp("transformers")
    make_model(python, folder)
    port = free_port()
    arguments = ["-m", "transformers.cli.transformers", "serve", "--host", "127.0.0.1", "--port", str(port)]
    yield from running("transformers serve", [str(python), *arguments, "--device", "cpu"], folder, port, {})


@pytest.fixture(scope="session")
def serve_python() -> Path:
    """The Python of the environment that has `transformers serve`."""
    return environment("serve")


def environment(name: str) -> Path:
    """The Python of a cached environment; skips the test, or fails where servers are required, if it is missing."""
    python = ROOT / ".envs" / name / "bin" / "python"
    if not (ROOT / ".envs" / name / ".stamp").exists():
        why = f"the environment of a real server is missing: run `.ci/environment {name}`"
        if os.environ.get("ENERGYD_REQUIRE_SERVERS"):
            pytest.fail(why)
        pytest.skip(why)
    return python


def make_model(python: Path, folder: Path) -> None:
    """Make the tiny model in `folder`/MODEL with the server's own libraries: their file formats differ by version."""
    script = str(ROOT / "bench" / "tinymodels.py")
    with Companion("tinymodels", [str(python), script, MODEL, "tiny"], log=folder / "model.log", cwd=folder) as maker:
        code = maker.process.wait(START_S)
    assert code == 0, (folder / "model.log").read_text("utf-8")


def running(
    name: str, arguments: list[str], folder: Path, port: int, settings: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """Run a server in `folder` until the session ends; gives its URL and its model."""
    log = folder / "server.log"
    with Companion(name, arguments, log=log, cwd=folder, environment={"HF_HUB_OFFLINE": "1", **settings}) as server:
        server.wait_healthy(f"http://127.0.0.1:{port}/health", START_S)
        yield f"http://127.0.0.1:{port}", MODEL
