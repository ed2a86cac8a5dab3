"""What a load test found: latencies from the moments at which requests were due, and errors by kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchsurgeon import _json_file
from torchsurgeon.errors import LoadTestError

Array = NDArray[np.float64]

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
"""Those that tables and files name."""
_FORMAT = "torchsurgeon.load/1"


@dataclass(frozen=True, eq=False)
class KindResult:
    """What became of the requests of one kind.

    Attributes:
        model: the model's name on the server.
        cut: where the model was cut.
        codec: what its tensors were sent under.
        size_bytes: the length of a request's body.
        latencies_s: of the requests that were answered, from when each was due to its answer, in ascending order.
        queue_s: how long the server said that they waited there, in ascending order; empty where it does not say.
        compute_s: how long the server said that they ran, likewise.
        errors: how many requests were not answered, by kind.
    """

    model: str
    cut: str
    codec: str
    size_bytes: int
    latencies_s: Array
    queue_s: Array
    compute_s: Array
    errors: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """Return what a JSON file holds of it."""
        return {
            "model": self.model,
            "cut": self.cut,
            "codec": self.codec,
            "size_bytes": self.size_bytes,
            "answered": len(self.latencies_s),
            "latency_s": summary(self.latencies_s),
            "queue_s": summary(self.queue_s),
            "compute_s": summary(self.compute_s),
            "errors": dict(self.errors),
        }


@dataclass(frozen=True, eq=False)
class LoadRun:
    """A load test at one rate.

    Attributes:
        rate_per_s: how many requests were due per second, in the mean; None where each device sent its next request
            once it had its answer.
        seconds: for how long requests were due.
        lasted_s: from the first that was due to the last answer.
        kinds: what became of each kind of request.
        late_s: how much later than due this program got to each request, in ascending order; empty where none was due
            at a fixed moment. It is part of the latencies, and no fault of the server.
        reasons: an example of what the server or the system said, by kind of error.
    """

    rate_per_s: float | None
    seconds: float
    lasted_s: float
    kinds: tuple[KindResult, ...]
    late_s: Array
    reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def latencies_s(self) -> Array:
        """The latencies of all kinds, in ascending order."""
        return np.sort(np.concatenate([kind.latencies_s for kind in self.kinds]))

    @property
    def answered_per_s(self) -> float:
        """Answers per second."""
        return sum(len(kind.latencies_s) for kind in self.kinds) / max(self.seconds, self.lasted_s)

    @property
    def errors(self) -> Mapping[str, int]:
        """How many requests of any kind were not answered, by kind of error."""
        total: Counter[str] = Counter()
        for kind in self.kinds:
            total.update(kind.errors)
        return dict(total)

    @property
    def own_share(self) -> float:
        """How much of the 99th percentile of the latencies is at most this program's own lateness; 1 at most."""
        whole, own = self.latencies_s, self.late_s
        return min(1.0, quantile(own, 99) / quantile(whole, 99)) if len(whole) and len(own) else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return what a JSON file holds of it."""
        return {
            "rate_per_s": self.rate_per_s,
            "seconds": self.seconds,
            "lasted_s": self.lasted_s,
            "answered_per_s": self.answered_per_s,
            "latency_s": summary(self.latencies_s, curve=True),
            "late_s": summary(self.late_s),
            "errors": dict(self.errors),
            "reasons": dict(self.reasons),
            "kinds": [kind.to_json() for kind in self.kinds],
        }


@dataclass(frozen=True, eq=False)
class LoadReport:
    """Load tests of one server, at one rate after the other.

    Attributes:
        url: the server's URL.
        arrivals: how the gaps between requests spread, or ``"closed loop"``.
        devices: how many devices were emulated.
        runs: the tests, in their order.
    """

    url: str
    arrivals: str
    devices: int
    runs: Sequence[LoadRun]

    def to_json(self) -> dict[str, Any]:
        """Return what the JSON file holds."""
        return {
            "format": _FORMAT,
            "url": self.url,
            "arrivals": self.arrivals,
            "devices": self.devices,
            "runs": [run.to_json() for run in self.runs],
        }

    def save(self, path: str | Path) -> None:
        """Write the report to a JSON file.

        Args:
            path: the file.

        Raises:
            LoadTestError: the file cannot be written.
        """
        _json_file.write(path, self.to_json(), LoadTestError)


def quantile(ascending: Array, percent: float) -> float:
    """Return the smallest of the values that at least ``percent`` per cent do not exceed.

    Args:
        ascending: the values, in ascending order; at least one.
        percent: above 0, at most 100.
    """
    return float(np.quantile(ascending, percent / 100, method="inverted_cdf"))


def summary(ascending: Array, *, curve: bool = False) -> dict[str, Any] | None:
    """Return mean, percentiles and maximum of values; None for no values.

    Args:
        ascending: the values, in ascending order.
        curve: whether to add every whole percentile, as pairs of percent and value.
    """
    if not len(ascending):
        return None
    found: dict[str, Any] = {"mean": float(ascending.mean())}
    found |= {f"p{percent:g}": quantile(ascending, percent) for percent in PERCENTILES}
    found["max"] = float(ascending[-1])
    if curve:
        found["curve"] = [[percent, quantile(ascending, percent)] for percent in range(1, 101)]
    return found
