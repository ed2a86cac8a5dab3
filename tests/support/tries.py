"""A measurement on this machine's own clock, of which the least counts."""

from __future__ import annotations

import time
from collections.abc import Callable

_PATIENCE_S, _LEAST_TRIES = 60.0, 3


def least_of(measure: Callable[[], float], *, enough: float) -> float:
    """The least of what ``measure`` returns until one is at most ``enough``, or three tries and a minute are over.

    Another process that holds the processor can only lengthen what is measured. So the least of several tries is the
    nearest to what the code takes by itself, and how often it has to be tried depends on how busy the machine is. Use
    it where the machine's own clock is what the test is about; a virtual clock (``virtual_time``) needs no tries.
    """
    end_s, tries = time.monotonic() + _PATIENCE_S, 1
    least = measure()
    while least > enough and (tries < _LEAST_TRIES or time.monotonic() < end_s):
        least, tries = min(least, measure()), tries + 1
    return least
