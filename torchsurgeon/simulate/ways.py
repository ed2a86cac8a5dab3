"""What servers sustain when a model runs all on them, and when it is cut as its frontier says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torchsurgeon.errors import SimulationError, is_finite
from torchsurgeon.link import Link
from torchsurgeon.planning import Frontier, Row
from torchsurgeon.simulate.capacity import Capacity, highest_rate
from torchsurgeon.simulate.demand import Demand
from torchsurgeon.simulate.queue import QueueTimes, check_servers, least_queries, simulate_queue
from torchsurgeon.simulate.shape import SHAPES, Shape


@dataclass(frozen=True, eq=False)
class Sustained:
    """How servers fare when devices run a model in one way.

    Attributes:
        name: the way: ``"all on server"`` or ``"as planned"``.
        row: where the model is cut.
        latency_s: seconds from call to answer while the servers are idle.
        server_s: seconds of computing on a server for each inference; 0 where all runs on the device.
        times: how long queries took at the rate that was asked for; None where none was, or where nothing reaches a
            server.
        capacity: the highest rate that keeps the limit; None where no limit was given.
    """

    name: str
    row: Row
    latency_s: float
    server_s: float
    times: QueueTimes | None
    capacity: Capacity | None

    @property
    def load(self) -> float | None:
        """The factor by which servers are slower than idle ones at the rate, as plans take it; None without times."""
        return None if self.times is None else self.times.mean_response_s.value / self.server_s


def sustained(
    frontier: Frontier,
    link: Link,
    servers: int,
    *,
    rate_per_s: float | None = None,
    limit_s: float | None = None,
    percentile: float = 99.0,
    slowdown: float = 1.0,
    arrivals: Shape = SHAPES["web-search-arrivals"],
    service: Shape = SHAPES["web-search-service"],
    queries: int = 20_000,
    replications: int = 20,
    progress: Callable[[], None] = lambda: None,
) -> tuple[Sustained, Sustained]:
    """Return how servers fare when the model runs all on them, and when it is cut where its latency is the least.

    Args:
        frontier: the cuts that can win, which ``plan()`` and ``Frontier.build()`` return.
        link: the link between devices and servers.
        servers: how many servers there are, from 1 to 10,000; they have one queue and answer in the order of arrival.
        rate_per_s: inferences per second of all devices, for which times are simulated.
        limit_s: the most seconds that the percentile of the time at the servers may be, for the highest rate.
        percentile: above 0 and below 100.
        slowdown: the factor by which the devices are slower than the frontier says.
        arrivals: the shape of the gaps between inferences.
        service: the shape of service times around each cut's seconds on the server.
        queries: how many reach the servers in each replication, from 1,000 on; more where there are so many servers
            that they would not fill. The first quarter is left out.
        replications: how many independent replications there are, from 2 on.
        progress: called after each simulated rate.

    Returns:
        All on the server, and as planned.

    Raises:
        SimulationError: an argument is not valid, the frontier has no row for all on the server, or the limit is
            shorter than the service itself.
        PlanError: the slowdown is not positive.
    """
    whole = [row for row in frontier.rows if row.index == 0 and not row.on_device]
    if not whole:
        raise SimulationError(
            f"the frontier of {frontier.model} must hold running all on the server; it was cut short: build it again"
        )
    best = min(whole, key=lambda row: frontier.terms(row, link, 1.0, slowdown).latency_s)
    check_servers(servers)
    if is_finite(queries):
        queries = max(queries, least_queries(servers))
    found = []
    for name, row in (("all on server", best), ("as planned", frontier.best(link, 1.0, slowdown))):
        server_s = 0.0 if row.on_device else row.tail_s + row.decode_s
        demand, times, capacity = Demand.of(server_s), None, None
        if rate_per_s is not None and server_s:
            times = simulate_queue(
                demand,
                rate_per_s,
                servers,
                arrivals=arrivals,
                service=service,
                queries=queries,
                replications=replications,
            )
            progress()
        if limit_s is not None:
            capacity = highest_rate(
                demand,
                servers,
                limit_s,
                percentile=percentile,
                arrivals=arrivals,
                service=service,
                queries=queries,
                replications=replications,
                progress=progress,
            )
        found.append(
            Sustained(name, row, frontier.terms(row, link, 1.0, slowdown).latency_s, server_s, times, capacity)
        )
    return found[0], found[1]
