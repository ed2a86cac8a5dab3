"""The paper's eight applications on the authors' machines, as frontiers of this package's planner.

The authors published the milliseconds of every layer on a Tegra K1's CPU and GPU and on their server, and the sizes of
all boundary tensors (public repository claritylab/djinn, branch mobile, June 2015, graph-gen/offloading). The layers of
GPUs were timed without waiting for the GPU, so of these times only the total of a network is used. It is spread over
the layers in proportion to the longer of two bounds: floating-point operations at the chip's peak, and bytes of weights
and tensors at the peak of its memory. ``applications.json`` holds the seconds that result.

    python -m benchmarks.evaluate.applications DIRECTORY   # writes applications.json from graph-gen/offloading
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections import defaultdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from torchsurgeon.planning import Frontier, Row
from torchsurgeon.planning.row import columns, non_dominated

FILE = Path(__file__).parent / "applications.json"
APPLICATIONS = ("imc", "vgg", "face", "dig", "asr", "pos", "ner", "chk")
DEVICES = ("cpu", "gpu")
SOURCE = (
    "claritylab/djinn, branch mobile (June 2015), graph-gen/offloading: measured by the authors of Neurosurgeon. "
    "Totals on GPUs are measured, and are spread over the layers by flops and bytes."
)
PICTURE_BYTES = {"imc": 154_587, "vgg": 150_528, "face": 69_312, "dig": 78_400}
"""Pictures with one byte for each value, as a camera gives them; the authors' files count four."""
BATCH = defaultdict(lambda: 1, dig=100, asr=548, pos=28, ner=28, chk=28)
"""How many images, frames or words the authors' networks take at once; each weight is read once for all of them."""
PEAKS = {"gpu": (327e9, 14.9e9), "server": (4.29e12, 288e9)}
"""Of the Tegra K1's GPU and the Tesla K40: floating-point operations and bytes per second, from data sheets."""
POWER_W = {
    "cpu": {"imc": 6.4, "face": 6.4, "vgg": 9.2, "asr": 8.0, "pos": 5.9, "ner": 7.1, "chk": 6.3},
    "gpu": {"imc": 8.7, "face": 9.5, "vgg": 8.7, "asr": 12.4, "pos": 5.2, "ner": 5.1, "chk": 5.1},
}
"""The device's power while it computes each application, as the authors measured it. They give none for dig, which here
has the mean of the others."""

Array = NDArray[np.float64]


def applications(pictures: str = "uint8", path: Path = FILE) -> dict[str, dict[str, Frontier]]:
    """Return the frontier of each application on each kind of device, against the server's GPU.

    Args:
        pictures: how pictures cross the link: ``"uint8"`` or ``"float32"``.
        path: what this script wrote.
    """
    found = {}
    for name, data in json.loads(path.read_text())["applications"].items():
        sizes_bytes = np.array(data["sizes_bytes"])
        if pictures == "uint8":
            sizes_bytes[0] = PICTURE_BYTES.get(name, sizes_bytes[0])
        found[name] = {
            kind: frontier(
                name, kind, data["layers"], sizes_bytes, np.array(data[f"{kind}_s"]), np.array(data["server_s"])
            )
            for kind in DEVICES
        }
    return found


def frontier(name: str, kind: str, layers: list[str], sizes_bytes: Array, device_s: Array, server_s: Array) -> Frontier:
    """Return the frontier of one application, whose layers form a chain, on one kind of device."""
    power_w = POWER_W[kind].get(name, statistics.fmean(POWER_W[kind].values()))
    head_s = np.concatenate([[0.0], np.cumsum(device_s)])
    # Summed from the end, so that what is left after the last layer is exactly 0.
    tail_s = np.concatenate([np.cumsum(server_s[::-1])[::-1], [0.0]])
    rows = []
    for k, size_bytes in enumerate(sizes_bytes):
        last = k == len(layers)
        rows.append(
            Row(
                index=k,
                name=layers[k - 1] if k else "input",
                codec="raw",
                head_s=float(head_s[k]),
                encode_s=0.0,
                size_bytes=0.0 if last else float(size_bytes),
                tail_s=float(tail_s[k]),
                decode_s=0.0,
                device_j=power_w * float(head_s[k]),
                raw_input=k == 0,
                on_device=last,
            )
        )
    kept = sorted({0, len(layers), *non_dominated(columns(rows))})
    return Frontier(f"{name} on the {kind}", "", 1, len(layers), int(sizes_bytes[-1]), tuple(rows[k] for k in kept))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="the folder graph-gen/offloading of the authors' repository")
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args()
    folder = options.directory
    milliseconds = {
        "cpu": read(folder / "gflops" / "gflops-cpu" / "mobile-cpu-layer.csv"),
        "gpu": read(folder / "gflops" / "gflops-gpu" / "mobile-gpu-layer.csv"),
        "server": read(folder / "gflops" / "gflops-gpu" / "server-gpu-layer.csv"),
    }
    sizes, flops = (
        read(folder / "layer-profile" / "layer-sizes.csv"),
        read(folder / "layer-profile" / "layer-flops.csv"),
    )
    found = {}
    for name in APPLICATIONS:
        layers = [row["layer"] for row in sizes[name]]
        mebibytes = [float(sizes[name][0]["in_size"]), *(float(row["out_size"]) for row in sizes[name])]
        found[name] = {"layers": layers, "sizes_bytes": [round(2**20 * size) for size in mebibytes]}
        counted = np.array([float(row["flops"]) for row in flops[name]])
        for where, rows in milliseconds.items():
            times_s = np.array([float(row["lat"]) for row in rows[name]]) / 1e3
            if where in PEAKS:
                bound_s = bounds_s(layers, np.array(found[name]["sizes_bytes"]), counted, BATCH[name], *PEAKS[where])
                times_s = times_s.sum() * bound_s / bound_s.sum()
            found[name][f"{where}_s"] = [float(f"{time_s:.6g}") for time_s in times_s]
    options.out.write_text(json.dumps({"source": SOURCE, "applications": found}, indent=1) + "\n")
    print(f"written to {options.out}")


def read(path: Path) -> dict[str, list[dict[str, str]]]:
    """Return the rows of one of the authors' files by application."""
    found: dict[str, list[dict[str, str]]] = defaultdict(list)
    with path.open() as lines:
        for row in csv.DictReader(lines):
            found[row.get("model") or row["network"]].append(row)
    return found


def bounds_s(layers: list[str], sizes_bytes: Array, flops: Array, batch: int, peak: float, memory: float) -> Array:
    """Return the least seconds of each layer on a chip, shape (layers,).

    Args:
        layers: the layers' names.
        sizes_bytes: the bytes of the input and of each layer's output, shape (layers + 1,).
        flops: each layer's floating-point operations for the whole batch.
        batch: how many inputs are computed at once.
        peak: the chip's floating-point operations per second.
        memory: the bytes per second of its memory.
    """
    # A weight of a linear or locally connected layer is multiplied and added once per input; convolutions have few.
    weighty = np.array([layer.startswith(("fc", "ip", "local")) or "inner" in layer for layer in layers])
    moved = sizes_bytes[:-1] + sizes_bytes[1:] + np.where(weighty, 4 * flops / (2 * batch), 0.0)
    return np.maximum(flops / peak, moved / memory)


if __name__ == "__main__":
    main()
