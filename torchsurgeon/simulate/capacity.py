"""The highest rate of inferences at which a percentile of the datacenter's times stays within a limit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from torchsurgeon.errors import SimulationError, is_finite, short
from torchsurgeon.simulate.demand import Demand
from torchsurgeon.simulate.estimate import Estimate
from torchsurgeon.simulate.queue import Draws, check_percentile, check_size, settled, waits_s
from torchsurgeon.simulate.shape import EXPONENTIAL, Shape

Counted = Literal["response", "wait"]
_PRECISION = 5e-4
"""The search ends when the highest rate is known to this share of itself."""


@dataclass(frozen=True, eq=False)
class Capacity:
    """The highest rate that a datacenter sustains.

    Attributes:
        rates_per_s: the highest rate of inferences in each replication, shape (replications,); infinite where no
            inference reaches a server. None is more than all servers can compute.
        limit_s: the limit that the percentile keeps.
        percentile: the percentile.
        reaching: the share of inferences that reach a server.
    """

    rates_per_s: NDArray[np.float64]
    limit_s: float
    percentile: float
    reaching: float

    @property
    def rate_per_s(self) -> Estimate:
        """The highest rate of inferences per second."""
        return Estimate.of(self.rates_per_s)


def highest_rate(
    demand: Demand,
    servers: int,
    limit_s: float,
    *,
    percentile: float = 99.0,
    counted: Counted = "response",
    arrivals: Shape = EXPONENTIAL,
    service: Shape = EXPONENTIAL,
    queries: int = 40_000,
    replications: int = 25,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> Capacity:
    """Return the highest rate of inferences at which a percentile of the times at the servers keeps a limit.

    The times are those of the queries that reach a server. A higher rate lets the same queries arrive closer together,
    so none waits less, and bisection finds the highest rate of each replication. It is at most the rate at which all
    servers are always busy: above it queries wait ever longer, even where so few are simulated that the limit still
    holds.

    Args:
        demand: what the inferences ask of the servers.
        servers: how many servers there are, from 1 to 10,000; they have one queue and answer in the order of arrival.
        limit_s: the most seconds that the percentile may be.
        percentile: above 0 and below 100.
        counted: ``"response"`` for the time from arrival to the end of service, ``"wait"`` for the time before service
            begins. Where the kinds of inferences that reach a server change from one demand to the other, only waits
            can be compared: without the quick kinds a percentile of responses is higher at the same rate, although
            every query is answered at least as soon.
        arrivals: the shape of the gaps between inferences.
        service: the shape of service times around each kind's mean.
        queries: how many reach the servers in each replication, from 1,000 on, and 20 or more for each server. The
            first quarter is left out.
        replications: how many independent replications there are, from 2 on.
        seed: the seed of the random numbers; capacities of one seed can be compared in pairs by ``gain()``.
        progress: called after each simulated rate.

    Returns:
        The highest rates; infinite where no inference reaches a server.

    Raises:
        SimulationError: an argument is not valid, or queries take longer than the limit even without waiting.
    """
    check_percentile(percentile)
    if counted not in ("response", "wait"):
        raise SimulationError(f'what is counted must be "response" or "wait"; got {short(counted)}')
    if not (is_finite(limit_s) and limit_s > 0):
        raise SimulationError(f"the limit must be a positive number of seconds; got {short(limit_s)}")
    if demand.reaching == 0:
        check_size(Demand.of(1.0), servers, queries, replications)
        return Capacity(np.full(replications, math.inf), limit_s, percentile, 0.0)
    check_size(demand, servers, queries, replications)
    draws = Draws.draw(demand, arrivals, service, queries, replications, seed)
    served_s = draws.service_s if counted == "response" else np.zeros_like(draws.service_s)
    alone_s = np.percentile(settled(served_s), percentile, axis=0)
    if alone_s.mean() > limit_s:
        raise SimulationError(
            f"the limit must be at least {alone_s.mean():.4g} s, since {percentile:g} % of the queries take up to that "
            f"without waiting; got {limit_s:g} s"
        )
    always_busy = servers / demand.mean_s
    # Half as much again, since a finite replication may draw short services. The rate that it then sustains is no rate
    # that the servers do.
    high = np.full(replications, 1.5 * always_busy)
    low = np.zeros(replications)
    while (high - low > _PRECISION * high).any():
        rate = (low + high) / 2
        times_s = settled(waits_s(draws, rate, servers) + served_s)
        within = np.percentile(times_s, percentile, axis=0) <= limit_s
        low, high = np.where(within, rate, low), np.where(within, high, rate)
        # Where even waiting for nothing takes too long, no rate is low enough.
        high = np.where(alone_s > limit_s, low, high)
        progress()
    return Capacity(np.minimum((low + high) / 2, always_busy), limit_s, percentile, demand.reaching)


def gain(ours: Capacity, baseline: Capacity) -> Estimate:
    """Return how many times as many inferences ``ours`` sustains as ``baseline``, compared replication by replication.

    Args:
        ours: a capacity.
        baseline: another one, with as many replications and the same seed.

    Raises:
        SimulationError: they have different numbers of replications, or the baseline sustains nothing.
    """
    if len(ours.rates_per_s) != len(baseline.rates_per_s):
        raise SimulationError(
            "two capacities must have the same number of replications to be compared in pairs; "
            f"got {len(ours.rates_per_s)} and {len(baseline.rates_per_s)}"
        )
    if not (np.isfinite(baseline.rates_per_s).all() and (baseline.rates_per_s > 0).all()):
        raise SimulationError(
            "a baseline must sustain some rate, and not any, in every replication; "
            f"got {short(list(baseline.rates_per_s), 100)}"
        )
    return Estimate.of(ours.rates_per_s / baseline.rates_per_s)
