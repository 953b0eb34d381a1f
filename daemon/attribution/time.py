"""Policy `time`: in every slice the active energy is shared by time in flight.

Simple, needs no tokens and no stream, and known to be wrong by factors when requests of different kinds share a GPU:
on an H200 it charged an 8B model +82 % or -67 % in simulated mixes. Right when one request runs at a time.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from energyd.daemon.records import Service, Window

from . import Overlap


class TimeShare:
    """Share by time in flight, slice by slice."""

    name = "time"
    coefficients_version: int | None = None

    def weights(
        self,
        window: Window,  # noqa: ARG002 - part of the Policy interface
        services: Sequence[Service],  # noqa: ARG002 - the same
        overlap: Overlap,
        active_uj: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Σ over slices of active energy × own time in flight / everyone's; plain time if no slice is active."""
        present = overlap.sum(axis=1)
        share = np.divide(overlap, present[:, None], out=np.zeros_like(overlap), where=present[:, None] > 0)
        weights: NDArray[np.float64] = np.maximum(active_uj, 0.0) @ share
        return weights if weights.any() else overlap.sum(axis=0)

    def predict_uj(self, window: Window, services: Sequence[Service]) -> list[int] | None:  # noqa: ARG002
        """No coefficients, no prediction: an outage stays unattributed."""
        return None

    def learn(self, window: Window, services: Sequence[Service], active_uj: int) -> None:
        """Nothing to learn."""
