"""A SplitModule over an uplink that varies, as figure 14 of the Neurosurgeon paper: adaptive, fixed, and an oracle.

AlexNet on photographs behind an emulated link that replays a recorded uplink (mahimahi's format; a synthetic LTE uplink
without ``--trace``), with the downlink and the round trip of the LTE preset. The device is this process, paced so that
the whole model takes 0.4 s on it; the server a process on a core of its own where there is one. Every way replays the
same seconds of the trace from their start, and begins an inference every half second, or at the next half second after
the one before it ended. One that fills several half seconds counts as often, or a way would seem the better the fewer
it manages while the uplink is bad:

* ``adaptive``: the module decides at every inference, knowing nothing but its own requests and probes.
* ``server``, ``device``: everything there, always; the status quo and its opposite.
* ``oracle``: the cut that is the fastest from here on over the trace, which it knows; what every cut takes beside
  that it has timed before, over a steady link.

Printed and written are mean, quartiles and 95th percentile of the latency over the half seconds, and ratios of means;
the timeline is drawn.

    python -m benchmarks.runtime.trace [--trace FILE] [--seconds 40] [--out benchmarks/results/runtime_trace.json]
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import torchsurgeon as ts
from benchmarks.support.paced_device import paced, warm
from benchmarks.support.result_file import RESULTS, write
from benchmarks.support.served import alexnet
from benchmarks.support.tail_process import TailProcess, middle, two_cores
from torchsurgeon.emulate import LinkEmulator
from torchsurgeon.link import PRESETS, BandwidthTrace, TracedLink
from torchsurgeon.planning import Frontier, Row
from torchsurgeon.report.pictures import BLUE, GREEN, ORANGE, RED, new_figure
from torchsurgeon.transport import HttpTransport

PARTITIONS = {"oracle": "server", "adaptive": "auto", "server": "server", "device": "device"}
WAYS = tuple(PARTITIONS)
LTE = PRESETS["lte"]
DEVICE_S = 0.4
PERIOD_S = 0.5
PATIENCE_S = 60.0
LESSONS = 3


class Oracle:
    """Knows the uplink's future, and what every row takes beside it: from runs over a steady link, in this process."""

    def __init__(self, rows: tuple[Row, ...], uplink: BandwidthTrace) -> None:
        self.rows, self.uplink = rows, uplink
        self.points: dict[Row, ts.PartitionPoint] = {}
        self.sent_bytes: dict[Row, int] = {}
        self.rest_s: dict[Row, float] = {}

    def learn(self, split: ts.SplitModule, x: torch.Tensor, steady_bit_s: float) -> None:
        """Time every row over an uplink of a steady rate."""
        for row in self.rows:
            split.partition = self.points[row] = row.point(split.graph)
            rest_s = []
            for _ in range(LESSONS):
                split(x)
                last = split.last
                assert last is not None
                rest_s.append(last.total_s - row.head_s - last.sent_bytes * 8 / steady_bit_s)
                self.sent_bytes[row] = last.sent_bytes
            self.rest_s[row] = statistics.median(rest_s)

    def latency_s(self, row: Row, now_s: float) -> float:
        headed_s = now_s + row.head_s
        return self.uplink.delivered_at(headed_s, self.sent_bytes[row]) - now_s + self.rest_s[row]

    def point(self, now_s: float) -> ts.PartitionPoint:
        return self.points[min(self.rows, key=lambda row: self.latency_s(row, now_s))]


def replay(
    split: ts.SplitModule,
    x: torch.Tensor,
    emulator: LinkEmulator,
    link: TracedLink,
    seconds: float,
    choose: Callable[[float], ts.PartitionPoint] | None,
) -> list[dict[str, Any]]:
    """Run over ``seconds`` of the link from its start; one entry an inference, its time and latency in seconds."""
    taken = []
    emulator.set_link(link)
    start_s = time.monotonic()
    while (now_s := time.monotonic() - start_s) < seconds:
        if choose is not None:
            split.partition = choose(now_s)
        begin_s = time.perf_counter()
        split(x)
        latency_s = time.perf_counter() - begin_s
        last = split.last
        assert last is not None
        taken.append(
            {
                "at_s": round(now_s, 3),
                "latency_s": round(latency_s, 4),
                "cut": last.partition.name,
                "index": last.partition.index,
                "sent_bytes": last.sent_bytes,
                "degraded": last.degraded,
            }
        )
        ended_s = time.monotonic() - start_s
        turn = int(ended_s / PERIOD_S) + 1
        taken[-1]["turns"] = max(min(turn, round(seconds / PERIOD_S)) - round(now_s / PERIOD_S), 1)
        time.sleep(max(0.0, PERIOD_S * turn - ended_s))
    return taken


def over_time(entries: list[dict[str, Any]]) -> list[float]:
    """The latency at every half second."""
    return [entry["latency_s"] for entry in entries for _ in range(entry["turns"])]


def measure(uplink: BandwidthTrace, seconds: float) -> dict[str, list[dict[str, Any]]]:
    own, other = two_cores()
    with TailProcess(alexnet, core=other) as server:
        if own is not None:
            os.sched_setaffinity(0, {own})
        model, x = alexnet(0)
        graph, here, device = paced(model, x, DEVICE_S)
        with HttpTransport(server.url) as direct:
            there = ts.LayerProfile.from_json(direct.get_json("/v2/models/model/profile"))
        oracle = Oracle(Frontier.build(graph, here, there).rows, uplink)
        steady = TracedLink("steady", constant(uplink.mean_bit_s), constant(LTE.downlink_bit_s), LTE.round_trip_s)
        varying = TracedLink("varying", uplink, constant(LTE.downlink_bit_s), LTE.round_trip_s)
        timelines = {}
        known: dict[str, Any] = {"device_profile": here, "server_profile": there, "backend": device.wrap}
        with ts.SplitModule(model, x, server=server.url, **known) as first:
            # Not over the link, which requests that are given up would leave full.
            warm(first, x, oracle.rows)
        with LinkEmulator(0, "127.0.0.1", server.port, steady) as emulator:
            for way in WAYS:
                emulator.set_link(steady)
                split = ts.SplitModule(
                    model,
                    x,
                    server=f"http://127.0.0.1:{emulator.port}",
                    timeout_s=PATIENCE_S,
                    fallback="local" if way == "adaptive" else "error",
                    **known,
                )
                with split:
                    split(x)
                    if way == "oracle":
                        oracle.learn(split, x, uplink.mean_bit_s)
                    split.partition = PARTITIONS[way]
                    split(x)
                    timelines[way] = replay(
                        split, x, emulator, varying, seconds, oracle.point if way == "oracle" else None
                    )
                print(f"{way:9} {statistics.mean(over_time(timelines[way])) * 1e3:7.1f} ms", flush=True)
    return timelines


def constant(bit_s: float) -> BandwidthTrace:
    return BandwidthTrace([0.0, 1.0], [0.0, bit_s])


def summary(timelines: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    rows: dict[str, Any] = {way: middle(over_time(timelines[way])) for way in WAYS}
    for way in WAYS:
        entries = timelines[way]
        rows[way]["inferences"] = len(entries)
        rows[way]["changes"] = sum(a["cut"] != b["cut"] for a, b in itertools.pairwise(entries))
        rows[way]["degraded"] = sum(e["degraded"] is not None for e in entries)
        rows[way]["ratio_to_oracle"] = round(rows[way]["mean_s"] / rows["oracle"]["mean_s"], 3)
    better = min(rows["server"]["mean_s"], rows["device"]["mean_s"])
    rows["adaptive"]["ratio_to_better_fixed"] = round(rows["adaptive"]["mean_s"] / better, 3)
    return rows


def show(name: str, rows: dict[str, Any]) -> None:
    print(f"\n{name}")
    for way in WAYS:
        row = rows[way]
        print(
            f"  {way:9} mean {row['mean_s'] * 1e3:7.1f} ms ({row['ratio_to_oracle']:.3f} × oracle), median "
            f"{row['median_s'] * 1e3:7.1f}, p95 {row['p95_s'] * 1e3:7.1f}; {row['inferences']:3} inferences, "
            f"{row['changes']} changes, {row['degraded']} degraded"
        )
    print(f"  adaptive takes {rows['adaptive']['ratio_to_better_fixed']:.3f} × the better fixed way's mean")


def draw(name: str, uplink: BandwidthTrace, seconds: float, timelines: dict[str, Any], path: Path) -> None:
    figure = new_figure(10, 8)
    rate, latency, cut = figure.subplots(3, 1, sharex=True, height_ratios=[1, 1.6, 1.2])
    rates = uplink.rates_bit_s()
    shown = [float(rates[int(at) % len(rates)]) / 1e6 for at in range(int(seconds) + 1)]
    rate.step(range(len(shown)), shown, where="post", color="#333333")
    rate.set_ylabel("uplink (Mbit/s)")
    rate.set_ylim(bottom=0)
    colours = {"oracle": GREEN, "adaptive": BLUE, "server": ORANGE, "device": RED}
    for way in ("server", "device", "oracle", "adaptive"):
        at = [e["at_s"] for e in timelines[way]]
        mean_ms = statistics.mean(over_time(timelines[way])) * 1e3
        latency.plot(
            at,
            [e["latency_s"] * 1e3 for e in timelines[way]],
            color=colours[way],
            linewidth=2 if way == "adaptive" else 1.2,
            linestyle="--" if way == "oracle" else "-",
            label=f"{way} (mean {mean_ms:.0f} ms)",
        )
    latency.set_ylabel("latency (ms, logarithmic)")
    latency.set_yscale("log")
    latency.yaxis.set_major_formatter("{x:.0f}")
    latency.yaxis.set_minor_formatter("{x:.0f}")
    latency.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.16), frameon=False, fontsize=9)
    cuts = {e["index"]: e["cut"] for way in WAYS for e in timelines[way]}
    cuts[max(cuts)], cuts[0] = "device (all)", "server (all)"
    place = {index: at for at, index in enumerate(sorted(cuts))}
    for way, marker, size in (("oracle", "s", 52), ("adaptive", "o", 16)):
        entries = timelines[way]
        cut.scatter(
            [e["at_s"] for e in entries],
            [place[e["index"]] for e in entries],
            s=size,
            marker=marker,
            label=way,
            facecolors="none" if way == "oracle" else BLUE,
            edgecolors=colours[way],
        )
    cut.set_yticks(list(place.values()), [cuts[index] for index in place], fontsize=9)
    cut.set_ylim(-0.6, len(place) - 0.4)
    cut.set_ylabel("cut after")
    cut.set_xlabel("seconds of the trace")
    cut.legend(ncols=2, loc="upper right", fontsize=9)
    for axis in (rate, latency, cut):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"AlexNet over {name}")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, metavar="FILE", help="a recorded uplink")
    parser.add_argument("--start", type=float, default=0.0, metavar="SECONDS", help="into the trace")
    parser.add_argument("--seconds", type=float, default=40.0, help="of the trace, for each way")
    parser.add_argument("--out", type=Path, default=RESULTS / "runtime_trace.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    uplink = BandwidthTrace.synthetic(5.95e6, seed=1) if options.trace is None else BandwidthTrace.read(options.trace)
    name = options.trace.stem if options.trace is not None else "a synthetic LTE uplink"
    if options.start:
        uplink = later(uplink, options.start)
    timelines = measure(uplink, options.seconds)
    rows = summary(timelines)
    show(name, rows)
    draw(name, uplink, options.seconds, timelines, options.out.with_suffix(".png"))
    settings = {
        "trace": name,
        "start_s": options.start,
        "seconds": options.seconds,
        "mean_bit_s": round(uplink.bits_available(0.0, options.seconds) / options.seconds),
        "device_s": DEVICE_S,
    }
    write(options.out, {**settings, "ways": rows, "timelines": timelines})


def later(trace: BandwidthTrace, start_s: float) -> BandwidthTrace:
    """The trace from ``start_s`` on, then again from its beginning, in steps of 10 ms."""
    times = [at / 100 for at in range(round(trace.duration_s * 100) + 1)]
    return BandwidthTrace(times, [trace.bits_available(start_s, start_s + at) for at in times], trace.name)


if __name__ == "__main__":
    main()
