"""What a stream of inferences asks of the servers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torchsurgeon.errors import SimulationError, is_finite, short


@dataclass(frozen=True)
class Demand:
    """The kinds of inferences in a stream: each one's share, and its mean seconds on a server.

    Attributes:
        shares: of all inferences, the share of each kind; they add up to 1.
        service_s: each kind's mean seconds of computing on a server. A kind with 0 s runs on the device as a whole, and
            its inferences never reach a server.

    Raises:
        SimulationError: shares or seconds are negative or not finite, or the shares do not add up to 1.
    """

    shares: tuple[float, ...]
    service_s: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.shares or len(self.shares) != len(self.service_s):
            raise SimulationError(
                "a demand needs one share and one service time for each kind of inference; "
                f"got {len(self.shares)} shares and {len(self.service_s)} service times"
            )
        for what, values in (("share", self.shares), ("service time", self.service_s)):
            for value in values:
                if not (is_finite(value) and value >= 0):
                    raise SimulationError(f"a {what} must be zero or a positive number; got {short(value)}")
        if abs(sum(self.shares) - 1) > 1e-9:
            raise SimulationError(f"the shares of all kinds must add up to 1; got {sum(self.shares)}")

    @staticmethod
    def of(service_s: float) -> Demand:
        """Return the demand of one kind of inference with ``service_s`` mean seconds on a server."""
        return Demand((1.0,), (service_s,))

    @staticmethod
    def equal(service_s: Sequence[float]) -> Demand:
        """Return the demand of several kinds in equal shares.

        Args:
            service_s: each kind's mean seconds on a server.
        """
        count = max(len(service_s), 1)
        return Demand((1 / count,) * len(service_s), tuple(service_s))

    @property
    def mean_s(self) -> float:
        """A server's seconds per inference, counting those that never reach one."""
        return float(np.dot(self.shares, self.service_s))

    @property
    def reaching(self) -> float:
        """The share of inferences that reach a server."""
        return sum(share for share, seconds in zip(self.shares, self.service_s, strict=True) if seconds > 0)

    def kinds(self, uniform: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the mean service seconds of inferences whose kinds are drawn by uniform numbers from 0 to 1.

        Args:
            uniform: shape (inferences,).
        """
        edges = np.cumsum(self.shares)[:-1]
        return np.asarray(self.service_s, dtype=np.float64)[np.searchsorted(edges, uniform, side="right")]
