"""Recorded traces: what is read, and how each broken file is refused."""

import gzip
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from energyd.daemon.errors import TraceError
from energyd.daemon.records import Counter, Samples, Source
from energyd.daemon.trace import DEFAULT_MODEL, Mark, parse_trace, read_trace
from energyd.daemon.units import NS_PER_MS, NS_PER_US

DATA = Path(__file__).parents[1] / "data"


def document(**changes: Any) -> dict[str, Any]:
    """A small trace of one GPU; `changes` replace keys, None removes them."""
    whole: dict[str, Any] = {
        "info": {"name": "NVIDIA H200", "driver": "580"},
        "anchors": [[1000, 2000, 10], [3000, 4000, 20], [5000, 6000, 30]],
        "samples": [[1, 100], [2, 200]],
        "marks": [["idle", 1000]],
        "requests": [
            {
                "t0": 5,
                "t1": 9,
                "stream": True,
                "chunks": [6, 7],
                "status": 200,
                "prompt_tokens": 3,
                "completion_tokens": 2,
            },
        ],
    }
    return {k: v for k, v in (whole | changes).items() if v is not None}


def text(**changes: Any) -> bytes:
    """The same as JSON."""
    return json.dumps(document(**changes)).encode()


def test_the_h200_serving_recording_is_read_whole() -> None:
    """Every anchor, sample, mark and request of the serving recording arrives, in ns and mJ as recorded."""
    trace = read_trace(DATA / "h200_vllm_llama8b_eager.json.gz")
    assert (
        len(trace.anchors[0]),
        len(trace.samples[0].end_ns),
        len(trace.marks),
        len(trace.requests),
    ) == (173, 8681, 13, 1544)
    assert Counter(1795463583483730217, 1795463583487113183, 12917671) == trace.anchors[0][0]
    assert (trace.samples[0].end_ns[0], trace.samples[0].power_mw[0]) == (1795463581113566 * NS_PER_US, 126711)
    assert Mark("idle", 1795463586481262590) == trace.marks[0]
    assert {DEFAULT_MODEL} == {r.model for r in trace.requests}
    assert list(range(1544)) == [r.index for r in trace.requests]


def test_a_recording_without_uuid_gets_one_and_says_that_it_is_a_recording() -> None:
    """The GPU is `recording-0`, named by info, of source recording."""
    (gpu,) = read_trace(DATA / "h200_vllm_llama8b_eager.json.gz").gpus
    assert (
        gpu.uuid,
        gpu.index,
        gpu.name,
        gpu.driver,
        gpu.source,
    ) == ("recording-0", 0, "NVIDIA H200", "580.159.04", Source.RECORDING)


@pytest.mark.parametrize(
    ("said", "source"),
    [
        ("estimate", "estimate"),
        ("emulated", "emulated"),
        ("nvml-counter", "recording"),
        ("x", "recording"),
        (None, "recording"),
    ],
)
def test_a_recorded_estimate_stays_an_estimate(said: str | None, source: str) -> None:
    """What `energyd record` took from an estimate or an emulator is marked as such when it is booked elsewhere."""
    trace = parse_trace(json.dumps({"info": {"source": said}, "anchors": [[1, 2, 3], [4, 5, 6]]}).encode())
    assert trace.gpus[0].source == source


def test_edges_stand_in_for_anchors_about_one_a_second() -> None:
    """The metrology recording has edges every 100 ms: they are thinned, first and last stay, requests are empty."""
    trace = read_trace(DATA / "h200_metrology.json.gz")
    (anchors,) = trace.anchors
    assert (anchors[0].counter_mj, anchors[-1].counter_mj) == (3706362, 37523555)
    gaps_ns = [b.before_ns - a.before_ns for a, b in pairwise(anchors)]
    assert all(950 * NS_PER_MS <= gap < 1150 * NS_PER_MS for gap in gaps_ns[:-1])
    assert trace.requests == ()


def test_thinning_can_be_turned_off() -> None:
    """With `thin_ns=0` each of the 959 edges is an anchor."""
    assert len(read_trace(DATA / "h200_metrology.json.gz", thin_ns=0).anchors[0]) == 959


def test_anchors_are_never_thinned() -> None:
    """Anchors are taken as recorded, however close, and win over edges."""
    trace = parse_trace(text(edges=[[1, 1, 1], [2, 2, 2]]), thin_ns=10**9)
    assert (Counter(1000, 2000, 10), Counter(3000, 4000, 20), Counter(5000, 6000, 30)) == trace.anchors[0]


def test_gzip_is_told_by_content(tmp_path: Path) -> None:
    """A plain file and a gzipped one give the same trace, whatever their names end with."""
    plain, packed = tmp_path / "a.json.gz", tmp_path / "b.json"
    plain.write_bytes(text())
    packed.write_bytes(gzip.compress(text()))
    assert read_trace(plain) == read_trace(packed)


def test_a_minimal_request_needs_only_its_times() -> None:
    """Unknown counts, status, phase and kind are None; a request without chunks did not stream."""
    (request,) = parse_trace(text(requests=[{"t0": 1, "t1": 2}])).requests
    assert (
        request.chunks_ns,
        request.stream,
        request.http_status,
        request.prompt_tokens,
        request.completion_tokens,
        request.model,
        request.phase,
        request.kind,
    ) == ((), False, None, None, None, DEFAULT_MODEL, None, None)


def test_requests_keep_the_order_of_the_file() -> None:
    """`index` is the place in the file, also when requests are not sorted by time."""
    trace = parse_trace(text(requests=[{"t0": 50, "t1": 60, "model": "b"}, {"t0": 1, "t1": 2, "model": "a"}]))
    assert [(r.index, r.start_ns, r.model) for r in trace.requests] == [(0, 50, "b"), (1, 1, "a")]


@pytest.mark.parametrize(("first", "second"), [(0, 1), ("GPU-aa", "GPU-bb")])
def test_rows_may_name_their_gpu(first: int | str, second: int | str) -> None:
    """A fourth element of an anchor and a third of a sample is the GPU's index or UUID; each GPU gets its own rows."""
    trace = parse_trace(
        text(
            anchors=[[1, 2, 10, first], [1, 2, 90, second], [3, 4, 11, first], [3, 4, 95, second]],
            samples=[[1, 100, second], [2, 200, second]],
        )
    )
    uuids = ["recording-0", "recording-1"] if first == 0 else [first, second]
    assert uuids == [gpu.uuid for gpu in trace.gpus]
    assert [[c.counter_mj for c in anchors] for anchors in trace.anchors] == [[10, 11], [90, 95]]
    assert (Samples((), ()), Samples((1000, 2000), (100, 200))) == trace.samples


def test_gpus_are_in_order_of_their_index() -> None:
    """Indices sort the GPUs, whichever is read first in the file."""
    trace = parse_trace(text(anchors=[[1, 2, 1, 3], [1, 2, 1, 0], [3, 4, 2, 3], [3, 4, 2, 0]], samples=[]))
    assert [(gpu.uuid, gpu.index) for gpu in trace.gpus] == [("recording-0", 0), ("recording-3", 3)]


def test_samples_of_overlapping_fetches_count_once() -> None:
    """The driver's ring repeats samples between fetches: they are sorted by stamp and each is kept once."""
    trace = parse_trace(text(samples=[[1, 10], [2, 20], [1, 10], [2, 20], [3, 30]]))
    assert (Samples((1000, 2000, 3000), (10, 20, 30)),) == trace.samples


def test_a_recorded_reset_is_no_error() -> None:
    """A falling counter is something that happened: the meter books it as a reset."""
    (anchors,) = parse_trace(text(anchors=[[1, 2, 10], [3, 4, 5]])).anchors
    assert [c.counter_mj for c in anchors] == [10, 5]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a complete JSON document"),
        (text()[:-40], "not a complete JSON document"),
        (b"\xff\xfe\x00", "not a complete JSON document"),
        (b'{"info": {"name": "\xff"}, "anchors": []}', "not a complete JSON document"),
        (b"[" * 100_000, "Expected `object`, got `array`"),
        (b'{"x":' + b"[" * 100_000, "nested too deeply"),
        (b"[1, 2]", "Expected `object`, got `array`"),
        (text(anchors=None), "neither 'anchors' nor 'edges'"),
        (text(anchors=[], samples=[]), "'anchors' is empty"),
        (text(anchors=[[1, 2, 3]]), "anchors hold one reading"),
        (text(anchors=None, edges=[[1, 2, 3]]), "edges hold one reading"),
        (text(anchors="x"), "$.anchors"),
        (text(anchors=[[1, 2, 3], [4, 5]]), "anchors[1] is [4, 5]; expected [ns before, ns after, mJ]"),
        (text(anchors=[[1, 2, 3], [4, 5, "6"]]), "anchors[1]"),
        (text(anchors=[[1, 2, 3], [4, 5, 6, 0, 0]]), "anchors[1]"),
        (text(anchors=[[1, 2, 3], [4, 5, -6]]), "$.anchors[1][2]"),
        (text(anchors=[[1, 2, 3], [4, 5, 6.5]]), "$.anchors[1][2]"),
        (text(anchors=[[1, 2, 3], [4, 5, None]]), "$.anchors[1][2]"),
        (text(anchors=[[1, 2, 3], [4, 5, 2**62]]), "anchors[1] has a counter of"),
        (text(anchors=[[1, 2, 3], [5, 4, 6]]), "anchors[1] ends before it begins"),
        (text(anchors=[[3, 4, 3], [1, 2, 6]]), "anchors[1] begins before"),
        (text(anchors=[[3, 9, 3], [5, 10, 6]]), "anchors[1] begins before"),
        (text(anchors=[[1, 2, 3, 0], [3, 4, 5, 0], [1, 2, 3, "u"], [3, 4, 5, "u"]]), "some by UUID"),
        (text(samples=[[1, 100, 7]]), "samples name GPU 7"),
        (text(samples=[[1]]), "samples[0] is [1]; expected [µs, mW]"),
        (text(samples=[[1, 100], [1, 101]]), "samples[1] gives a second value for the stamp 1"),
        (text(samples=[[2**61, 100]]), "samples[0] has the stamp"),
        (text(marks=[["idle"]]), "$.marks[0]"),
        (text(requests=[{"t0": 1}]), "missing required field `t1` - at `$.requests[0]`"),
        (text(requests=[{"t0": 1, "t1": 2}, {"t0": "now", "t1": 2}]), "$.requests[1].t0"),
        (text(requests=[{"t0": 3, "t1": 2}]), "requests[0] ends before it begins"),
        (text(requests=[{"t0": 1, "t1": 9, "chunks": [5, 4]}]), "requests[0].chunks do not ascend"),
        (text(requests=[{"t0": 3, "t1": 9, "chunks": [2]}]), "requests[0].chunks do not ascend"),
    ],
)
def test_a_broken_trace_is_refused_by_name(tmp_path: Path, content: bytes, says: str) -> None:
    """Each defect gives one line that begins with the file and names the key (and index) at fault."""
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(TraceError) as refused:
        read_trace(path)
    message = str(refused.value)
    assert message.startswith(f"trace {path}: ")
    assert says in message
    assert "\n" not in message


def test_a_cut_off_gzip_is_refused(tmp_path: Path) -> None:
    """A download that broke off is told as such, not as bad JSON."""
    path = tmp_path / "cut.json.gz"
    path.write_bytes((DATA / "h200_metrology.json.gz").read_bytes()[:10_000])
    with pytest.raises(TraceError, match="cut off or damaged"):
        read_trace(path)


def test_a_damaged_gzip_is_refused(tmp_path: Path) -> None:
    """A flipped byte in the middle is told, never decoded as data."""
    raw = bytearray((DATA / "h200_metrology.json.gz").read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path = tmp_path / "flipped.json.gz"
    path.write_bytes(raw)
    with pytest.raises(TraceError):
        read_trace(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    """A path that cannot be read is named with the system's reason."""
    with pytest.raises(TraceError, match="No such file"):
        read_trace(tmp_path / "none.json")
    with pytest.raises(TraceError, match="Is a directory"):
        read_trace(tmp_path)
