"""What this device does by itself: how long the model takes on it, and calls that run on it as a whole."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from torchsurgeon.adapting import Decision, Quantity, SlowdownEstimator
from torchsurgeon.planning import Row
from torchsurgeon.profiling import LayerProfile
from torchsurgeon.runtime import bits
from torchsurgeon.runtime.choice import Way
from torchsurgeon.runtime.failure import Failure
from torchsurgeon.runtime.inference import Inference
from torchsurgeon.runtime.ledger import Ledger
from torchsurgeon.runtime.parts import Parts, Run
from torchsurgeon.runtime.work import ModelCall, Work
from torchsurgeon.tracing.gradients import plain_example

_TIMED_RUNS = 3


def settle(values: Any) -> None:
    """Wait until CUDA devices have computed tensors, so that a clock that is read next says what computing them took.

    Args:
        values: tensors, in tuples, lists, dicts and what else PyTorch flattens.
    """
    if torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
        for device in {leaf.device for leaf in tree_leaves(values) if getattr(leaf, "is_cuda", False)}:
            torch.cuda.current_stream(device).synchronize()


class DeviceTimes:
    """Predicted times of the model's parts on this device, from its profile or from runs of ``example``. Thread-safe.

    All times are for a call of the example's size; for a larger call, multiply by its scale.
    """

    def __init__(
        self, parts: Parts, example: tuple[tuple[Any, ...], Mapping[str, Any]], profiles: Sequence[LayerProfile]
    ) -> None:
        self.example, self.profiles = plain_example(example), tuple(profiles)
        self._parts = parts
        self._timed: dict[tuple[object, str], tuple[float, float]] = {}
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """Replace the lock, which a thread of the parent may hold, and forget how slow the device was."""
        self._slowdown = SlowdownEstimator()

    def learn(self, profile: LayerProfile) -> None:
        """Predict by another backend, too, from now on. What was seen of the old predictions says nothing of these."""
        self.profiles = (*self.profiles, profile)
        self._slowdown = SlowdownEstimator()

    def forget(self) -> None:
        """Forget measured times: the model's tensors have another type or another device now."""
        self._timed.clear()

    def slowdown(self) -> Quantity:
        """Return by what factor the device is slower now than predicted."""
        return self._slowdown.estimate()

    def built(self, way: Way) -> bool:
        """Return whether a way's head runs by the backend that it is predicted for, and not by another until then."""
        return self._parts.ready(way.point, way.student)

    def backend(self, way: Way) -> str:
        """Return what runs the head of a way, as ``Inference.backend`` says it."""
        return self._parts.backend_of(way.point, way.student)

    def record_duration(self, seconds: float, predicted_s: float) -> None:
        """Update the slow-down from measured against predicted seconds (predicted for a slow-down of 1)."""
        self._slowdown.observe(seconds, predicted_s)

    @property
    def profile(self) -> LayerProfile | None:
        """What the layers take here, by the first backend of which that is known; None until it is known of one."""
        return self.profiles[0] if self.profiles else None

    @property
    def usable(self) -> tuple[LayerProfile, ...]:
        """The profiles of the backends that run parts here; all of them until one of these is known."""
        names = {backend.name for backend in self._parts.backends}
        if self._parts.auto is not None or not names:
            names.add("eager")
        return tuple(profile for profile in self.profiles if profile.backend in names) or self.profiles

    @property
    def whole_s(self) -> float | None:
        """Seconds of the whole model at a slow-down of 1; None until they are known."""
        if self.profiles:
            return min(profile.total_s for profile in self.usable)
        # Head and tail add up to about the same at every cut.
        known = tuple(self._timed.items())
        # Behind a student, the device runs the whole model, so its tail is all of it.
        return next((tail_s if student else head_s + tail_s for (_, student), (head_s, tail_s) in known), None)

    def expected_s(self, way: Way) -> tuple[float, float]:
        """Return the seconds of head and tail at the present slow-down; both are run and timed if they are unknown."""
        slowdown = self.slowdown().value
        head_s, tail_s = self._unhindered_s(way)
        return head_s * slowdown, tail_s * slowdown

    def known_tail_s(self, way: Way) -> float | None:
        """Return the seconds of the tail at the present slow-down; None if they are unknown."""
        known = way.row is not None or _key(way) in self._timed
        return self.expected_s(way)[1] if known else None

    def record_tail(self, way: Way, scale: float, seconds: float) -> None:
        """Update the slow-down from a tail that ran on this device for a call of ``scale`` times the example's size.

        Where the whole model lies behind the cut, tails are the only evidence of how fast the device is. Without it, a
        call with a deadline would always start its tail at once.
        """
        if way.row is not None or _key(way) in self._timed:
            self.record_duration(seconds, self._unhindered_s(way)[1] * scale)

    def _unhindered_s(self, way: Way) -> tuple[float, float]:
        """Return the seconds of head and tail at a slow-down of 1."""
        if way.whole and self.whole_s is not None:
            return self.whole_s, 0.0
        if way.row is not None and self.profile is not None:
            done_s = 0.0 if way.student is not None else way.row.head_s
            return way.row.head_s, max((self.whole_s or 0.0) - done_s, 0.0)
        timed = self._timed.get(_key(way))
        if timed is None:
            timed = self._timed[_key(way)] = self._time(way)
        return timed

    def _time(self, way: Way) -> tuple[float, float]:
        """Run head and tail on the example and return the medians of their seconds."""
        args, kwargs = self.example
        work = ModelCall(self._parts, args, kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return self._timed_runs(way, work)

    def _timed_runs(self, way: Way, work: Work) -> tuple[float, float]:
        times = []
        for _ in range(1 + _TIMED_RUNS):
            begin_s = time.perf_counter()
            if way.whole:
                settle(work.whole()())
                headed_s = time.perf_counter()
            else:
                boundary = work.head(way.point, way.student)()
                settle(boundary)
                headed_s = time.perf_counter()
                tail, tensors = work.tail(tuple(spec.name for spec in way.point.tensors)), boundary
                if way.student is not None:
                    # Behind a student, the device runs the whole model itself.
                    tail, tensors = work.anew()
                settle(tail(tensors))
            times.append((headed_s - begin_s, time.perf_counter() - headed_s))
        # The first run warms caches and allocates, so it does not count.
        heads, tails = zip(*times[1:], strict=True)
        return statistics.median(heads), statistics.median(tails)


def _key(way: Way) -> tuple[object, str]:
    return way.point.place, "" if way.student is None else way.student.name


class DeviceRunner:
    """Runs whole calls on this device, and keeps their account. Thread-safe.

    Args:
        times: how long the model takes on this device.
        ledger: where the calls are recorded.
        whole: the way that runs all layers on the device.
        rounded_because: as in ``Options``.
    """

    def __init__(self, times: DeviceTimes, ledger: Ledger, whole: Way, rounded_because: tuple[str, ...]) -> None:
        self._times, self._ledger, self._whole = times, ledger, whole
        self._bits, self._because = bits.verdict(rounded_because)

    def run(
        self,
        work: Work,
        begun_s: float,
        why: Failure | None,
        decision: Decision[Row] | None = None,
        uncut: Run | None = None,
    ) -> Any:
        """Return the result of a call that runs on this device as a whole.

        Args:
            work: the call.
            begun_s: when it began (``time.perf_counter``).
            why: why it could not be split as planned; None where running it here was the plan.
            decision: what the choice of the cut was made on, if it was made.
            uncut: calls the model itself, which has changed since it was traced; None to run what was traced.
        """
        run = work.whole() if uncut is None else uncut
        decided_s = time.perf_counter()
        result = run()
        settle(result)
        end_s = time.perf_counter()
        known_s = self._times.whole_s
        # Until its backend has built it, the model runs slower than predicted, which says nothing of the device.
        if known_s is not None and uncut is None and work.whole_model and self._times.built(self._whole):
            self._times.record_duration(end_s - decided_s, known_s * work.scale())
        total_s = end_s - begun_s
        inference = functools.partial(
            Inference,
            partition=self._whole.point,
            total_s=total_s,
            decide_s=decided_s - begun_s,
            head_s=end_s - decided_s,
            degraded=None if why is None else str(why),
            decision=decision,
            bits=self._bits,
            inexact_because=self._because,
            backend="eager" if uncut is not None else self._times.backend(self._whole),
        )
        kind = None if why is None else why.kind
        self._ledger.record(self._whole.name, inference, kind, bits=self._bits, total_s=total_s)
        return result
