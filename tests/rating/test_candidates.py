"""Which runs of a ledger ask for a star, with which figure, and which are told why not."""

from collections.abc import Callable

import pytest

from energyd.daemon.errors import UsageError
from energyd.daemon.records import Basis, Run
from energyd.rating.candidates import class_overrides, entries_of

RunFactory = Callable[..., Run]


@pytest.mark.parametrize(("basis", "wh"), [(Basis.GPU_RUN, 10.0), (Basis.SERVING, 9.0), (Basis.ACTIVE, 6.0)])
def test_the_basis_chooses_the_figure(run_of: RunFactory, basis: Basis, wh: float) -> None:
    """Each basis has its own figure, and the uncertainty is shown only with the one that it belongs to."""
    (entry,) = entries_of([run_of(wh=10.0)], basis=basis)
    assert entry.energy_wh_per_1000 == pytest.approx(wh)
    assert entry.setup.basis == basis.value
    assert entry.setup.rel_u == (0.01 if basis is Basis.GPU_RUN else None)


def test_only_the_latest_of_equal_runs(run_of: RunFactory) -> None:
    """A repeated run replaces the one before; another batch size or GPU is another figure; `every` keeps all."""
    runs = [run_of(wh=1.0), run_of(wh=2.0), run_of(wh=3.0, batch_size=32), run_of(wh=4.0, hardware="NVIDIA H200")]
    assert [e.energy_wh_per_1000 for e in entries_of(runs)] == [2.0, 3.0, 4.0]
    assert [e.energy_wh_per_1000 for e in entries_of(runs, every=True)] == [1.0, 2.0, 3.0, 4.0]


def test_an_incomplete_run_hides_no_complete_one(run_of: RunFactory) -> None:
    """A later run that broke off leaves the complete one in place; alone it is listed with its reason."""
    broken = run_of(status="interrupted", wh=None)
    assert [e.unrated for e in entries_of([run_of(), broken])] == [None]
    assert [e.unrated for e in entries_of([broken])] == ["the run is interrupted, not complete"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"gpu_run_wh_per_1000": None}, "the run has no gpu_run energy"),
        ({"gpu_run_wh_per_1000": float("nan")}, "the run has no gpu_run energy"),
        ({"gpu_run_wh_per_1000": -1.0}, "the run has no gpu_run energy"),
        ({"n": 98, "failed": 2}, "2 of 100 queries failed, 2.0 % (at most 1 % may)"),
        ({"n": 0, "failed": 0, "gpu_run_wh_per_1000": None}, "the run has no measured query"),
        ({"source": "estimate"}, "source estimate, not a measurement: rated only with --include-estimates"),
        ({"source": "emulated"}, "source emulated, not a measurement: rated only with --include-estimates"),
        ({"source": "estimate+nvml-counter"}, "source estimate+nvml-counter, not a measurement"),
    ],
)
def test_what_cannot_be_rated_says_why(run_of: RunFactory, change: dict[str, object], reason: str) -> None:
    """No energy, too many failures, or no measurement: listed with the reason."""
    (entry,) = entries_of([run_of(**change)])
    assert reason in (entry.unrated or "")


def test_one_percent_of_failures_is_still_rated(run_of: RunFactory) -> None:
    """The limit itself passes."""
    assert entries_of([run_of(n=99, failed=1)])[0].unrated is None


def test_estimates_are_rated_on_demand_and_stay_marked(run_of: RunFactory) -> None:
    """Asked for, an estimate is rated, and its figure is not official."""
    (entry,) = entries_of([run_of(source="estimate")], include_estimates=True)
    assert entry.unrated is None
    assert entry.setup.not_official == ("source estimate, not a measurement",)


@pytest.mark.parametrize(
    ("hardware", "official"),
    [
        ("NVIDIA H100 80GB HBM3", True),
        ("NVIDIA H100-80GB", True),
        ("NVIDIA H100 PCIe", True),
        ("NVIDIA H100 NVL", False),
        ("NVIDIA H200", False),
        ("NVIDIA GH200 480GB", False),
        ("2x NVIDIA H100 80GB HBM3", True),
        (None, False),
    ],
)
def test_other_hardware_is_not_official(run_of: RunFactory, hardware: str | None, official: bool) -> None:
    """Only an H100 with 80 GB is the method's own; unknown hardware is not taken for it."""
    assert (not entries_of([run_of(hardware=hardware)])[0].setup.not_official) is official


def test_the_benchs_own_reasons_are_not_said_twice(run_of: RunFactory) -> None:
    """What the bench said of the hardware and the server stands alone; what it left out is added."""
    told = ["hardware is NVIDIA H200, not one H100-80GB", "a server over HTTP (vllm), not transformers in process"]
    run = run_of(hardware="NVIDIA H200", engine="vllm 0.24", batch_size=32, not_official_because=told)
    assert entries_of([run])[0].setup.not_official == (*told, "batch size 32, not 1")


def test_silence_is_no_proof(run_of: RunFactory) -> None:
    """A run that does not say whether it kept to the protocol is not official."""
    run = run_of(not_official_because=None)
    assert entries_of([run])[0].setup.not_official == ("the run does not say whether it kept to the protocol",)


def test_the_class_comes_from_the_run_or_from_the_command(run_of: RunFactory) -> None:
    """What the command says wins over what the run says; nonsense in a run counts as nothing."""
    runs = [
        run_of(model="a"),
        run_of(model="b", provenance={"model_class": "b"}),
        run_of(model="c", provenance={"model_class": 7}),
    ]
    entries = entries_of(runs, classes=class_overrides(["a=C"], ["a", "b", "c"]))
    assert [e.model_class for e in entries] == ["C", "B", None]


def test_a_guessed_class_is_told_apart_from_a_stated_one(run_of: RunFactory) -> None:
    """A class that the bench read off the name stays marked until somebody states it."""
    run = run_of(model="m", provenance={"model_class_source": "name"})
    assert [entries_of([run], classes=c)[0].setup.class_guessed for c in ({}, {"m": "A"})] == [True, False]


def test_datasets_of_one_name_are_told_apart(run_of: RunFactory) -> None:
    """The hash of the file stands beside its name."""
    run = run_of(provenance={"dataset": "mine", "dataset_sha256": "0123456789abcdef"})
    assert entries_of([run])[0].setup.dataset == "mine@0123456789ab"


def test_a_model_name_may_hold_an_equals_sign() -> None:
    """The last one separates the class."""
    assert class_overrides(["m=x=a"], ["m=x"]) == {"m=x": "A"}


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("m", "expected MODEL=CLASS"),
        ("m=D", "expected MODEL=CLASS"),
        ("=A", "expected MODEL=CLASS"),
        ("x=A", "models: m"),
    ],
)
def test_a_bad_class_option_is_told(pair: str, message: str) -> None:
    """A malformed pair or an unknown model is one clear line."""
    with pytest.raises(UsageError, match=message):
        class_overrides([pair], ["m"])
