"""Networks of today, split between two processes over an emulated link, with every way that counts really run.

The device is this process, on one core, where everything that a backend or a codec computes takes ten times as long.
The server is another process, on the other core, where there are two. Between them is an emulated link. Each side may
run its part by eager PyTorch, by ONNX Runtime, or by OpenVINO in bfloat16, and the boundary may cross as it is, or
compressed without loss; pictures also as PNG. EfficientNet-Lite0, whose weights are trained, may also change some of
its answers, by codecs that benchmarks.codec_rates has judged.

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
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

import torchsurgeon as ts
from benchmarks.evaluate.rivals.rival import seconds
from benchmarks.evaluate.study import BACKENDS, LINKS, SLOWER, Study, network, on_one_core, slow_codecs, way_of
from benchmarks.support import result_file, tail_process
from benchmarks.support.slow_backend import SlowBackend
from torchsurgeon.backends import find_backend
from torchsurgeon.backends.openvino import computes_bfloat16
from torchsurgeon.emulate import LinkEmulator, SlowDevice
from torchsurgeon.link import PRESETS
from torchsurgeon.planning import Row
from torchsurgeon.profiling import provenance
from torchsurgeon.runtime import Inference
from torchsurgeon.serve import ModelRegistry, Server, create_app

OUT = result_file.RESULTS / "evaluation" / "end-to-end.json"
NETWORKS = ("EfficientNet-Lite0", "MobileNetV3", "AlexNet", "ResNet-50", "SSDlite", "ViT-B/16", "BERT")
SLOW = ("SSDlite", "ViT-B/16", "BERT")
"""Those that take ten minutes and more each, so that ``make evaluate`` leaves their rows as they are."""
QUICK, QUICK_LINKS = ("MobileNetV3",), ("wifi",)
_NEAR, _MOST_NEAR = 1.5, 6
"""Ways that are foretold to take at most so many times as long as the best are run, at most so many."""
_LONG_S, _LONG_REPEATS = 1.0, 3
_PATIENCE_S = 120.0
_PARTS = ("head_s", "encode_s", "uplink_s", "tail_s", "downlink_s", "decode_s")


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
    found = {}
    with on_one_core() as other:
        for name in names:
            begun_s = time.monotonic()
            found[name] = _over_all(Study(name, repeats), tuple(links), other)
            found[name]["seconds"] = round(time.monotonic() - begun_s)
            found[name] |= {"bfloat16": computes_bfloat16(), "environment": provenance()}
            told(f"{name}: run over {len(found[name]['links'])} links")
    return found


def _over_all(study: Study, links: tuple[str, ...], core: int | None) -> dict[str, Any]:
    """Return what every way takes over each of the links, with the server on a core."""
    row: dict[str, Any] = {
        "layers": len(study.graph.layers),
        "input_bytes": study.graph.points[0].size_bytes,
        "eager_s": study.server["eager"].total_s,
        "links": {},
    }
    with ExitStack() as stack:
        served = stack.enter_context(tail_process.apart(_serve, study.name, core))
        port = served.recv()
        emulator = stack.enter_context(LinkEmulator(0, "127.0.0.1", port, PRESETS[links[0]]))
        stack.enter_context(slow_codecs())
        runs = Runs(study, f"http://127.0.0.1:{emulator.port}", served, stack)
        local = _timed(study, runs, _device_only(study), None)
        for link in links:
            emulator.set_link(PRESETS[link])
            row["links"][link] = _over(study, runs, link, local)
    return row


def _over(study: Study, runs: Runs, link: str, local: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what every way takes over one link."""
    first = next(iter(study.modes.values()))
    pairs, modes = [], {}
    ways: dict[str, Row] = {}
    for device in BACKENDS:
        for server in BACKENDS:
            planned = study.planned(link, (device,), (server,), first.codecs)
            assert planned.server_only is not None
            pairs.append({"device": device, "server": server, "chosen": way_of(planned.terms.row)})
            ways |= {way_of(row): row for row in (planned.terms.row, planned.server_only.row)}
    for name, mode in study.modes.items():
        planned = study.planned(link, mode.backends, mode.backends, mode.codecs)
        assert planned.server_only is not None
        near = sorted(((study.foretold_s(row, link), row) for row in mode.frontier.rows), key=lambda one: one[0])
        rows = [row for value, row in near[:_MOST_NEAR] if value <= _NEAR * near[0][0]]
        rows += [planned.terms.row, planned.server_only.row]
        ways |= {way_of(row): row for row in rows}
        modes[name] = {"chosen": way_of(planned.terms.row), "ways": sorted({way_of(row) for row in rows})}
    timed = local | _timed(study, runs, {key: row for key, row in ways.items() if not row.on_device}, link)
    for name, mode in study.modes.items():
        # Ends and pairs count in every mode that allows their backends and keeps as many answers.
        modes[name]["ways"] = sorted(
            key for key in timed if key in modes[name]["ways"] or mode.allows(key, key in ways and ways[key].lossless)
        )
    return {"modes": modes, "pairs": pairs, "ways": timed}


def _device_only(study: Study) -> dict[str, Row]:
    """Return everything on the device, by each backend."""
    rows = [study.planned("wifi", (one,), ("eager",), None).device_only.row for one in BACKENDS]
    return {way_of(row): row for row in rows}


def _timed(study: Study, runs: Runs, ways: Mapping[str, Row], link: str | None) -> dict[str, dict[str, Any]]:
    """Return what ways were foretold to take, and took, by their keys."""
    return {
        key: {
            "cut": "device" if row.on_device else "server" if row.index == 0 and row.layers is None else row.name,
            "foretold_s": row.head_s if link is None else study.foretold_s(row, link),
            **taken,
        }
        for (key, row), taken in zip(ways.items(), runs.timed(tuple(ways.values())), strict=True)
    }


class Runs:
    """Runs ways of one network, each by a ``SplitModule`` with its two backends."""

    def __init__(self, study: Study, url: str, served: Any, stack: ExitStack) -> None:
        self._study, self._url, self._served, self._stack = study, url, served, stack
        self._splits: dict[tuple[str, str], ts.SplitModule] = {}

    def timed(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Return for each way the median and the quartiles of its seconds, and where they went.

        The ways take turns in a new random order in each round. A call that takes longer than a second is run less
        often, since a longer one varies less.
        """
        accounts: list[list[Inference]] = [[] for _ in rows]
        taken_s: list[list[float]] = [[] for _ in rows]
        for row in rows:
            self.ready(self.cut(row))
        for number in range(self._study.repeats):
            for index in random.sample(range(len(rows)), len(rows)):
                if number >= _LONG_REPEATS and taken_s[index][0] > _LONG_S:
                    continue
                split = self.cut(rows[index])
                taken_s[index].append(seconds(lambda split=split: split(self._study.example)))
                assert split.last is not None
                assert split.last.degraded is None, split.last.degraded
                # Behind a part that the backend did not run, nothing would be slowed down.
                assert split.last.backend == rows[index].backend, f"{split.last.backend}, not {rows[index].backend}"
                accounts[index].append(split.last)
        return [_account(*both) for both in zip(taken_s, accounts, strict=True)]

    def cut(self, row: Row) -> ts.SplitModule:
        """Return the module that runs a way, cut and coded like that."""
        split = self.split(row.backend, "eager" if row.on_device else row.server_backend)
        split.partition = "device" if row.on_device else row.point(split.graph)
        split.codec = row.codec
        return split

    def split(self, device: str, server: str) -> ts.SplitModule:
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

    def ready(self, split: ts.SplitModule) -> None:
        """Have both sides build their parts, and wait until they have."""
        split(self._study.example)
        end_s = time.monotonic() + _PATIENCE_S
        while time.monotonic() < end_s:
            self._served.send("built?")
            if self._served.recv():
                break
            time.sleep(0.05)
        split(self._study.example)


def _account(taken_s: Sequence[float], accounts: Sequence[Inference]) -> dict[str, Any]:
    """Return the median and the quartiles of seconds, and the medians of their parts."""
    low, median, high = statistics.quantiles(taken_s, n=4)
    spent = {part: round(statistics.median(getattr(one, part) for one in accounts), 6) for part in _PARTS}
    return {
        "measured_s": round(median, 6),
        "low_s": round(low, 6),
        "high_s": round(high, 6),
        "sent_bytes": accounts[-1].sent_bytes,
        "bits": accounts[-1].bits,
        "spent": spent,
    }


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
