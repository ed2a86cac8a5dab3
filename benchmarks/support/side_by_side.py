"""Ways to do one thing, timed in turns, so that whatever this machine does meanwhile meets all of them."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence


def in_turns(ways: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Return the seconds of every way in every round; each round times all once, in a new random order."""
    for way in ways.values():
        for _ in range(warmup):
            way()
    taken: dict[str, list[float]] = {name: [] for name in ways}
    order, shuffle = list(ways), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            begin = time.perf_counter()
            ways[name]()
            taken[name].append(time.perf_counter() - begin)
    return taken


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles."""
    low, middle, high = statistics.quantiles(seconds, n=4)
    return {"median_s": middle, "q1_s": low, "q3_s": high}


def text(row: Mapping[str, float], unit: str = "ms") -> str:
    """Return what ``spread()`` found, in ``ms`` or ``µs``."""
    middle, low, high = (row[key] * {"ms": 1e3, "µs": 1e6}[unit] for key in ("median_s", "q1_s", "q3_s"))
    digits = 2 if unit == "ms" else 0
    return f"{middle:9.{digits}f} {unit} [{low:7.{digits}f} … {high:7.{digits}f}]"


def median_ratio(ones: Sequence[float], others: Sequence[float]) -> float:
    """Return the median of the ratios round by round."""
    return statistics.median(one / other for one, other in zip(ones, others, strict=True))
