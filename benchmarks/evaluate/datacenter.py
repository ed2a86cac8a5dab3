"""How many inferences a datacenter sustains when devices cut their models: the paper's experiment, and past it.

Eight applications in equal shares ask one queue of servers, with gaps and service times shaped as those of a web search
service (Neurosurgeon, Kang et al., ASPLOS 2017, section 6.4). Three rivals run side by side: the status quo (all on the
server), device-only, and ours, where this package's planner cuts each application for its link and device, so that
only the tail loads the datacenter. The highest rate at which 99 % of the queries that reach the servers wait at most
100 ms is simulated for each link and each share of devices with a GPU. Then a fluid model settles 10,000 servers and
10 million devices, with cost and energy.

    python -m benchmarks.evaluate.datacenter           # about five minutes
    python -m benchmarks.evaluate.datacenter --quick   # under half a minute, with wider intervals

Costs of layers are measured (by the paper's authors, see ``benchmarks.evaluate.applications``); queues are simulated;
the fluid model is computed; figures of the paper are marked published.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.evaluate.applications import APPLICATIONS, DEVICES, SOURCE, applications
from benchmarks.evaluate.datacenter_fluid import fluid
from benchmarks.evaluate.datacenter_picture import picture
from benchmarks.support import result_file
from torchsurgeon.link import PRESETS, Link
from torchsurgeon.link.rates import MOST_BIT_S
from torchsurgeon.planning import Frontier, Row
from torchsurgeon.simulate import (
    CONSTANT,
    EXPONENTIAL,
    SHAPES,
    Capacity,
    Demand,
    Estimate,
    Shape,
    gain,
    highest_rate,
    mean_wait_s,
    simulate_queue,
)
from torchsurgeon.simulate.queue import Draws, waits_s

OUT = result_file.RESULTS / "evaluation" / "datacenter.json"
QUICK_OUT = result_file.RESULTS.parents[1] / "build" / "evaluation" / "datacenter.json"
LINKS = ("wifi", "lte", "3g")
GPU_SHARES = (0.0, 0.3, 0.7, 1.0)
SERVERS, LIMIT_S, PERCENTILE = 16, 0.1, 99.0
PUBLISHED = {"wifi": 1.04, "lte": 1.43, "3g": 2.36, "most": 6.7}
"""How many times as many queries as the status quo: Kang et al., ASPLOS 2017, section 6.4 and abstract."""

Frontiers = dict[str, dict[str, Frontier]]


@dataclasses.dataclass(frozen=True)
class Setting:
    """Under which assumptions a datacenter is simulated."""

    pictures: str = "uint8"
    uplink_only: bool = True
    servers: int = SERVERS
    limit_s: float = LIMIT_S
    counted: Literal["wait", "response"] = "wait"
    arrivals: Shape = SHAPES["web-search-arrivals"]
    service: Shape = SHAPES["web-search-service"]

    def link(self, name: str) -> Link:
        """Return a link of the paper; with ``uplink_only``, answers and round trips take no time."""
        link = PRESETS[name]
        if not self.uplink_only:
            return link
        return dataclasses.replace(link, downlink_bit_s=MOST_BIT_S, round_trip_s=0.0)


BASE = Setting()
FULL_LINKS = dataclasses.replace(BASE, uplink_only=False)
TABLES = {
    "the uplink alone counts": BASE,
    "answers and round trips count, too": FULL_LINKS,
}
OTHERS = {
    "as in the second table": FULL_LINKS,
    "pictures with four bytes for each value": dataclasses.replace(FULL_LINKS, pictures="float32"),
    "waits of at most 20 ms": dataclasses.replace(FULL_LINKS, limit_s=0.02),
    "waits of at most 500 ms": dataclasses.replace(FULL_LINKS, limit_s=0.5),
    "waits and service of at most 250 ms": dataclasses.replace(FULL_LINKS, limit_s=0.25, counted="response"),
    "4 servers": dataclasses.replace(FULL_LINKS, servers=4),
    "64 servers": dataclasses.replace(FULL_LINKS, servers=64),
    "exponential gaps and service": dataclasses.replace(FULL_LINKS, arrivals=EXPONENTIAL, service=EXPONENTIAL),
}
OTHERS_GPU_SHARE = 0.3


class Searches:
    """Searches for highest rates, each demand once, with the time that is left."""

    def __init__(self, queries: int, replications: int, expected: int) -> None:
        self.queries, self.replications, self.expected = queries, replications, expected
        self._known: dict[Any, Capacity] = {}
        self._begin_s, self._done = time.monotonic(), 0

    def capacity(self, setting: Setting, demand: Demand) -> Capacity:
        """Return the highest rate that keeps the setting's limit."""
        # How pictures and answers cross shows in the demand alone.
        key = (dataclasses.replace(setting, pictures="", uplink_only=True), demand)
        if key not in self._known:
            self._known[key] = highest_rate(
                demand,
                setting.servers,
                setting.limit_s,
                percentile=PERCENTILE,
                counted=setting.counted,
                arrivals=setting.arrivals,
                service=setting.service,
                queries=self.queries,
                replications=self.replications,
            )
        self._done += 1
        spent_s = time.monotonic() - self._begin_s
        left_s = spent_s / self._done * max(self.expected - self._done, 0)
        print(f"\r[{self._done}/{self.expected}] about {left_s:.0f} s left ", end="", file=sys.stderr, flush=True)
        return self._known[key]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help=f"the file of results; the picture lies beside it (default: {OUT})")
    parser.add_argument(
        "--quick", action="store_true", help=f"fewer and shorter replications (default of --out then: {QUICK_OUT})"
    )
    options = parser.parse_args()
    out = options.out or (QUICK_OUT if options.quick else OUT)
    results = evaluate(quick=options.quick)
    result_file.write(out, rounded(results))
    picture(results, out.with_suffix(".png"))


def evaluate(*, quick: bool = False) -> dict[str, Any]:
    """Run everything and return the results."""
    queries, replications = (4_000, 10) if quick else (40_000, 25)
    grid, others = len(LINKS) * (len(GPU_SHARES) + 1), 2 * len(LINKS)
    searches = Searches(queries, replications, len(TABLES) * grid + len(OTHERS) * others)
    results: dict[str, Any] = {
        "quick": quick,
        "costs": SOURCE,
        "shapes": {name: shape.source for name, shape in SHAPES.items() if shape.source and "web" in name},
        "published": PUBLISHED,
        "simulated": {
            "percentile": PERCENTILE,
            "limit_s": LIMIT_S,
            "servers": SERVERS,
            "queries": queries,
            "replications": replications,
        },
        "validation": validation(max(queries, 20_000), replications),
        "speed": speed(),
    }
    results["choices"] = {name: choices(setting) for name, setting in TABLES.items()}
    results["tables"] = {
        name: [row for link in LINKS for row in throughput(searches, setting, link, GPU_SHARES)]
        for name, setting in TABLES.items()
    }
    results["others"] = {
        name: {link: throughput(searches, setting, link, (OTHERS_GPU_SHARE,))[0] for link in LINKS}
        for name, setting in OTHERS.items()
    }
    print(file=sys.stderr)
    results["fluid"] = fluid(applications())
    return results


def validation(queries: int, replications: int) -> list[dict[str, Any]]:
    """Return simulated mean waits beside those of the closed forms, in mean service times."""
    rows = []
    for name, servers, utilization, service in (
        ("M/M/1", 1, 0.8, EXPONENTIAL),
        ("M/M/4", 4, 0.8, EXPONENTIAL),
        ("M/M/16", 16, 0.9, EXPONENTIAL),
        ("M/D/1", 1, 0.8, CONSTANT),
        ("M/G/1, web search service", 1, 0.7, SHAPES["web-search-service"]),
    ):
        found = simulate_queue(
            Demand.of(1.0), servers * utilization, servers, service=service, queries=queries, replications=replications
        )
        exact = mean_wait_s(servers, utilization, 1.0, service.variation)
        rows.append(
            {
                "queue": name,
                "utilization": utilization,
                "simulated": described(found.mean_wait_s),
                "closed_form": exact,
                "within": found.mean_wait_s.low <= exact <= found.mean_wait_s.high,
            }
        )
    return rows


def speed() -> dict[str, Any]:
    """Return the seconds for a million queries to the benchmark's 16 servers, and those of the simplest other way."""
    demand, rate_per_s = Demand.of(1.0), 0.9 * SERVERS
    seconds: dict[str, list[float]] = {"torchsurgeon.simulate": [], "a loop over queries with a heap of servers": []}
    for seed in range(3):
        begin_s = time.perf_counter()
        draws = Draws.draw(demand, BASE.arrivals, BASE.service, 40_000, 25, seed)
        drawn_s = time.perf_counter() - begin_s
        waits = []
        for way, simulate in zip(seconds, (waits_s, waits_by_loop_s), strict=True):
            begin_s = time.perf_counter()
            waits.append(simulate(draws, np.full(25, rate_per_s), SERVERS))
            seconds[way].append(drawn_s + time.perf_counter() - begin_s)
        assert np.array_equal(*waits)
    medians = {way: statistics.median(taken) for way, taken in seconds.items()}
    return {"queries": 1_000_000, "servers": SERVERS, "seconds": medians}


def waits_by_loop_s(draws: Draws, rate_per_s: NDArray[np.float64], servers: int) -> NDArray[np.float64]:
    """Return what ``waits_s`` does, one query after the other."""
    arrive_s, begin_s = draws.arrivals / rate_per_s, np.empty_like(draws.arrivals)
    for column in range(arrive_s.shape[1]):
        free_s, begins = [0.0] * servers, []
        for at, lasting in zip(arrive_s[:, column].tolist(), draws.service_s[:, column].tolist(), strict=True):
            begin = max(at, free_s[0])
            heapq.heapreplace(free_s, begin + lasting)
            begins.append(begin)
        begin_s[:, column] = begins
    return begin_s - arrive_s


def choices(setting: Setting) -> list[dict[str, Any]]:
    """Return where the planner cuts each application for each link and device, and what each rival's latency is."""
    rows = []
    for link_name in LINKS:
        link = setting.link(link_name)
        for kind in DEVICES:
            for name, frontiers in applications(setting.pictures).items():
                frontier = frontiers[kind]
                ours = frontier.best(link)
                rows.append(
                    {
                        "link": link_name,
                        "device": kind,
                        "application": name,
                        "cut": "all on the device" if ours.on_device else ours.name,
                        "server_s": ours.tail_s,
                        "latency_s": {
                            rival: frontier.terms(row, link).latency_s for rival, row in rivals(frontier, link).items()
                        },
                    }
                )
    return rows


def rivals(frontier: Frontier, link: Link) -> dict[str, Row]:
    """Return how each rival runs an application."""
    return {"status quo": frontier.rows[0], "device-only": frontier.rows[-1], "ours": frontier.best(link)}


def throughput(
    searches: Searches, setting: Setting, link_name: str, gpu_shares: tuple[float, ...]
) -> list[dict[str, Any]]:
    """Return the highest rates of status quo and ours over one link, for each share of devices with a GPU."""
    link = setting.link(link_name)
    frontiers = applications(setting.pictures)
    status_quo = searches.capacity(setting, demand(frontiers, link, 0.0, "status quo"))
    rows = []
    for gpu_share in gpu_shares:
        wanted = demand(frontiers, link, gpu_share, "ours")
        ours = searches.capacity(setting, wanted)
        rows.append(
            {
                "link": link_name,
                "gpu_share": gpu_share,
                "reaching": wanted.reaching,
                "server_s": wanted.mean_s,
                "utilization": utilization(ours, wanted, setting.servers),
                "rate_per_s": {
                    "status quo": described(status_quo.rate_per_s),
                    "device-only": None,
                    "ours": described(ours.rate_per_s),
                },
                "gain": described(gain(ours, status_quo)),
                "unloaded": unloaded(frontiers, link, gpu_share),
            }
        )
    return rows


def utilization(capacity: Capacity, wanted: Demand, servers: int) -> float:
    """Return how busy the servers are at the highest rate."""
    return 0.0 if not wanted.reaching else capacity.rate_per_s.value * wanted.mean_s / servers


def demand(frontiers: Frontiers, link: Link, gpu_share: float, rival: str) -> Demand:
    """Return what a rival asks of the servers: eight applications in equal shares, on devices of both kinds."""
    shares, seconds = [], []
    for kind, part in (("cpu", 1 - gpu_share), ("gpu", gpu_share)):
        for name in APPLICATIONS:
            shares.append(part / len(APPLICATIONS))
            seconds.append(rivals(frontiers[name][kind], link)[rival].tail_s)
    return Demand(tuple(shares), tuple(seconds))


def unloaded(frontiers: Frontiers, link: Link, gpu_share: float) -> dict[str, dict[str, float]]:
    """Return each rival's mean latency with idle servers, and the mean joules of its devices with their radios."""
    found: dict[str, dict[str, float]] = {}
    for rival in ("status quo", "device-only", "ours"):
        latency_s = energy_j = 0.0
        for kind, part in (("cpu", 1 - gpu_share), ("gpu", gpu_share)):
            for name in APPLICATIONS:
                frontier = frontiers[name][kind]
                terms = frontier.terms(rivals(frontier, link)[rival], link)
                latency_s += part / len(APPLICATIONS) * terms.latency_s
                energy_j += part / len(APPLICATIONS) * (terms.energy_j or 0.0)
        found[rival] = {"latency_s": latency_s, "device_j": energy_j}
    return found


def rounded(value: Any) -> Any:
    """Return plain data with six significant digits in each number, which is more than a simulation tells."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def described(estimate: Estimate) -> dict[str, float] | None:
    """Return an estimate as plain data; None where it is infinite, since no inference reaches a server."""
    return None if math.isinf(estimate.value) else dataclasses.asdict(estimate)


if __name__ == "__main__":
    main()
