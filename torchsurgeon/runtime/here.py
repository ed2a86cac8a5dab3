"""How long the model takes on this device, as slow as it is at the moment."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

from torchsurgeon.adapting import Quantity, SlowdownEstimator
from torchsurgeon.profiling import LayerProfile
from torchsurgeon.runtime.choice import Way
from torchsurgeon.runtime.parts import Parts
from torchsurgeon.runtime.work import Inference

_TIMED_RUNS = 3


class Here:
    """Predicted times of the model's parts on this device, from its profile or from runs of ``example``. Thread-safe.

    All are for a call like the example; who calls with a larger one multiplies.
    """

    def __init__(
        self, parts: Parts, example: tuple[tuple[Any, ...], Mapping[str, Any]], profile: LayerProfile | None
    ) -> None:
        self.example, self.profile = example, profile
        self._parts = parts
        self._timed: dict[int, tuple[float, float]] = {}
        self.start_anew()

    def start_anew(self) -> None:
        """Forget the lock, which a thread that a fork left behind may hold, and how slow the parent's device was."""
        self._slowdown = SlowdownEstimator()

    def forget(self) -> None:
        """The model's tensors have changed their type or place."""
        self._timed.clear()

    def slowdown(self) -> Quantity:
        """How many times as long as predicted it takes."""
        return self._slowdown.estimate()

    def took(self, seconds: float, predicted_s: float) -> None:
        """Take in how long something took that was predicted, at slow-down 1, to take so long."""
        self._slowdown.observe(seconds, predicted_s)

    @property
    def whole_s(self) -> float | None:
        """What the whole model takes at slow-down 1; None until that is known."""
        if self.profile is not None:
            return self.profile.total_s
        # Head and tail of any cut come to the same.
        return next((head_s + tail_s for head_s, tail_s in tuple(self._timed.values())), None)

    def takes_s(self, way: Way) -> tuple[float, float]:
        """What head and tail take as slow as the device is now; both are run where nothing has told."""
        slowdown = self.slowdown().value
        head_s, tail_s = self._unhindered_s(way)
        return head_s * slowdown, tail_s * slowdown

    def known_tail_s(self, way: Way) -> float | None:
        """What the tail takes as slow as the device is now; None where nothing has told."""
        known = way.row is not None or way.point.index in self._timed
        return self.takes_s(way)[1] if known else None

    def tail_took(self, way: Way, scale: float, seconds: float) -> None:
        """Take in how long the tail took. Where all of the model is behind the cut, nothing else tells how surely a
        tail will be in time, and one that is not sure is always started at once."""
        if way.row is not None or way.point.index in self._timed:
            self.took(seconds, self._unhindered_s(way)[1] * scale)

    def _unhindered_s(self, way: Way) -> tuple[float, float]:
        if way.whole and self.whole_s is not None:
            return self.whole_s, 0.0
        if way.row is not None and self.profile is not None:
            return way.row.head_s, max(self.profile.total_s - way.row.head_s, 0.0)
        timed = self._timed.get(way.point.index)
        if timed is None:
            timed = self._timed[way.point.index] = self._time(way)
        return timed

    def _time(self, way: Way) -> tuple[float, float]:
        """Run head and tail on the example and return the medians of their seconds."""
        args, kwargs = self.example
        work = Inference(self._parts, args, kwargs)
        times = []
        for _ in range(1 + _TIMED_RUNS):
            begin_s = time.perf_counter()
            if way.whole:
                work.whole()()
                headed_s = time.perf_counter()
            else:
                boundary = work.head(way.point)()
                headed_s = time.perf_counter()
                work.tail(tuple(spec.name for spec in way.point.tensors))(boundary)
            times.append((headed_s - begin_s, time.perf_counter() - headed_s))
        heads, tails = zip(*times[1:], strict=True)
        return statistics.median(heads), statistics.median(tails)
