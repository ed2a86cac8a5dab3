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


def median_ratio(ones: Sequence[float], others: Sequence[float]) -> float:
    """Return the median of the ratios round by round."""
    return statistics.median(one / other for one, other in zip(ones, others, strict=True))
