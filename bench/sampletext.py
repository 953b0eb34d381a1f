"""Composes the demonstration prompts that ship with energyd: `python -m energyd.bench.sampletext OUT.jsonl`.

The sentences are our own (`data/sentences.toml`), so the file may be shipped, which the licences of the standard
datasets do not settle. The result is the same on every machine: one seed, no clock. It is a sample, never official.
"""

import json
import random
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

SEED = 20251123
COUNT = 360
_DISTINCT_WORDS = 6
"""Prompts that begin alike would let a server answer part of one from the cache of another: too cheap."""


def bank() -> Mapping[str, Any]:
    """The sentences, as written in `data/sentences.toml`."""
    return tomllib.loads(files("energyd.bench").joinpath("data/sentences.toml").read_text(encoding="utf-8"))


def compose(sentences: Mapping[str, Any], count: int = COUNT, seed: int = SEED) -> list[str]:
    """`count` prompts of 5 to about 400 words, no two with the same first words; the same for the same seed."""
    rng = random.Random(seed)  # noqa: S311 - a fixed seed is the point: the file must be reproducible
    prompts: list[str] = []
    starts: set[tuple[str, ...]] = set()
    while len(prompts) < count:
        prompt = _prompt(sentences, rng)
        start = tuple(prompt.split()[:_DISTINCT_WORDS])
        if start not in starts:
            starts.add(start)
            prompts.append(prompt)
    return prompts


def jsonl(prompts: Iterable[str]) -> str:
    """The prompts as JSON Lines, `{"text": …}` each."""
    return "".join(json.dumps({"text": p}, ensure_ascii=False) + "\n" for p in prompts)


def _prompt(sentences: Mapping[str, Any], rng: random.Random) -> str:
    if rng.random() < 0.15:
        return _fill(rng.choice(sentences["questions"]), sentences, rng)
    words = rng.choice((30, 60, 90, 140, 200, 280, 380))
    topics: Sequence[str] = rng.sample(sorted(sentences["topics"]), 3)
    pool = [s for t in topics for s in rng.sample(sentences["topics"][t], len(sentences["topics"][t]))]
    parts = [_fill(rng.choice(sentences["openers"]), sentences, rng)]
    while pool and _words(parts) < words:
        parts.append(_fill(pool.pop(0), sentences, rng))
    text = _paragraphs(parts, rng)
    if rng.random() < 0.4:
        text = f"{text}\n\n{rng.choice(sentences['instructions'])}"
    elif rng.random() < 0.5:
        text = f"{text}\n\n{rng.choice(sentences['closers'])}"
    return text


def _paragraphs(parts: Sequence[str], rng: random.Random) -> str:
    text = parts[0]
    for part in parts[1:]:
        text += ("\n\n" if rng.random() < 0.15 else " ") + part
    return text


def _words(parts: Iterable[str]) -> int:
    return sum(len(p.split()) for p in parts)


def _fill(sentence: str, sentences: Mapping[str, Any], rng: random.Random) -> str:
    return sentence.format(
        name=rng.choice(sentences["names"]),
        city=rng.choice(sentences["cities"]),
        month=rng.choice(sentences["months"]),
        thing=rng.choice(sentences["things"]),
        n=rng.randint(3, 29),
        year=rng.randint(1871, 1998),
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(jsonl(compose(bank())), encoding="utf-8")
