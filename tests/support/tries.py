"""A measurement on this machine's own clock, of which the least counts."""

from __future__ import annotations

import time
from collections.abc import Callable

_PATIENCE_S = 60.0


def least_of(measure_s: Callable[[], float], *, enough: float) -> float:
    """The least of what ``measure_s`` returns until one is at most ``enough``, or a minute has passed.

    Another process that holds the processor can only lengthen what is measured. So the least of several tries is the
    nearest to what the code takes by itself, and how often it has to be tried depends on how busy the machine is. Use
    it where the machine's own clock is what the test is about; a virtual clock (``virtual_time``) needs no tries.
    """
    end_s = time.monotonic() + _PATIENCE_S
    least_s = measure_s()
    while least_s > enough and time.monotonic() < end_s:
        least_s = min(least_s, measure_s())
    return least_s
