"""Networks of today, split between two processes over an emulated link, with every way that counts really run.

The device is this process, on one core, where everything that a backend runs takes ten times as long; what codecs do is
not slowed down. The server is another process, on the other core, where there are two. Between them is an emulated
link. Each side may run its part by eager PyTorch, by ONNX Runtime, or by OpenVINO in bfloat16, and the boundary may
cross as it is, or compressed without loss; pictures also as PNG.

From profiles of the backends, the planner foretells what every way takes. Run over each link are: everything on the
device and everything on the server, by each backend and in the best form of the input; the way that the planner chooses
for each pair of backends; and every way that can be the best over some link and is foretold to take at most so much
longer than the best. So it is known how much longer the planner's choice takes than the best there is.

    python -m benchmarks.evaluate.end_to_end                         # results/evaluation/end-to-end.json
    python -m benchmarks.evaluate.end_to_end --networks MobileNetV3  # this one anew
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

import torchsurgeon as ts
from benchmarks import zoo
from benchmarks.support import result_file, tail_process
from benchmarks.support.slow_backend import SlowBackend
from torchsurgeon.backends import find_backend
from torchsurgeon.codec import CodecTable, measure
from torchsurgeon.emulate import LinkEmulator, SlowDevice
from torchsurgeon.link import PRESETS
from torchsurgeon.planning import Frontier, Row
from torchsurgeon.serve import ModelRegistry, Server, create_app

OUT = result_file.RESULTS / "evaluation" / "end-to-end.json"
SLOWER = 10.0
"""How many times as long the emulated device takes."""
NETWORKS = ("EfficientNet-Lite0", "MobileNetV3", "AlexNet", "ResNet-50", "SSDlite", "ViT-B/16", "BERT")
QUICK = ("MobileNetV3",)
LINKS = ("3g", "lte", "wifi")
BACKENDS = ("eager", "onnxruntime", "openvino:bf16")
LOSSLESS = ("zstd", "png")
_NEAR, _MOST_NEAR = 1.5, 8
"""Ways that are foretold to take at most so many times as long as the best are run, at most so many."""
_BUDGET_S = 10.0
_PATIENCE_S = 120.0


def network(name: str) -> zoo.Made:
    """Return a network and its example; pictures are a photograph, as a camera gives it."""
    from torchsurgeon.demo import photo

    if name == "AlexNet":
        return tail_process.seeded(lambda: zoo.classifier("alexnet")[0], 0), photo()
    model, example = zoo.make(name)
    if name == "SSDlite":
        picture = nn.functional.interpolate(photo().float(), size=(320, 320)).round().to(torch.uint8)
        return zoo.named(("pixels", zoo.Pixels()), ("model", model)), picture
    return model, photo() if example.dtype == torch.uint8 else example


def run(
    names: Iterable[str] = NETWORKS,
    links: Iterable[str] = LINKS,
    *,
    repeats: int = 5,
    told: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Return by network what every way took, and was foretold to take.

    Args:
        names: the networks.
        links: presets of links.
        repeats: how often each way is run.
        told: takes what has been done, a line for each network.
    """
    threads, everywhere = torch.get_num_threads(), os.sched_getaffinity(0)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ts.NoisyProfileWarning)
    warnings.simplefilter("ignore", ts.BackendWarning)
    own, other = tail_process.two_cores()
    found = {}
    try:
        if own is not None:
            os.sched_setaffinity(0, {own})
        for name in names:
            begun_s = time.monotonic()
            with torch.no_grad():
                found[name] = _Study(name, repeats).over(tuple(links), other)
            found[name]["seconds"] = round(time.monotonic() - begun_s)
            told(f"{name}: run over {len(found[name]['links'])} links")
    finally:
        torch.set_num_threads(threads)
        os.sched_setaffinity(0, everywhere)
    return found


class _Study:
    """One network, with its profiles, and with what has been run of it."""

    def __init__(self, name: str, repeats: int) -> None:
        self.name, self.repeats = name, repeats
        self.model, self.example = network(name)
        self.graph = ts.trace(self.model, self.example)
        eager = ts.profile(self.graph, repeats=20, meter=None)
        self.server = {"eager": eager}
        for backend in BACKENDS[1:]:
            self.server[backend] = ts.profile(self.graph, backend=backend, eager=eager, budget_s=_BUDGET_S, meter=None)
        self.device = {backend: profile.scaled(SLOWER) for backend, profile in self.server.items()}
        self.codecs = _codecs(self.graph, self.example)
        self.frontier = Frontier.build(
            self.graph, list(self.device.values()), list(self.server.values()), codecs=self.codecs
        )

    def over(self, links: tuple[str, ...], core: int | None) -> dict[str, Any]:
        """Return what every way takes over each of the links, with the server on a core."""
        row: dict[str, Any] = {
            "layers": len(self.graph.layers),
            "input_bytes": self.graph.points[0].size_bytes,
            "eager_s": self.server["eager"].total_s,
            "links": {},
        }
        with ExitStack() as stack:
            served = stack.enter_context(tail_process.apart(_serve, self.name, core))
            port = served.recv()
            emulator = stack.enter_context(LinkEmulator(0, "127.0.0.1", port, PRESETS[links[0]]))
            runs = _Runs(self, f"http://127.0.0.1:{emulator.port}", served, stack)
            local = [self._timed(runs, end, None) for end in self._ends(len(self.graph.layers))]
            for link in links:
                emulator.set_link(PRESETS[link])
                row["links"][link] = self._over(runs, link, local)
        return row

    def _over(self, runs: _Runs, link: str, local: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what every way takes over one link."""
        pairs = []
        ways: dict[str, Row] = {}
        for device, server in self.pairs():
            planned = self._planned(link, (device,), (server,))
            assert planned.server_only is not None
            pairs.append({"device": device, "server": server, "chosen": _key(planned.terms.row)})
            ways |= {_key(row): row for row in (planned.terms.row, planned.server_only.row)}
        chosen = self._planned(link, BACKENDS, BACKENDS).terms
        near = sorted(((self._foretold_s(row, link), row) for row in self.frontier.rows), key=lambda one: one[0])
        ways |= {_key(row): row for value, row in near[:_MOST_NEAR] if value <= _NEAR * near[0][0]}
        ways[_key(chosen.row)] = chosen.row
        crossing = [row for row in ways.values() if not row.on_device]
        return {
            "chosen": _key(chosen.row),
            "pairs": pairs,
            "ways": local + [self._timed(runs, row, link) for row in crossing],
        }

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Yield the backends of device and server, each with each."""
        for device in BACKENDS:
            for server in BACKENDS:
                yield device, server

    def _ends(self, index: int) -> list[Row]:
        """Return the row of a point by each backend of the device."""
        return [
            next(row for row in self._planned("wifi", (backend,), ("eager",)).rows if row.index == index)
            for backend in BACKENDS
        ]

    def _planned(self, link: str, devices: Iterable[str], servers: Iterable[str]) -> ts.Plan:
        return ts.plan(
            self.graph,
            device=[self.device[one] for one in devices],
            server=[self.server[one] for one in servers],
            link=PRESETS[link],
            codecs=self.codecs,
        )

    def _foretold_s(self, row: Row, link: str) -> float:
        if row.on_device:
            return row.head_s
        crossing_s = PRESETS[link].request_s(row.size_bytes, self.frontier.answer_bytes)
        return row.head_s + row.encode_s + crossing_s + row.decode_s + row.tail_s

    def _timed(self, runs: _Runs, row: Row, link: str | None) -> dict[str, Any]:
        """Return what one way was foretold to take, and took."""
        taken = runs.timed(row)
        return {
            "way": _key(row),
            "cut": "device" if row.on_device else "server" if row.index == 0 and row.layers is None else row.name,
            "foretold_s": row.head_s if link is None else self._foretold_s(row, link),
            **taken,
        }


class _Runs:
    """Runs ways of one network, each by a ``SplitModule`` with its two backends."""

    def __init__(self, study: _Study, url: str, served: Any, stack: ExitStack) -> None:
        self._study, self._url, self._served, self._stack = study, url, served, stack
        self._splits: dict[tuple[str, str], ts.SplitModule] = {}

    def timed(self, row: Row) -> dict[str, Any]:
        """Return the median and the quartiles of the seconds of one way, and where they went."""
        split = self._split(row.backend, "eager" if row.on_device else row.server_backend)
        split.partition = "device" if row.on_device else row.point(split.graph)
        split.codec = row.codec
        self._ready(split)
        accounts, taken_s = [], []
        for _ in range(self._study.repeats):
            begun_s = time.perf_counter()
            split(self._study.example)
            taken_s.append(time.perf_counter() - begun_s)
            assert split.last is not None
            accounts.append(split.last)
        last = accounts[-1]
        assert last.degraded is None, last.degraded
        low, median, high = statistics.quantiles(taken_s, n=4)
        spent = {
            part: round(statistics.median(getattr(one, part) for one in accounts), 6)
            for part in ("head_s", "encode_s", "uplink_s", "tail_s", "downlink_s", "decode_s")
        }
        return {
            "measured_s": round(median, 6),
            "low_s": round(low, 6),
            "high_s": round(high, 6),
            "sent_bytes": last.sent_bytes,
            "ran_by": last.backend,
            "bits": last.bits,
            "spent": spent,
        }

    def _split(self, device: str, server: str) -> ts.SplitModule:
        key = (device, server)
        if key not in self._splits:
            self._splits[key] = self._stack.enter_context(
                ts.SplitModule(
                    self._study.model,
                    self._study.example,
                    server=self._url,
                    partition="device",
                    fallback="error",
                    timeout_s=_PATIENCE_S,
                    backend=SlowBackend(find_backend(device), SlowDevice(SLOWER)),
                    server_backend=server,
                )
            )
        return self._splits[key]

    def _ready(self, split: ts.SplitModule) -> None:
        """Have both sides build their parts, and wait until they have."""
        split(self._study.example)
        end_s = time.monotonic() + _PATIENCE_S
        while time.monotonic() < end_s:
            self._served.send("built?")
            if self._served.recv():
                break
            time.sleep(0.05)
        split(self._study.example)


def _key(row: Row) -> str:
    """Return a way in one text: where it is cut, what runs the parts, and how the boundary crosses."""
    if row.on_device:
        return f"device|{row.backend}"
    layers = "" if row.layers is None else f" {','.join(map(str, row.layers))}"
    return f"{row.name}{layers}|{row.backend}|{row.server_backend}|{row.codec}"


def _codecs(graph: ts.LayerGraph, example: Tensor) -> CodecTable:
    """Return what the codecs without loss make of every point."""
    points = list(range(len(graph.layers)))
    names = [name for name in LOSSLESS if name != "png" or example.dtype == torch.uint8]
    return measure(graph, [example], names, points=points)


def _serve(name: str, core: int | None, told: Any) -> None:
    """Serve a network by all backends; answer whether all tails that were asked for have been built."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, example = network(name)
    registry = ModelRegistry()
    served = registry.add("model", model, (example,), backend=BACKENDS)
    with Server(create_app(registry), port=0) as server:
        told.send(server.port)
        while True:
            told.recv()
            builders = served.backends.builders.values()
            told.send(all(built.tried for builder in builders for built in builder.built()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--links", nargs="+", choices=LINKS, default=LINKS)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    found = result_file.known(OUT)
    for name in options.networks:
        found |= run([name], options.links, repeats=options.repeats, told=lambda what: print(what, flush=True))
        result_file.write(OUT, {one: found[one] for one in NETWORKS if one in found})


if __name__ == "__main__":
    main()
