"""JSONL datasets, good and broken."""

import hashlib
from pathlib import Path

import pytest

from energyd.bench.datasets import Prompt, load, load_sample
from energyd.bench.sampletext import bank, compose, jsonl
from energyd.bench.tasks import find
from energyd.daemon.errors import DataError


def written(tmp_path: Path, content: bytes) -> Path:
    """A file with this content."""
    path = tmp_path / "d.jsonl"
    path.write_bytes(content)
    return path


def test_three_forms_of_a_sample_are_read(tmp_path: Path) -> None:
    """`text`, `prompt` and `messages` lines may be mixed; blank lines are no samples."""
    path = written(
        tmp_path,
        b'{"text": "one", "id": 4}\r\n\n{"prompt": "two"}\n'
        b'{"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "three"}]}',
    )
    found = load(path)
    assert [p.text for p in found.prompts] == ["one", "two", "be brief\nthree"]
    assert found.prompts[2].messages is not None
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not found.is_sample


def test_empty_samples_are_dropped_and_counted(tmp_path: Path) -> None:
    """As upstream does, before any selection."""
    found = load(written(tmp_path, b'{"text": "  "}\n{"text": "a"}\n{"messages": []}\n{"prompt": ""}\n'))
    assert ([p.text for p in found.prompts], found.empty) == (["a"], 3)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{oops", "not JSON"),
        (b'["text"]', "a list instead of an object"),
        (b"null", "null instead of an object"),
        (b'{"question": "x"}', "no 'text', 'prompt' or 'messages'"),
        (b'{"text": 7}', "'text' is a number"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"messages": "hello"}', "'messages' is text, not a list"),
        (b'{"messages": [{"content": "x"}]}', "message 1 has no 'role'"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "message 1: 'content' is a list"),
        (b"[" * 100_000, "brackets too deep|not JSON"),
        (b'{"text": ' + b"9" * 5_000 + b"}", "number too long"),
    ],
)
def test_a_broken_line_is_named_by_number(tmp_path: Path, line: bytes, reason: str) -> None:
    """File and line number are told, and the line itself is not quoted."""
    path = written(tmp_path, b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"d\.jsonl, line 3: .*({reason})") as caught:
        load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"text": ""}\n'])
def test_a_dataset_without_samples_is_refused(tmp_path: Path, content: bytes) -> None:
    """There is nothing to send."""
    with pytest.raises(DataError, match="holds no sample"):
        load(written(tmp_path, content))


def test_a_missing_file_is_one_clear_line(tmp_path: Path) -> None:
    """The path and the way out are named."""
    with pytest.raises(DataError, match=r"cannot read the dataset .*no\.jsonl: No such file.*--data"):
        load(tmp_path / "no.jsonl")


def test_a_prompt_does_not_show_itself() -> None:
    """A repr ends up in logs and tracebacks; it tells the length only."""
    assert repr(Prompt("a private thing")) == "Prompt(15 characters)"


def test_the_shipped_sample_is_large_varied_and_marked() -> None:
    """At least 300 prompts between 5 and about 400 words, no two alike at their beginning; never official."""
    found = load_sample(find("text_generation"))
    words = sorted(len(p.text.split()) for p in found.prompts)
    assert found.is_sample
    assert len(words) >= 300
    assert 5 <= words[0] < 20
    assert 350 < words[-1] <= 430
    assert len({tuple(p.text.split()[:6]) for p in found.prompts}) == len(words)


def test_the_shipped_sample_is_what_the_script_composes() -> None:
    """The file can be made again, byte for byte."""
    path = Path(__file__).parents[2] / "bench/data/text_generation.sample.jsonl"
    assert path.read_text(encoding="utf-8") == jsonl(compose(bank()))


def test_a_task_without_a_sample_says_what_to_export() -> None:
    """The message names the dataset that is needed."""
    with pytest.raises(DataError, match=r"AIEnergyScore/ASR as JSONL"):
        load_sample(find("asr"))
