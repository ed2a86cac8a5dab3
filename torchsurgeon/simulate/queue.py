"""Servers that answer queries in the order of arrival, simulated in several independent replications at once.

Each replication is a datacenter of its own. All are followed side by side, so that a few numpy calls advance every
replication by one query. By the recursion of Kiefer and Wolfowitz (1955), a query starts at the server that is free
first. With a single server this is Lindley's recursion, which has a closed form without a loop.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torchsurgeon.errors import SimulationError, is_finite, is_whole, short
from torchsurgeon.simulate.demand import Demand
from torchsurgeon.simulate.estimate import Estimate
from torchsurgeon.simulate.shape import EXPONENTIAL, Shape

Array = NDArray[np.float64]
_WARM_UP = 0.25
"""The share of each replication's queries that is left out, since its servers begin empty."""
_FEW = 0.01
"""Where fewer inferences reach the servers than this share, their queries are drawn as a Poisson process. A thinned
stream tends to one (Rényi 1956), and drawing a hundred inferences for each query would take long."""
MOST_SERVERS = 10_000
"""More servers take too long to follow query by query."""
_QUERIES_PER_SERVER = 20
"""Fewer queries than so many for each server end before the servers, which begin empty, have filled."""
_MANY = 128
"""From so many servers on, a heap finds the one that is free first sooner than numpy finds the least of all."""


@dataclass(frozen=True, eq=False)
class Draws:
    """What is drawn once for all rates: when queries arrive and how long they are served.

    Attributes:
        arrivals: when each query arrives, in mean gaps between inferences, shape (queries, replications).
        service_s: how long each one is served, shape (queries, replications).
    """

    arrivals: Array
    service_s: Array

    @staticmethod
    def draw(demand: Demand, arrivals: Shape, service: Shape, queries: int, replications: int, seed: int) -> Draws:
        """Return the queries of ``demand`` that reach the servers.

        Draws of one seed are alike as far as they can be: the same inference has the same kind and the same luck in two
        demands, so that the two can be compared in pairs.

        Args:
            demand: what the inferences ask of the servers; some must reach them.
            arrivals: the shape of the gaps between inferences.
            service: the shape of service times around each kind's mean.
            queries: how many reach the servers in each replication.
            replications: how many replications there are.
            seed: the seed of the random numbers.
        """
        columns = [
            _draw_one(demand, arrivals, service, queries, sequence)
            for sequence in np.random.SeedSequence(seed).spawn(replications)
        ]
        at, seconds = zip(*columns, strict=True)
        return Draws(np.stack(at, axis=1), np.stack(seconds, axis=1))


def _draw_one(
    demand: Demand, arrivals: Shape, service: Shape, queries: int, sequence: np.random.SeedSequence
) -> tuple[Array, Array]:
    """Return when the queries of one replication arrive, in mean gaps, and how long they are served."""
    gaps, kinds, luck = (np.random.default_rng(child) for child in sequence.spawn(3))
    share = demand.reaching
    if share < _FEW:
        only = Demand.equal([1.0]) if share == 0 else _reaching_only(demand)
        at = np.cumsum(EXPONENTIAL.draw(gaps, queries)) / max(share, 1e-300)
        return at, only.kinds(kinds.random(queries)) * service.draw(luck, queries)
    # Six standard deviations more than the mean number of inferences that hold so many queries.
    everyone = min(demand.service_s) > 0
    count = queries if everyone else math.ceil((queries + 6 * math.sqrt(queries) + 20) / share)
    at = np.cumsum(arrivals.draw(gaps, count))
    mean_s = demand.kinds(kinds.random(count))
    times = service.draw(luck, count)
    kept = np.flatnonzero(mean_s)[:queries]
    return at[kept], mean_s[kept] * times[kept]


def _reaching_only(demand: Demand) -> Demand:
    pairs = [(share, s) for share, s in zip(demand.shares, demand.service_s, strict=True) if s > 0 and share > 0]
    total = sum(share for share, _ in pairs)
    return Demand(tuple(share / total for share, _ in pairs), tuple(s for _, s in pairs))


def waits_s(draws: Draws, rate_per_s: Array, servers: int) -> Array:
    """Return how long each query waits before a server begins with it, shape (queries, replications).

    Args:
        draws: the queries.
        rate_per_s: the rate of inferences in each replication, shape (replications,).
        servers: how many servers there are; they have one queue.
    """
    arrive_s = draws.arrivals / rate_per_s
    service_s = draws.service_s
    if servers == 1:
        # The work that is left when query n arrives is the largest sum of (service - gap) over the queries before it.
        steps = service_s[:-1] - np.diff(arrive_s, axis=0)
        level = np.concatenate([np.zeros((1, steps.shape[1])), np.cumsum(steps, axis=0)])
        return level - np.minimum.accumulate(level, axis=0)
    if servers >= _MANY:
        return _begins_s(arrive_s, service_s, servers) - arrive_s
    begin_s = np.empty_like(arrive_s)
    rows = np.arange(arrive_s.shape[1])
    free_s = np.zeros((len(rows), servers))
    for arriving, lasting, beginning in zip(arrive_s, service_s, begin_s, strict=True):
        first = free_s.argmin(axis=1)
        np.maximum(free_s[rows, first], arriving, out=beginning)
        free_s[rows, first] = beginning + lasting
    return begin_s - arrive_s


def _begins_s(arrive_s: Array, service_s: Array, servers: int) -> Array:
    """Return when a server begins with each query, one query after the other, shape (queries, replications)."""
    begin_s = np.empty_like(arrive_s)
    for column in range(arrive_s.shape[1]):
        free_s, begins = [0.0] * servers, []
        for arriving, lasting in zip(arrive_s[:, column].tolist(), service_s[:, column].tolist(), strict=True):
            begins.append(max(arriving, free_s[0]))
            heapq.heapreplace(free_s, begins[-1] + lasting)
        begin_s[:, column] = begins
    return begin_s


def settled(times_s: Array) -> Array:
    """Return the times of the queries after the warm-up, shape (queries, replications)."""
    return times_s[int(len(times_s) * _WARM_UP) :]


@dataclass(frozen=True, eq=False)
class QueueTimes:
    """How long queries took in a simulated datacenter.

    Attributes:
        rate_per_s: inferences per second, counting those that never reach a server.
        servers: how many servers there were.
        utilization: the share of the servers' time that is asked for; 1 or more is more than they have.
        waits_s: how long queries waited, after the warm-up, shape (queries, replications).
        responses_s: the same, with their service.
    """

    rate_per_s: float
    servers: int
    utilization: float
    waits_s: Array
    responses_s: Array

    @property
    def mean_wait_s(self) -> Estimate:
        """The mean wait, in seconds."""
        return Estimate.of(self.waits_s.mean(axis=0))

    @property
    def mean_response_s(self) -> Estimate:
        """The mean time from a query's arrival at the datacenter to the end of its service, in seconds."""
        return Estimate.of(self.responses_s.mean(axis=0))

    def percentile_s(self, percentile: float) -> Estimate:
        """Return a percentile of the time from a query's arrival to the end of its service, in seconds.

        Args:
            percentile: above 0 and below 100.

        Raises:
            SimulationError: it is not.
        """
        check_percentile(percentile)
        return Estimate.of(np.percentile(self.responses_s, percentile, axis=0))


def simulate_queue(
    demand: Demand,
    rate_per_s: float,
    servers: int,
    *,
    arrivals: Shape = EXPONENTIAL,
    service: Shape = EXPONENTIAL,
    queries: int = 40_000,
    replications: int = 25,
    seed: int = 0,
) -> QueueTimes:
    """Simulate servers with one queue, which answer in the order of arrival.

    With the web search shapes this is the datacenter of Neurosurgeon (Kang et al., ASPLOS 2017, section 6.4). Above a
    utilization of 1 times grow as long as the simulation runs.

    Args:
        demand: what the inferences ask of the servers.
        rate_per_s: inferences per second, counting those that never reach a server.
        servers: how many servers there are, from 1 to 10,000.
        arrivals: the shape of the gaps between inferences.
        service: the shape of service times around each kind's mean.
        queries: how many reach the servers in each replication, from 1,000 on, and 20 or more for each server. The
            first quarter is left out.
        replications: how many independent replications there are, from 2 on; the confidence intervals come from them.
        seed: the seed of the random numbers.

    Returns:
        How long the queries took.

    Raises:
        SimulationError: an argument is not valid, or no inference reaches a server.
    """
    check_size(demand, servers, queries, replications)
    if not (is_finite(rate_per_s) and rate_per_s > 0):
        raise SimulationError(f"the rate of inferences must be a positive number per second; got {short(rate_per_s)}")
    draws = Draws.draw(demand, arrivals, service, queries, replications, seed)
    waiting_s = waits_s(draws, np.full(replications, float(rate_per_s)), servers)
    utilization = rate_per_s * demand.mean_s / servers
    return QueueTimes(rate_per_s, servers, utilization, settled(waiting_s), settled(waiting_s + draws.service_s))


def check_size(demand: Demand, servers: int, queries: int, replications: int) -> None:
    """Check what every simulation needs.

    Args:
        demand: some of its inferences must reach the servers.
        servers: a whole number from 1 to ``MOST_SERVERS``.
        queries: a whole number from ``least_queries()`` on.
        replications: a whole number from 2 on.

    Raises:
        SimulationError: one of them is not so.
    """
    check_servers(servers)
    for what, value, least in (("queries", queries, 1000), ("replications", replications, 2)):
        if not is_whole(value) or value < least:
            raise SimulationError(f"the number of {what} must be a whole number from {least} on; got {short(value)}")
    if queries < least_queries(servers):
        raise SimulationError(
            f"the number of queries must be at least {_QUERIES_PER_SERVER} for each server, or they end before the "
            f"servers have filled; got {queries} for {servers} servers; give queries={least_queries(servers)}"
        )
    if demand.reaching == 0:
        raise SimulationError(
            "no inference reaches a server, since all service times are 0; "
            "the servers then sustain any rate, and there is nothing to simulate"
        )


def check_servers(servers: int) -> None:
    """Check that a number of servers can be simulated query by query.

    Args:
        servers: a whole number from 1 to ``MOST_SERVERS``.

    Raises:
        SimulationError: it is not.
    """
    if not is_whole(servers) or not 1 <= servers <= MOST_SERVERS:
        raise SimulationError(
            f"the number of servers must be a whole number from 1 to {MOST_SERVERS:,}, since each query is followed; "
            f"got {short(servers)}; torchsurgeon.simulate.settle() takes any number"
        )


def least_queries(servers: int) -> int:
    """Return how many queries at least show how a number of servers fares."""
    return max(1000, _QUERIES_PER_SERVER * servers)


def check_percentile(percentile: float) -> None:
    """Check that a percentile is above 0 and below 100.

    Args:
        percentile: the percentile.

    Raises:
        SimulationError: it is not.
    """
    if not (is_finite(percentile) and 0 < percentile < 100):
        raise SimulationError(f"a percentile must be above 0 and below 100; got {short(percentile)}")
