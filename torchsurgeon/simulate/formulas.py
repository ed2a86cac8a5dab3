"""What queueing theory says in closed form; the simulation is compared with it."""

from __future__ import annotations

import math

from torchsurgeon.errors import SimulationError, is_finite, is_whole, short
from torchsurgeon.simulate.queue import check_percentile


def erlang_c(servers: int, utilization: float) -> float:
    """Return the probability that a query waits, with Poisson arrivals and exponential service (Erlang 1917).

    Args:
        servers: how many servers there are, from 1 on.
        utilization: the share of the servers' time that is asked for, 0 or more and below 1.

    Raises:
        SimulationError: an argument is not so.
    """
    _check(servers, utilization)
    offered = servers * utilization
    # Erlang B by its recursion, which neither overflows nor cancels.
    blocked = 1.0
    for count in range(1, servers + 1):
        blocked = offered * blocked / (count + offered * blocked)
    return blocked / (1 - utilization * (1 - blocked))


def mean_wait_s(servers: int, utilization: float, service_s: float, variation: float = 1.0) -> float:
    """Return the mean wait of queries that arrive as a Poisson process.

    It is exact for one server (Pollaczek and Khinchine) and for exponential service (Erlang C). For several servers and
    other service times it is the approximation of Lee and Longton (1959).

    Args:
        servers: how many servers there are, with one queue.
        utilization: the share of the servers' time that is asked for, 0 or more and below 1.
        service_s: the mean service time in seconds.
        variation: the coefficient of variation of the service time; 0 where it is constant, 1 where it is exponential.

    Raises:
        SimulationError: an argument is negative or not finite, or the utilization is 1 or more.
    """
    for what, value in (("service time", service_s), ("coefficient of variation", variation)):
        if not (is_finite(value) and value >= 0):
            raise SimulationError(f"a {what} must be zero or a positive number; got {short(value)}")
    exponential_s = erlang_c(servers, utilization) * service_s / (servers * (1 - utilization))
    return exponential_s * (1 + variation**2) / 2


def response_percentile_s(servers: int, utilization: float, service_s: float, percentile: float) -> float:
    """Return a percentile of the time from arrival to the end of service, for Poisson arrivals and exponential service.

    Args:
        servers: how many servers there are, with one queue.
        utilization: the share of the servers' time that is asked for, 0 or more and below 1.
        service_s: the mean service time in seconds, above 0.
        percentile: above 0 and below 100.

    Raises:
        SimulationError: an argument is not so.
    """
    from scipy.optimize import brentq

    check_percentile(percentile)
    if not (is_finite(service_s) and service_s > 0):
        raise SimulationError(f"a service time must be a positive number of seconds; got {short(service_s)}")
    waits = erlang_c(servers, utilization)
    # In mean service times, so that the search is as fine for short ones as for long ones.
    drain = servers * (1 - utilization)

    def beyond(time: float) -> float:
        if math.isclose(drain, 1, rel_tol=1e-6):
            return math.exp(-time) * (1 + waits * time)
        # With probability `waits` the time is the sum of two exponential ones, of rates 1 and `drain`.
        both = (drain * math.exp(-time) - math.exp(-drain * time)) / (drain - 1)
        return (1 - waits) * math.exp(-time) + waits * both

    share, high = 1 - percentile / 100, 1.0
    while beyond(high) > share:
        high *= 2
    return service_s * float(brentq(lambda time: beyond(time) - share, 0.0, high))


def _check(servers: int, utilization: float) -> None:
    if not is_whole(servers) or servers < 1:
        raise SimulationError(f"the number of servers must be a whole number from 1 on; got {short(servers)}")
    if not (is_finite(utilization) and 0 <= utilization < 1):
        raise SimulationError(
            f"the utilization must be zero or more and below 1, or queries wait ever longer; got {short(utilization)}"
        )
