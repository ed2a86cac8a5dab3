"""Check whether a device is as fast as it was a moment ago, and let it rest when it is not."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from torchsurgeon.prediction.damage import numbers

# A probe this much slower than the quickest quarter of probes means that the device throttles or is busy.
_THROTTLED, _LONGEST_PAUSE_S = 1.3, 10.0


@dataclasses.dataclass(frozen=True)
class _Throttled:
    """How often and how long a device rested, and how many times its usual time the slowest probe took."""

    pauses: int = 0
    paused_s: float = 0.0
    slowest: float = 1.0


class Pulse:
    """Times a small fixed piece of work (a beat) again and again, to see when the device throttles or is busy.

    Args:
        device: the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._left, self._right = (torch.rand(320, 320, device=device) for _ in range(2))
        self._beats: list[float] = []
        self._throttled = _Throttled()

    def resume(self, facts: Mapping[str, Any]) -> None:
        """Continue the counts of an interrupted calibration.

        Args:
            facts: its provenance.

        Raises:
            TypeError: a count was edited and is no number.
            ValueError: a count was edited and is out of range.
        """
        if "throttled" in facts:
            self._throttled = numbers(_Throttled, facts["throttled"], least=0.0)

    def wait(self, most_s: float) -> None:
        """Return once the device is about as fast as it has been, or has not recovered in ten seconds.

        Args:
            most_s: seconds after which to return in any case.
        """
        began = time.monotonic()
        for pause_s in itertools.accumulate(itertools.repeat(0.5), lambda a, b: a * 2):
            beat = min(self._beat() for _ in range(5))
            usual = float(np.quantile(self._beats[-100:], 0.25)) if len(self._beats) >= 8 else beat
            waited_s = time.monotonic() - began
            if beat <= _THROTTLED * usual or waited_s > min(_LONGEST_PAUSE_S, most_s):
                break
            so_far = self._throttled
            self._throttled = _Throttled(
                so_far.pauses + 1, so_far.paused_s + pause_s, max(so_far.slowest, beat / usual)
            )
            time.sleep(pause_s)
        self._beats.append(beat)

    def facts(self) -> dict[str, Any]:
        """Return the pauses, if any, for the provenance of a calibration."""
        found = self._throttled
        if not found.pauses:
            return {}
        rounded = dataclasses.replace(found, paused_s=round(found.paused_s, 1), slowest=round(found.slowest, 2))
        return {"throttled": dataclasses.asdict(rounded)}

    def _beat(self) -> float:
        begin = time.perf_counter()
        torch.mm(self._left, self._right)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - begin
