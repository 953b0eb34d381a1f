"""What a run says of its origin."""

import pytest

from energyd.bench.provenance import class_from_name, detected_hardware
from energyd.daemon.wire import Status


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "A"),
        ("facebook/opt-125m", "A"),
        ("mistralai/Mixtral-8x7B-v0.1", "B"),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "C"),
        ("Qwen/Qwen3-30B-A3B", "B"),
        ("google/gemma-3-0.5b", "A"),
        ("org-70B/tiny", None),
        ("gpt2", None),
        ("/models/m4b7", None),
    ],
)
def test_a_size_in_the_name_hints_at_the_class(model: str, name: str | None) -> None:
    """The first size of the model's own name; no size, no guess."""
    assert class_from_name(model) == name


def test_hardware_is_what_the_daemon_meters() -> None:
    """The chosen GPUs by name; unknown without a daemon or without such a GPU."""
    gpus = ({"uuid": "GPU-a", "index": 0, "name": "H200"}, {"uuid": "GPU-b", "index": 1, "name": "L4"})
    status = Status("0", "h", "b", 0, "x", "time", gpus, 0, None, 0, 0)
    assert detected_hardware(status, ()) == "H200, L4"
    assert detected_hardware(status, ("1",)) == "L4"
    assert detected_hardware(status, ("GPU-a",)) == "H200"
    assert detected_hardware(status, ("9",)) is None
    assert detected_hardware(None, ()) is None
