"""Networks split between a device without a GPU and a server with one, over emulated links.

The device is this process, on one core, where all that is computed for an answer takes ten times as long; it runs its
part by ONNX Runtime, or by eager PyTorch. The server is another process, whose network is on the GPU, in eager PyTorch.
Both profiles are measured first. Then take turns, over each link: everything on the device, everything on the server
with the pixels as they are and as its best codec makes them, and the way that the planner chooses.

    python -m benchmarks.device.split --out split.json
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torchsurgeon as ts
from benchmarks.evaluate.datacenter_picture import LINK_NAMES
from benchmarks.evaluate.end_to_end import Runs
from benchmarks.evaluate.markdown import cut as where
from benchmarks.evaluate.markdown import table, text, times
from benchmarks.evaluate.study import LINKS, SLOWER, Study, network, on_one_core, slow_codecs, way_of
from benchmarks.support import result_file, tail_process
from torchsurgeon.backends import deviation
from torchsurgeon.emulate import LinkEmulator
from torchsurgeon.link import PRESETS
from torchsurgeon.planning import Row
from torchsurgeon.profiling import LayerProfile
from torchsurgeon.serve import ModelRegistry, Server, create_app

NETWORKS = ("MobileNetV3", "AlexNet", "ResNet-50")
BACKENDS = ("eager", "onnxruntime")
DEVICE, PIXELS, ENCODED, OURS = "device", "server, pixels", "server, encoded", "ours"
KEPT = result_file.RESULTS / "device" / "h200" / "split.json"
_PROFILE_S = 3.0


def run(name: str, device: str, rounds: int) -> dict[str, Any]:
    """Return what one network takes in all ways over all links.

    Args:
        name: the network.
        device: where the server's network is.
        rounds: how often each way is run.
    """
    with on_one_core() as core, ExitStack() as stack:
        served = stack.enter_context(tail_process.apart(_serve, name, device, core))
        port, profile = served.recv()
        study = Study(name, rounds, _PROFILE_S, backends=BACKENDS, server={"eager": LayerProfile.from_json(profile)})
        expected: Tensor = study.model(study.example)
        emulator = stack.enter_context(LinkEmulator(0, "127.0.0.1", port, PRESETS[LINKS[0]]))
        stack.enter_context(slow_codecs())
        runs = Runs(study, f"http://127.0.0.1:{emulator.port}", served, stack)
        found: dict[str, Any] = {
            "server_s": study.server["eager"].total_s,
            "device_s": {one: study.device[one].total_s for one in BACKENDS},
            "links": {},
        }
        for link in LINKS:
            emulator.set_link(PRESETS[link])
            ways = ways_of(study, link)
            rows: dict[str, dict[str, Any]] = {}
            taken_s: dict[str, list[float]] = {what: [] for what in ways}
            for number in range(-1, rounds):
                for what in random.Random(number).sample(list(ways), len(ways)):
                    split = runs.cut(ways[what])
                    if number < 0:
                        runs.ready(split)
                    begun_s = time.perf_counter()
                    answer = split(study.example)
                    took_s = time.perf_counter() - begun_s
                    last = split.last
                    assert last is not None
                    assert last.degraded is None, last.degraded
                    if number < 0:
                        rows[what] = {
                            "way": way_of(ways[what]),
                            "foretold_s": study.foretold_s(ways[what], link),
                            "deviation": float(f"{deviation(answer, expected):.2g}"),
                            "bits": last.bits,
                            "sent_bytes": last.sent_bytes,
                        }
                    else:
                        taken_s[what].append(took_s)
            for what, row in rows.items():
                low, median, high = statistics.quantiles(taken_s[what], n=4)
                row |= {"latency_s": median, "low_s": low, "high_s": high}
                print(
                    f"{name:14} {link:5} {what:16} {median * 1e3:9.1f} ms [{low * 1e3:.1f} … {high * 1e3:.1f}], "
                    f"foretold {row['foretold_s'] * 1e3:9.1f}, {row['sent_bytes']} bytes, {row['deviation']:g} away, "
                    f"{row['way']}",
                    flush=True,
                )
            found["links"][link] = rows
    return found


def section() -> str:
    """Return what has been kept of one run, as Markdown."""
    kept = json.loads(KEPT.read_text())
    lines: list[tuple[str, ...]] = []
    speeds: dict[str, list[float]] = {DEVICE: [], ENCODED: []}
    late: list[float] = []
    for name, found in kept["results"].items():
        for link, rows in found["links"].items():
            ours, alone = rows[OURS], rows[DEVICE]
            late.append(alone["latency_s"] / alone["foretold_s"])
            for end, values in speeds.items():
                values.append(rows[end]["latency_s"] / ours["latency_s"])
            taken = [f"{rows[way]['latency_s'] * 1e3:.0f}" for way in (DEVICE, PIXELS, ENCODED, OURS)]
            chosen = where(ours["way"].partition("|")[0])
            lines.append((name, LINK_NAMES[link], *taken, f"{ours['foretold_s'] * 1e3:.0f}", chosen))
    device, server = (statistics.geometric_mean(values) for values in speeds.values())
    most = max(speeds[DEVICE])
    slower, gpu = kept["environment"]["slower"], kept["environment"]["gpu"]
    said = f"""The network is on an {gpu} at the server, in eager PyTorch. The device is a process on one core of the
    same machine, on which ONNX Runtime and codecs take {slower:g} times as long, and the link is emulated. In the
    geometric mean ours is {times(device)} as fast as the device alone ({times(most)} at most), and {times(server)} as
    fast as the server alone with the picture in its best form; {times(min(speeds[ENCODED]))} at least. Everything on
    the device took {min(late):.2f} to {max(late):.2f} times as long as was foretold from a profile, whose runs have no
    pauses between them. `benchmarks/device/run.sh` runs it (step `split`)."""
    heads = ("network", "link", "device, ms", "server, pixels, ms", "server, encoded, ms", "ours, ms", "foretold, ms")
    return text(said) + "\n\n" + table((*heads, "where ours cuts"), lines)


def ways_of(study: Study, link: str) -> dict[str, Row]:
    """Return the ways that take turns over a link."""
    lossless = study.modes["float32"].codecs
    planned = study.planned(link, BACKENDS, ("eager",), lossless)
    plain = study.planned(link, BACKENDS, ("eager",), None).server_only
    coded = study.planned(link, BACKENDS, ("eager",), lossless).server_only
    assert plain is not None
    assert coded is not None
    return {DEVICE: planned.device_only.row, PIXELS: plain.row, ENCODED: coded.row, OURS: planned.terms.row}


def _serve(name: str, device: str, core: int | None, told: Any) -> None:
    """Serve a network on a device; every question is whether all has been built, which eager PyTorch need not do."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, example = network(name)
    model, example = model.to(device), example.to(device)
    profile = ts.profile(ts.trace(model, example), device, inputs=[example], repeats=20, meter=None)
    registry = ModelRegistry(profiler=None)
    registry.add("model", model, (example,))
    with Server(create_app(registry), port=0) as server:
        told.send((server.port, profile.to_json()))
        while True:
            told.recv()
            told.send(True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="where the server's network is")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    gpu = {"gpu": torch.cuda.get_device_name()} if options.device == "cuda" else {}
    found: dict[str, Any] = {}
    for name in options.networks:
        found[name] = run(name, options.device, options.rounds)
        result_file.write(options.out, found, slower=SLOWER, **gpu)


if __name__ == "__main__":
    main()
