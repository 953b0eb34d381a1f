"""Policy `tokens`: the active energy of a window is shared by the tokens that fell into it.

Prompt tokens count over the span up to the first chunk, completion tokens at the times of the chunks; a query that does
not stream spreads both evenly over its time in flight. A token of prompt and one of completion count the same, which is
wrong by factors for long prompts: the policy is here to be compared with, not to be believed.
"""

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from energyd.daemon.records import Service, Window

from . import Overlap
from .time import TimeShare


class TokenShare(TimeShare):
    """Share by tokens processed within the window."""

    name = "tokens"

    def weights(
        self, window: Window, services: Sequence[Service], overlap: Overlap, active_uj: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Tokens of each service within the window; time shares if nobody's tokens are known."""
        weights = np.array([_tokens_within(s, window.start_ns, window.end_ns) for s in services])
        weights[overlap.sum(axis=0) == 0] = 0.0
        return weights if weights.any() else super().weights(window, services, overlap, active_uj)


def _tokens_within(service: Service, start_ns: int, end_ns: int) -> float:
    """Tokens that fell into [start, end); unknown counts are 0, unknown completions are counted in chunks."""
    chunks = service.chunks_ns
    prompt = service.prompt_tokens or 0
    if not chunks:
        total = prompt + (service.completion_tokens or 0)
        return total * _share(service.start_ns, service.end_ns, start_ns, end_ns)
    completion = len(chunks) if service.completion_tokens is None else service.completion_tokens
    within = bisect_left(chunks, end_ns) - bisect_left(chunks, start_ns)
    return prompt * _share(service.start_ns, chunks[0], start_ns, end_ns) + completion / len(chunks) * within


def _share(from_ns: int, to_ns: int, start_ns: int, end_ns: int) -> float:
    """Which part of [from, to) lies within [start, end)."""
    if to_ns <= from_ns:
        return 1.0 if start_ns <= from_ns < end_ns else 0.0
    return max(0, min(to_ns, end_ns) - max(from_ns, start_ns)) / (to_ns - from_ns)
