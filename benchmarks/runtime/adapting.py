"""What adapting costs and gains: bookkeeping per inference, and the latency of a simulated device over varying links.

Costs: everything that adapting does around one inference (three observations, three estimates, a decision on a frontier
of ten rows, the breaker, probe and ping schedules, the rescue's arithmetic), against three moving averages and
``Frontier.best``. Both contestants take turns in blocks of 200 inferences.

Gains: calls one after another over replayed uplinks, in simulated time (``benchmarks.support.simulated_module``):
transfers timed by the trace, everything else within 10 % noise. ``adaptive`` is this package; ``averages`` has moving
averages of rates and round trip in place of its estimates, and everything else alike; ``told`` is told what the uplink
could have carried in the last half second, which no device knows; ``server`` and ``device`` never
change and never give up; ``oracle`` knows the trace, and takes at every call the row that is the fastest from then on.
Means are over time, not over calls: each moment counts with the latency of the call that began last, so that a stall of
a second counts as a second. With a deadline, what is counted is how many answers come after it.

The frontier is AlexNet's shape on a slow device: all on the server sends 150 KB, cuts in the middle 70 to 9 KB, and all
on the device takes 0.45 s. Recorded traces are read from the folder given, where there is one.

    python -m benchmarks.runtime.adapting [--traces FOLDER] [--rounds 50] [--seeds 20] [--out FILE] [--page]
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.support.result_file import RESULTS, known, show, write
from benchmarks.support.simulated_module import AverageLink, Call, Module, Network, ToldLink
from torchsurgeon.adapting import Decider, Estimates, ServerState, SlowdownEstimator, rescue
from torchsurgeon.link import BandwidthTrace, Link
from torchsurgeon.planning.frontier import Frontier
from torchsurgeon.planning.row import Row

OUT = RESULTS / "adapting.json"
PAGE = Path(__file__).parent.parent.parent / "docs" / "adapting.md"
BEGIN, END = "<!-- figures of benchmarks.runtime.adapting: begin -->", "<!-- end -->"

BLOCK = 200
ANSWER_BYTES = 4000
PROBE_IDLE_S = 2.0
PAUSE_S = 0.1
DEADLINE_S = 0.6
SYNTHETIC = 20
"""How many synthetic uplinks of each rate there are; their means are shown."""
STALL_S = 1.0
"""An uplink that carries nothing for so long stalls."""
SHOWN = ("adaptive", "averages", "told", "server", "device")
PRIOR = Link("lte", 5.85e6, 13.76e6, 0.060)

SHAPE = [  # seconds on the device, bytes up, seconds on the server
    (0.0, 150_528, 0.0050),
    (0.030, 70_000, 0.0046),
    (0.055, 46_656, 0.0042),
    (0.080, 43_264, 0.0036),
    (0.115, 32_448, 0.0031),
    (0.150, 21_632, 0.0026),
    (0.180, 9_216, 0.0022),
    (0.330, 8_192, 0.0010),
    (0.430, 4_400, 0.0002),
]
ROWS = (
    *(Row(at, f"layer{at}", "raw", head_s, 0.0, size, tail_s, 0.0) for at, (head_s, size, tail_s) in enumerate(SHAPE)),
    Row(len(SHAPE), "device", "raw", 0.45, 0.0, 0.0, 0.0, 0.0, on_device=True),
)
FRONTIER = Frontier("alexnet-like", "", 1, len(SHAPE), ANSWER_BYTES, ROWS)
SERVER, DEVICE = ROWS[0], ROWS[-1]


class Adaptive:
    """What a SplitModule does around an inference."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self.state = ServerState.new("only", PRIOR, now_s=now_s)
        self.slowdown = SlowdownEstimator(now_s=now_s)
        self.decider: Decider[Row] = Decider(FRONTIER.rows, FRONTIER.costs, now_s=now_s)
        self.hedged = 0

    def choose(self) -> Row:
        server = self.state
        assert server.breaker.allow()
        slowdown = self.slowdown.estimate()
        decision = self.decider.decide(Estimates(server.link.estimate(), server.load.estimate(), slowdown))
        row = decision.row
        if not row.on_device:
            local_s = (DEVICE.head_s - row.head_s) * slowdown.value
            self.hedged += rescue(
                1.0, remote_s=decision.cost, remote_spread=0.2, tail_s=local_s, tail_spread=slowdown.spread
            ).hedged
        return row

    def probe_bytes(self) -> int | None:
        uplink = self.state.link.estimate().uplink
        self.state.load.ping_due()
        return self.state.probes.due_bytes(uplink.age_s, uplink.value)

    def observe(self, row: Row, head_s: float, way: dict[str, Any]) -> None:
        self.slowdown.observe(head_s, row.head_s)
        if way:
            queue_s, tail_s = way["queue_s"], way["tail_s"]
            self.state.breaker.succeeded()
            self.state.load.observe(queue_s=queue_s, compute_s=tail_s, predicted_s=row.tail_s)
            self.observe_link(way)

    def observe_link(self, way: dict[str, Any]) -> None:
        self.state.link.observe(
            up_bytes=way["up_bytes"],
            up_s=way["up_s"],
            down_bytes=ANSWER_BYTES,
            down_s=way["down_s"],
            total_s=way["total_s"],
            server_s=way["queue_s"] + way["tail_s"],
        )


class Averages:
    """The simple rival: moving averages, and the best row for them."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self.now_s, self.seen_s = now_s, now_s()
        self.uplink_bit_s, self.trip_s, self.load, self.slowdown = PRIOR.uplink_bit_s, PRIOR.round_trip_s, 1.0, 1.0

    def choose(self) -> Row:
        return FRONTIER.best(
            Link("average", self.uplink_bit_s, PRIOR.downlink_bit_s, self.trip_s), self.load, self.slowdown
        )

    def probe_bytes(self) -> int | None:
        return 32_768 if self.now_s() - self.seen_s > PROBE_IDLE_S else None

    def observe(self, row: Row, head_s: float, way: dict[str, Any]) -> None:
        if row.head_s:
            self.slowdown += 0.5 * (head_s / row.head_s - self.slowdown)
        if way:
            self.load += 0.5 * ((way["queue_s"] + way["tail_s"]) / row.tail_s - self.load)
            self.observe_link(way)

    def observe_link(self, way: dict[str, Any]) -> None:
        self.seen_s = self.now_s()
        self.uplink_bit_s += 0.5 * (way["up_bytes"] * 8 / way["up_s"] - self.uplink_bit_s)
        left_s = way["total_s"] - way["up_s"] - way["down_s"] - way["queue_s"] - way["tail_s"]
        self.trip_s += 0.5 * (left_s - self.trip_s)


def overhead(rounds: int) -> dict[str, Any]:
    ways: dict[str, tuple[Adaptive | Averages, Row]] = {
        "averages": (Averages(time.monotonic), ROWS[6]),
        "adaptive": (Adaptive(time.monotonic), ROWS[6]),
    }
    way = {"up_bytes": 21_632, "up_s": 0.03, "down_s": 0.002, "total_s": 0.1, "queue_s": 1e-4, "tail_s": 2.6e-3}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name in random.sample(list(ways), len(ways)):
            runtime, row = ways[name]
            begin = time.process_time()
            for _ in range(BLOCK):
                runtime.choose()
                runtime.probe_bytes()
                runtime.observe(row, 0.15, way)
            taken[name].append((time.process_time() - begin) / BLOCK * 1e6)
    base = taken["averages"]
    found = {}
    for name, times in taken.items():
        low, middle, high = statistics.quantiles(times, n=4)
        ratio = statistics.median(one / other for one, other in zip(times, base, strict=True))
        found[name] = {
            "us": round(middle, 2),
            "quartiles_us": [round(low, 2), round(high, 2)],
            "ratio": round(ratio, 2),
        }
        print(f"{name:20} {middle:6.1f} µs an inference ({low:.1f} to {high:.1f}), {ratio:.2f} × averages")
    return found


class Scripted:
    """Calls without a choice: always one row, or with None the row that is the fastest from then on."""

    def __init__(self, network: Network, row: Row | None) -> None:
        self.network, self.row = network, row

    def _exact_s(self, row: Row) -> float:
        sent_s = self.network.s + row.head_s
        if row.on_device:
            return row.head_s
        up_s = self.network.trace.delivered_at(sent_s, row.size_bytes) - self.network.s
        return up_s + PRIOR.round_trip_s + row.tail_s + PRIOR.downlink_s(ANSWER_BYTES)

    def call(self, pause_s: float) -> Call:
        row = self.row or min(ROWS, key=self._exact_s)
        begin_s, latency_s = self.network.s, self._exact_s(row)
        self.network.s += latency_s + pause_s
        return Call(begin_s, latency_s, self.network.s, row, 0, local=False)


def contestant(name: str, network: Network, deadline_s: float | None = None) -> Module | Scripted:
    if name == "adaptive":
        return Module(network, FRONTIER, deadline_s=deadline_s)
    if name == "averages":
        return Module(network, FRONTIER, link=AverageLink(PRIOR, network), deadline_s=deadline_s)
    if name == "told":
        return Module(network, FRONTIER, link=ToldLink(network))
    return Scripted(network, {"server": SERVER, "device": DEVICE}.get(name))


def calls(trace: BandwidthTrace, name: str, seed: int, deadline_s: float | None = None) -> list[Call]:
    network = Network(trace, PRIOR, seed)
    runtime, found = contestant(name, network, deadline_s), []
    while network.s < trace.duration_s:
        found.append(runtime.call(PAUSE_S))
    return found


def over_time_s(found: Sequence[Call]) -> float:
    """Return the mean latency over time."""
    spans = [call.next_s - call.begin_s for call in found]
    return sum(call.latency_s * span for call, span in zip(found, spans, strict=True)) / sum(spans)


def timeline(traces: Sequence[BandwidthTrace], name: str, seeds: int) -> dict[str, float]:
    cases = [(trace, seed) for trace in traces for seed in range(seeds)]
    runs = [calls(trace, name, seed) for trace, seed in cases]
    taken = sorted(call.latency_s for run in runs for call in run)
    row = {
        "mean_s": statistics.mean(map(over_time_s, runs)),
        "median_s": statistics.median(taken),
        "p95_s": taken[int(0.95 * len(taken))],
        "inferences": len(taken) / len(runs),
        "changes": sum(a.row is not b.row for run in runs for a, b in itertools.pairwise(run)) / len(runs),
        "probes": sum(call.probes for run in runs for call in run) / len(runs),
        "local": sum(call.local for run in runs for call in run) / len(runs),
    }
    if name in ("adaptive", "averages"):
        late = [call.latency_s > DEADLINE_S for case in cases for call in calls(case[0], name, case[1], DEADLINE_S)]
        row["late_share"] = statistics.mean(late)
    return {what: round(value, 4) for what, value in row.items()}


def longest_stall_s(trace: BandwidthTrace) -> float:
    idle = [at for at, rate in enumerate(trace.rates_bit_s(0.01)) if rate == 0]
    longest = run = 0
    for before, at in zip([-2, *idle], idle, strict=False):
        run = run + 1 if at == before + 1 else 1
        longest = max(longest, run)
    return longest / 100


def gains(uplinks: dict[str, list[BandwidthTrace]], seeds: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, traces in uplinks.items():
        ways = {
            way: timeline(traces, way, seeds) for way in ("oracle", "adaptive", "averages", "told", "server", "device")
        }
        for row in ways.values():
            row["ratio"] = round(row["mean_s"] / ways["oracle"]["mean_s"], 3)
        found[name] = {
            "traces": len(traces),
            "mean_bit_s": round(statistics.mean(trace.mean_bit_s for trace in traces)),
            "duration_s": round(sum(trace.duration_s for trace in traces), 1),
            "longest_stall_s": max(map(longest_stall_s, traces)),
            "ways": ways,
        }
        print(line(name, found[name]), flush=True)
    return found


def line(name: str, row: dict[str, Any]) -> str:
    """Return a trace's line of the page's table."""
    ways = row["ways"]
    ratios = " | ".join(f"{ways[way]['ratio']:.3f}" for way in SHOWN)
    late = " | ".join(f"{ways[way]['late_share']:.1%}" for way in ("adaptive", "averages"))
    return (
        f"| {name} | {row['mean_bit_s'] / 1e6:.2f} | {row['longest_stall_s']:.1f} | "
        f"{ways['oracle']['mean_s'] * 1e3:.0f} ms | {ratios} | {late} |"
    )


def page(results: dict[str, Any]) -> str:
    """Return what the page shows of the results, as Markdown."""
    lines = [
        (
            "| uplink | Mbit/s | longest stall, s | oracle | adaptive | averages | told | all on the server "
            f"| all on the device | late at {DEADLINE_S:g} s: adaptive | averages |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *(line(name, row) for name, row in results["gains"].items()),
    ]
    cost = results["overhead"]
    lines += [
        "",
        (
            f"Around one inference, all of this takes {cost['adaptive']['us']:.0f} µs of processor time, and three "
            f"moving averages with `Frontier.best` {cost['averages']['us']:.0f} µs."
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=20, help="runs over each recorded uplink, with other noise")
    parser.add_argument("--traces", type=Path, help="folder of recorded uplinks, *.up")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--page", action="store_true", help="only write the page from the results")
    options = parser.parse_args()
    if not options.page:
        random.seed(0)
        # Of an uplink that is made up there are as many as one likes, and a single one may suit either contestant.
        found = gains(
            {
                f"synthetic, {rate:g} Mbit/s": [
                    BandwidthTrace.synthetic(rate * 1e6, seed=seed) for seed in range(1, SYNTHETIC + 1)
                ]
                for rate in (1, 6, 20)
            },
            max(1, options.seeds // 4),
        )
        paths = sorted(options.traces.glob("*.up")) if options.traces else []
        found |= gains({path.stem: [BandwidthTrace.read(path)] for path in paths}, options.seeds)
        write(options.out, {"overhead": overhead(options.rounds), "gains": found})
    if options.out == OUT:
        show(PAGE, BEGIN, END, page(known(OUT)))


if __name__ == "__main__":
    main()
