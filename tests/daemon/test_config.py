"""Settings: what is wrong is told in one line that names the option."""

from pathlib import Path

import pytest

from energyd.daemon.config import Address, Settings, read_config
from energyd.daemon.errors import UsageError


@pytest.mark.parametrize(
    ("text", "host", "port", "printed"),
    [
        ("127.0.0.1:9709", "127.0.0.1", 9709, "127.0.0.1:9709"),
        ("localhost:0", "localhost", 0, "localhost:0"),
        ("[::1]:65535", "::1", 65535, "[::1]:65535"),
        ("gpu-host.example:80", "gpu-host.example", 80, "gpu-host.example:80"),
    ],
)
def test_addresses_are_read_and_printed(text: str, host: str, port: int, printed: str) -> None:
    """HOST:PORT with IPv6 in brackets goes in and comes out the same."""
    address = Address.parse(text, "--admin")
    assert (address.host, address.port, str(address)) == (host, port, printed)


@pytest.mark.parametrize(
    "text", ["", "9709", ":9709", "host", "host:", "host:x", "host:-1", "host:65536", "host:²", "host:٣x", "h:" + "9" * 5000]
)  # fmt: skip
def test_a_broken_address_names_its_option(text: str) -> None:
    """One line that names the option and shows how it should look; digits of other scripts are no traceback."""
    with pytest.raises(UsageError, match=r"^--admin must be HOST:PORT, such as 127\.0\.0\.1:9709, not '"):
        Address.parse(text, "--admin")


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("192.0.2.1", False), ("localhost.example", False)],
)  # fmt: skip
def test_loopback_is_recognised(host: str, loopback: bool) -> None:
    """Only addresses that nobody else can reach count; a name other than localhost is taken for reachable."""
    assert Address(host=host, port=1).loopback is loopback


def test_defaults_are_safe() -> None:
    """With only a ledger named: NVML, loopback, ten minutes of horizon, two of patience."""
    settings = Settings.checked(db=Path("x.db"))
    assert (settings.sensor, settings.admin.loopback, settings.policy) == ("nvml", True, "time")
    assert (settings.horizon_s, settings.recovery_wait_s, settings.idle_watts) == (600, 120, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"horizon_s": 0}, "--horizon: "),
        ({"horizon_s": float("inf")}, "--horizon: "),
        ({"horizon_s": float("nan")}, "--horizon: "),
        ({"recovery_wait_s": -1}, "--recovery-wait: "),
        ({"idle_watts": -5}, "--idle-watts: "),
        ({"estimate_watts": 0}, "--estimate-watts: "),
        ({"policy": "fair"}, "--policy: "),
        ({"sensor": "guess"}, "--sensor: "),
        ({"gpus": (7, "0")}, "--gpu: "),
        ({"keep_windows_days": 0}, "--keep-windows-days: "),
        ({"colour": "red"}, "--colour: "),
    ],
)
def test_a_wrong_value_names_its_option(values: dict[str, object], message: str) -> None:
    """One line: the option as it is typed, what is wrong, what was given."""
    with pytest.raises(UsageError) as found:
        Settings.checked(db=Path("x.db"), **values)
    text = str(found.value)
    assert text.startswith(message)
    assert "(given: " in text
    assert "\n" not in text


def test_a_config_file_fills_options(tmp_path: Path) -> None:
    """Keys with - and with _ are the same."""
    file = tmp_path / "energyd.toml"
    file.write_text('idle-watts = 90\nrecovery_wait = 5\nupstream = ["http://127.0.0.1:8000"]\n')
    assert read_config(file) == {"idle_watts": 90, "recovery_wait": 5, "upstream": ["http://127.0.0.1:8000"]}


@pytest.mark.parametrize("content", [b"idle-watts = ", b"[broken", b"\xff\xfe\x00", b"a = 1\na = 2\n"])
def test_a_broken_config_file_is_named(tmp_path: Path, content: bytes) -> None:
    """Broken TOML, bytes that are no text, a key given twice: one line with the file's name."""
    file = tmp_path / "energyd.toml"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"energyd\.toml is not TOML: "):
        read_config(file)


def test_a_missing_config_file_is_named(tmp_path: Path) -> None:
    """A path that is not there, or is a folder, is one line that names it."""
    with pytest.raises(UsageError, match=r"cannot read .*absent\.toml"):
        read_config(tmp_path / "absent.toml")
    with pytest.raises(UsageError, match="cannot read"):
        read_config(tmp_path)
