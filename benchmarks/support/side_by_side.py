"""Rivals timed in turns, so that whatever the machine does meanwhile meets all of them.

pytest-benchmark times one function after the other. On a machine with other things to do, or one that grows warm, the
second is then measured under other conditions than the first. ``compare()`` times all rivals of a group once a round,
in a new random order each round, and gives each rival's times to pytest-benchmark as a benchmark of its own. So its
table, its JSON, ``--benchmark-save`` and ``--benchmark-compare`` work as they do for any other benchmark.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence

from pytest_benchmark.fixture import BenchmarkFixture
from pytest_benchmark.stats import Metadata

Rivals = Mapping[str, Callable[[], object]]
SideBySide = Callable[[Rivals], dict[str, Metadata]]

_LONG_S = 0.5
"""A first call of that length is warm-up enough."""


def compare(benchmark: BenchmarkFixture, rivals: Rivals) -> dict[str, Metadata]:
    """Time ``rivals`` in turns and return what pytest-benchmark keeps of each; empty under ``--benchmark-disable``.

    The first of ``rivals`` is the baseline: ``extra_info`` of each has the ratios of its times to the baseline's of the
    same round, and the differences, as median and quartiles. The options and marks of pytest-benchmark hold: a turn
    repeats a rival until ``min_time`` has passed, and rounds end after ``max_time`` for each rival, though not before
    there are ``min_rounds`` of them.
    """
    # pytest-benchmark has no public way to add times that were taken elsewhere; this is the only place that uses its
    # private one.
    benchmark._mode = "side_by_side"
    if benchmark.disabled:
        for rival in rivals.values():
            rival()
        return {}
    try:
        found = _rounds(benchmark, rivals)
    except Exception:
        benchmark.has_error = True
        raise
    base, *_ = found.values()
    for stats in found.values():
        pairs = list(zip(stats.stats.data, base.stats.data, strict=True))
        stats.extra_info = {
            "baseline": base.name,
            "ratio": spread([own / other for own, other in pairs]),
            "added_s": spread([own - other for own, other in pairs]),
        }
    return found


def _rounds(benchmark: BenchmarkFixture, rivals: Rivals) -> dict[str, Metadata]:
    turns = []
    for name, rival in rivals.items():
        run = benchmark._make_runner(rival, (), {})
        iterations = _iterations(run, benchmark._min_time)
        stats = benchmark._make_stats(iterations)
        stats.name, stats.fullname = name, f"{benchmark.fullname} {name}"
        if benchmark.param is not None:
            stats.group = f"{benchmark.group}, {benchmark.param}"
        turns.append((stats, run, range(iterations)))
    order, shuffle = list(turns), random.Random(0).shuffle
    left_s, rounds = benchmark._max_time * len(turns), 0
    while rounds < benchmark._min_rounds or left_s > 0:
        shuffle(order)
        for stats, run, loops in order:
            taken_s = run(loops)
            stats.update(taken_s)
            left_s -= taken_s
        rounds += 1
    return {stats.name: stats for stats, _, _ in turns}


def _iterations(run: Callable[[range], float], min_time_s: float) -> int:
    """Return how many calls make a turn of ``min_time_s``; the calls it makes to find out are the warm-up."""
    fastest_s = run(range(1))
    if fastest_s < _LONG_S:
        # The first call may have connected or traced something. Of the others one slow one must not make turns short,
        # as it would by pytest-benchmark's own calibration.
        fastest_s = min(run(range(1)) for _ in range(3))
    return math.ceil(min_time_s / max(fastest_s, 1e-7))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": middle, "q1": low, "q3": high}


def median_ratio(ones: Sequence[float], others: Sequence[float]) -> float:
    """Return the median of the ratios round by round."""
    return statistics.median(one / other for one, other in zip(ones, others, strict=True))


def ratio_lines(benchmarks: Sequence[Metadata]) -> list[str]:
    """Return a line for each group with its baseline, and one for each other rival with its ratio to that."""
    lines = []
    for stats in benchmarks:
        if stats.name == stats.extra_info["baseline"]:
            lines.append(f"{stats.group}: × {stats.name}")
        else:
            ratio = stats.extra_info["ratio"]
            lines.append(f"  {ratio['median']:9.3f}  ({ratio['q1']:.3f} … {ratio['q3']:.3f})  {stats.name}")
    return lines
