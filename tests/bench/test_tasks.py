"""The task files."""

import pytest

from energyd.bench.tasks import all_tasks, class_of, find, parse
from energyd.daemon.errors import DataError, UsageError

CANONICAL = {
    "text_generation", "reasoning", "summarization", "question_answering", "text_classification", "sentence_similarity",
    "image_classification", "object_detection", "asr", "image_captioning", "image_generation",
}  # fmt: skip


def test_the_eleven_tasks_have_their_canonical_ids() -> None:
    """There is one file for each task of the published tables, and no other."""
    assert {t.task_id for t in all_tasks()} == CANONICAL


def test_ten_datasets_serve_eleven_tasks() -> None:
    """Reasoning shares the dataset of text generation; every other task has its own."""
    assert len({t.dataset.dataset_id for t in all_tasks()}) == 10


def test_text_generation_fixes_ten_greedy_tokens() -> None:
    """The protocol of February 2025: exactly 10 new tokens, no sampling, FP16, classes, 1,000 queries."""
    task = find("text_generation")
    assert task.implemented
    assert (task.max_new_tokens, task.fixed_tokens, task.parameters["do_sample"]) == (10, True, False)
    assert (task.protocol, task.precision, task.has_classes, task.dataset.count) == ("aies-v1", "fp16", True, 1000)


def test_reasoning_does_not_fix_its_tokens() -> None:
    """Up to 8,192 tokens, at least one: the count is not fixed."""
    task = find("reasoning")
    assert (task.max_new_tokens, task.fixed_tokens) == (8192, False)


@pytest.mark.parametrize("name", ["text-generation", "Text_Generation", " text_generation "])
def test_names_are_forgiving(name: str) -> None:
    """Hyphens, capitals and blanks around a name are accepted."""
    assert find(name).task_id == "text_generation"


def test_an_unknown_task_lists_the_known_ones() -> None:
    """The message names what was asked and what there is."""
    with pytest.raises(UsageError, match=r"no task 'poetry'.*asr.*text_generation"):
        find("poetry")


def test_a_damaged_task_file_is_named() -> None:
    """A file without a title is refused by name."""
    with pytest.raises(DataError, match=r"broken.toml.*title"):
        parse("broken", '[dataset]\nid = "x"\n')


@pytest.mark.parametrize(("parameters", "name"), [(20e9, "A"), (20.1e9, "B"), (66e9, "B"), (67e9, "C")])
def test_classes_end_at_20_and_66_billion(parameters: float, name: str) -> None:
    """The bounds belong to the lower class."""
    assert class_of(parameters) == name
