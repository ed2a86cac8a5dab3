"""What adapting costs and gains: bookkeeping per inference, and the latency of a simulated device over varying links.

Costs: everything that adapting does around one inference (three observations, three estimates, a decision on a frontier
of ten rows, the breaker, probe and ping schedules, the rescue's arithmetic), against three moving
averages and ``Frontier.best``. Both contestants take turns in blocks of 200 inferences.

Gains: inferences one after another over replayed uplinks, in simulated time: the true frontier row by row, transfers
timed by the trace, everything within 10 % noise. ``adaptive`` is this package; ``averages`` takes the best row for a
moving average of the rates it saw (weight a half) and probes too; ``server`` and ``device`` never change; ``oracle``
knows the trace. The frontier is AlexNet's shape on a slow device: all on the server sends 150 KB, cuts in the middle 70
to 9 KB, and all on the device takes 0.45 s. Recorded traces are read from the folder given, where there is one.

    python -m benchmarks.runtime.adapting [--traces FOLDER] [--rounds 50] [--out benchmarks/results/adapting.json]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.support.result_file import RESULTS, write
from torchsurgeon.adapting import Decider, Estimates, ServerState, SlowdownEstimator, rescue
from torchsurgeon.link import BandwidthTrace, Link
from torchsurgeon.planning.frontier import Frontier
from torchsurgeon.planning.row import Row

BLOCK = 200
ANSWER_BYTES = 4000
PROBE_IDLE_S = 2.0
PAUSE_S = 0.1
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
            begin = time.perf_counter()
            for _ in range(BLOCK):
                runtime.choose()
                runtime.probe_bytes()
                runtime.observe(row, 0.15, way)
            taken[name].append((time.perf_counter() - begin) / BLOCK * 1e6)
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


class Replay:
    """Simulated time over one uplink."""

    def __init__(self, trace: BandwidthTrace, seed: int) -> None:
        self.trace, self.noise, self.s = trace, random.Random(seed), 0.0

    def __call__(self) -> float:
        return self.s

    def exact_s(self, row: Row) -> float:
        if row.on_device:
            return row.head_s
        start_s = self.s + row.head_s
        up_s = self.trace.delivered_at(start_s, row.size_bytes) - start_s
        return row.head_s + up_s + PRIOR.round_trip_s + row.tail_s + PRIOR.downlink_s(ANSWER_BYTES)

    def about(self, value_s: float) -> float:
        return value_s * self.noise.uniform(0.9, 1.1)

    def way(self, size_bytes: float, tail_s: float) -> dict[str, Any]:
        up_s = self.trace.delivered_at(self.s, size_bytes) - self.s
        down_s, trip_s, tail_s = PRIOR.downlink_s(ANSWER_BYTES), self.about(PRIOR.round_trip_s), self.about(tail_s)
        first_s, down_first_s = up_s * 1500 / size_bytes, down_s * 1500 / ANSWER_BYTES
        self.s += (total_s := up_s + trip_s + tail_s + down_s)
        return {
            "up_bytes": int(size_bytes),
            "up_s": up_s - first_s,
            "down_s": down_s - down_first_s,
            "total_s": total_s,
            "queue_s": 0.0,
            "tail_s": tail_s,
        }

    def run(self, row: Row) -> tuple[float, dict[str, Any]]:
        head_s = self.about(row.head_s)
        self.s += head_s
        return head_s, {} if row.on_device else self.way(row.size_bytes, row.tail_s)


def timeline(trace: BandwidthTrace, policy: str, seed: int) -> dict[str, float]:
    replay = Replay(trace, seed)
    runtime = Adaptive(replay) if policy == "adaptive" else Averages(replay) if policy == "averages" else None
    fixed = {"server": SERVER, "device": DEVICE}.get(policy)
    taken, changes, probes, last = [], 0, 0, None
    while replay.s < trace.duration_s:
        if runtime is not None:
            row = runtime.choose()
        else:
            row = fixed or min(ROWS, key=replay.exact_s)
        begin_s = replay.s
        head_s, way = replay.run(row)
        taken.append(replay.s - begin_s)
        changes += last is not None and row != last
        last = row
        replay.s += PAUSE_S
        if runtime is not None:
            runtime.observe(row, head_s, way)
            size = runtime.probe_bytes()
            if size is not None:
                # A probe runs beside the inferences, and is over before the next one that needs the link.
                begin_s = replay.s
                runtime.observe_link(replay.way(size, 1e-4))
                if isinstance(runtime, Adaptive):
                    runtime.state.probes.spent(size, replay.s - begin_s)
                probes += 1
    ordered = sorted(taken)
    return {
        "mean_s": round(statistics.mean(taken), 4),
        "median_s": round(statistics.median(taken), 4),
        "p95_s": round(ordered[int(0.95 * len(ordered))], 4),
        "inferences": len(taken),
        "changes": changes,
        "probes": probes,
    }


def gains(traces: dict[str, BandwidthTrace]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, trace in traces.items():
        rows = {way: timeline(trace, way, 0) for way in ("oracle", "adaptive", "averages", "server", "device")}
        found[name] = rows
        print(f"\n{name}: mean {trace.mean_bit_s / 1e6:.2f} Mbit/s over {trace.duration_s:.0f} s")
        for way, row in rows.items():
            row["ratio"] = round(row["mean_s"] / rows["oracle"]["mean_s"], 3)
            print(
                f"{way:10} mean {row['mean_s'] * 1e3:7.1f} ms ({row['ratio']:.3f} × oracle), "
                f"p95 {row['p95_s'] * 1e3:7.1f} ms, "
                f"{row['changes']:4} changes, {row['probes']:3} probes in {row['inferences']} inferences"
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--traces", type=Path, help="folder of recorded uplinks, *.up")
    parser.add_argument("--out", type=Path, default=RESULTS / "adapting.json")
    options = parser.parse_args()
    random.seed(0)
    traces = {f"synthetic, {rate:g} Mbit/s": BandwidthTrace.synthetic(rate * 1e6, seed=1) for rate in (1, 6, 20)}
    for path in sorted(options.traces.glob("*.up")) if options.traces else []:
        traces[path.stem] = BandwidthTrace.read(path)
    write(options.out, {"overhead": overhead(options.rounds), "gains": gains(traces)})


if __name__ == "__main__":
    main()
