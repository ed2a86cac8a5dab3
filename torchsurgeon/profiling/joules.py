"""Measure the energy of each layer, in joules, while it runs again and again.

Meters read power every 5 to 100 milliseconds, and layers take micro- to milliseconds. So each layer is repeated, on the
inputs it has in the model, for longer than two readings take. That is done five times, which gives a mean and its
confidence interval. The power of the idle machine is subtracted.
"""

from __future__ import annotations

import copy
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from torchsurgeon.cutting.segment import Segment
from torchsurgeon.meters import EnergyEstimate, EnergyMeter, EnergySampler
from torchsurgeon.profiling.energy import Array, LayerEnergy
from torchsurgeon.tracing.step import Environment, Step

# How many times the repetitions of a layer are metered.
_SPANS = 5
# EnergyTrace.estimate counts spans as independent when they start at least two of the meter's periods apart.
_PERIODS = 2.5
_IDLE_S = 1.0

# Start and end, in nanoseconds of the host's monotonic clock.
Interval = tuple[int, int]


def layer_energy(
    whole: Segment,
    tensors: Sequence[torch.Tensor],
    ranks: Mapping[int, int],
    layer_s: Array,
    whole_s: float,
    meter: EnergyMeter,
    synchronize: Callable[[], None],
    tick: Callable[[], None],
) -> LayerEnergy | None:
    """Meter every layer and the whole model.

    Args:
        whole: the whole model.
        tensors: its inputs.
        ranks: by step index, the layer that the step is.
        layer_s: about how many seconds each layer takes, shape (layers,).
        whole_s: about how many seconds the whole model takes.
        meter: the energy meter.
        synchronize: waits until the device has done all that it was given.
        tick: is called after each layer and after the whole model.

    Returns:
        The energies; None where the meter gives no reading.
    """
    with EnergySampler(meter) as sampler:
        threading.Event().wait(max(_IDLE_S, 10 * meter.period_s))
    idle = sampler.trace()
    idle_power_w = idle.mean_power_w()
    if idle_power_w is None:
        return None
    # A slow meter gives readings less often than it was asked to, so the period it showed counts.
    span_s = _PERIODS * max(meter.period_s, idle.period_s)
    layers = _Repeater(ranks, layer_s, span_s, synchronize, tick)
    with EnergySampler(meter) as sampler:
        count = _count(span_s, whole_s)
        spans = _spans(lambda: whole(*tensors), count, synchronize)
        tick()
        whole.watched(tensors, layers)
        threading.Event().wait(2 * meter.period_s)
    trace = sampler.trace()
    known = {rank: trace.estimate(found, idle_power_w) for rank, found in layers.spans.items()}
    rows = [_per_call(known.get(rank), layers.counts.get(rank, 1)) for rank in range(len(layer_s))]
    if all(math.isnan(row[0]) for row in rows):
        return None
    return LayerEnergy(
        f"{meter.name} {meter.scope}",
        idle_power_w,
        np.array([row[0] for row in rows]),
        np.array([row[1:] for row in rows]),
        _per_call(trace.estimate(spans, idle_power_w), count),
    )


class _Repeater:
    """Before each layer of a run, repeats it many times, on copies of its inputs, since it may overwrite them."""

    def __init__(
        self,
        ranks: Mapping[int, int],
        layer_s: Array,
        span_s: float,
        synchronize: Callable[[], None],
        tick: Callable[[], None],
    ) -> None:
        self._ranks, self._layer_s, self._span_s = ranks, layer_s, span_s
        self._synchronize, self._tick = synchronize, tick
        self.spans: dict[int, list[Interval]] = {}
        self.counts: dict[int, int] = {}

    def before(self, step: Step, environment: Environment) -> None:
        rank = self._ranks.get(step.index)
        if rank is None:
            return
        scratch: Environment = [None] * len(environment)
        for index, value in copy.deepcopy({used: environment[used] for used in step.reads}).items():
            scratch[index] = value
        call = step.compiled()
        self.counts[rank] = _count(self._span_s, float(self._layer_s[rank]))
        self.spans[rank] = _spans(lambda: call(scratch), self.counts[rank], self._synchronize)
        self._tick()

    def after(self, step: Step, environment: Environment, token: None) -> None:
        pass


def _count(span_s: float, one_s: float) -> int:
    """Return how many calls of ``one_s`` seconds last ``span_s`` seconds."""
    return max(1, math.ceil(span_s / max(one_s, 1e-7)))


def _spans(run: Callable[[], Any], count: int, synchronize: Callable[[], None]) -> list[Interval]:
    """Call ``run`` count times, five times over, and return when each of the five began and ended."""
    synchronize()
    spans = []
    for _ in range(_SPANS):
        start_ns = time.perf_counter_ns()
        for _ in range(count):
            run()
        synchronize()
        spans.append((start_ns, time.perf_counter_ns()))
    return spans


def _per_call(estimate: EnergyEstimate | None, count: int) -> tuple[float, float, float]:
    """Return mean, low and high joules of one of ``count`` calls; NaN where they are unknown."""
    if estimate is None:
        return math.nan, math.nan, math.nan
    low_j, high_j = estimate.interval_j or (math.nan, math.nan)
    return estimate.mean_j / count, low_j / count, high_j / count
