"""Attribution: whose joules are they? Pure: windows and services in, settlements out; one file a policy.

`accounts.divide` splits a window among the accounts; a `Policy` says only in what proportion the queries share the part
that queries caused. The interface carries what a learning policy needs: features of each query (`Service`: times of
streamed chunks, tokens), a prediction for outages, a hook to learn from what was settled, and the version of the
coefficients that each settled row names.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from energyd.daemon.records import Service, Window

Overlap = NDArray[np.float64]
"""Shape (slices, services): ns for which the service was in flight during the slice (see `accounts.overlaps`)."""


class Policy(Protocol):
    """How queries share the active energy of a window."""

    @property
    def name(self) -> str:
        """Stored with every settled window."""
        ...

    @property
    def coefficients_version(self) -> int | None:
        """Version of the learned coefficients in use; None for a policy without any."""
        ...

    def weights(
        self, window: Window, services: Sequence[Service], overlap: Overlap, active_uj: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Weights ≥ 0, one a service, for the active energy; `active_uj`, one a slice: energy above the idle floor."""
        ...

    def predict_uj(self, window: Window, services: Sequence[Service]) -> list[int] | None:
        """Most that each service can have caused in a window without shape (an outage); None: no prediction, charge none."""
        ...

    def learn(self, window: Window, services: Sequence[Service], active_uj: int) -> None:
        """Called once for each settled window of kind `metered`."""
        ...


def policy(name: str) -> Policy:
    """The policy called `name`; raises KeyError for an unknown one (see POLICIES)."""
    return POLICIES[name]()


from .time import TimeShare  # noqa: E402 - the policies implement the Protocol above
from .tokens import TokenShare  # noqa: E402

POLICIES = {"time": TimeShare, "tokens": TokenShare}
