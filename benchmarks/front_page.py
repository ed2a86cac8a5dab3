"""What a newcomer wants to know first, for the README and the site's first page: when a split pays, in a few figures.

Every figure is taken from a file in ``benchmarks/results/``, and links the section that shows where it comes from.

    python -m benchmarks.front_page   # writes both pages
"""

from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import backends, server_rivals, split_plane
from benchmarks.device import figures as device_figures
from benchmarks.evaluate import configurations, end_to_end, end_to_end_page, page, today
from benchmarks.evaluate.markdown import percent, times
from benchmarks.support import result_file

ROOT = result_file.RESULTS.parents[1]
PAGES = {ROOT / "README.md": "docs/", ROOT / "docs" / "index.md": ""}
"""The pages, and where their links to docs/ begin."""
BEGIN, END = "<!-- figures, by benchmarks.front_page -->", "<!-- end of figures -->"
ON_GPU = "ViT-B/16 after six of its layers"
_PLAIN = "boundaries as they are"
PLANE = "fitted; 97 % kept as measured; pictures take what encoding them takes"


def figures(docs: str, folder: Path = page.FOLDER) -> str:
    """Return the figures as a list in Markdown.

    Args:
        docs: where links to docs/ begin.
        folder: where the evaluation's files of results are.
    """
    points = [_streams(docs), _end_to_end(docs, folder), _paper(docs, folder), _server(docs), _backends(docs)]
    lines = (textwrap.fill(" ".join(point.split()), 118, break_on_hyphens=False) for point in points)
    return "".join(f"- {textwrap.indent(line, '  ').strip()}\n" for line in lines)


def _streams(docs: str) -> str:
    every = result_file.known(split_plane.OUT)["planes"]
    one, stream = (every[PLANE][name] for name in split_plane.OBJECTIVES)
    fitted = [plane for name, plane in every.items() if name.startswith("fitted")]
    of_one, of_stream = (_between([plane[name]["share"] for plane in fitted]) for name in split_plane.OBJECTIVES)
    return f"""**[Up to {times(stream["most_gain"])} as many photographs a
        second]({docs}planning.md#where-a-split-pays)** as with everything on the device or everything on the server,
        whichever is better: this is computed for EfficientNet-Lite0, from what its parts took when they were measured.
        Every uplink from 0.1 to 100 Mbit/s was combined with every device that is 1 to 100 times slower than the
        server. For such a stream a split is the best way in {of_stream} of these combinations. For one photograph at a
        time it is the best way in {of_one}, and up to {times(one["most_gain"])} as fast. What crosses is coded by a
        [codec that was fitted to the cut]({docs}codecs.md#a-codec-made-for-a-cut); how many combinations it is depends
        on how surely at least 97 % of the answers stay the same, and on whether a camera encodes its pictures by
        itself. {_lossless(every)}"""


def _lossless(planes: Mapping[str, Any]) -> str:
    """Say what is left where boundaries cross without loss."""
    plain = [plane for name, plane in planes.items() if name.startswith(_PLAIN)]
    picture, frames = split_plane.OBJECTIVES
    one, stream = (_between([plane[name]["share"] for plane in plain]) for name in (picture, frames))
    most = times(max(plane[frames]["most_gain"] for plane in plain))
    return f"Where boundaries cross without loss it is {stream} for a stream, up to {most}, and {one} for one picture."


def _between(shares: list[float]) -> str:
    least, most = percent(min(shares), 0), percent(max(shares), 0)
    return most if least == most else f"{least.removesuffix(' %')} to {most}"


def _end_to_end(docs: str, folder: Path) -> str:
    path = folder / end_to_end.OUT.name
    if not path.exists():
        return _planned(docs, folder)
    found = end_to_end_page.summary(result_file.known(path))
    over_device, over_server = times(found["over_device"]), times(found["over_server"])
    return f"""**[{over_device} as fast as the device alone]({docs}evaluation.md#end-to-end)** and {over_server} as fast
        as the server alone, in the geometric mean over {found["cases"]} cases, and {found["gain"]:.3f}× as fast as the
        better of the two: networks of today that really ran on a
        slowed-down device and a server, over emulated 3G, LTE and Wi-Fi. In nearly all of these cases
        one of the two ends is the best, and the planner picks it before anything is run: its choices reach
        {percent(found["share"])} of the best speed-up. {end_to_end_page.splits(found["between"])}"""


def _planned(docs: str, folder: Path) -> str:
    found = page.read(folder, page.TODAY)["results"]
    cuts = [link["cut"] for row in found.values() for link in row["links"].values()]
    ends = sum(cut in ("device", "server") for cut in cuts)
    return f"""**[No gain in {ends} of {len(cuts)} cases]({docs}evaluation.md#networks-of-today)** with {len(found)}
        networks of today over 3G, LTE and Wi-Fi, on a device {today.SLOWER:g} times slower than the server, where
        tensors cross as they are. There one of both ends is the fastest way, and the planner chooses it."""


def _paper(docs: str, folder: Path) -> str:
    rows = page.read(folder, page.CONFIGURATIONS)["results"]["configurations"]
    every = configurations.summary(rows, configurations.MEASURED)
    apart = configurations.summary(page.without_language(rows), configurations.MEASURED)
    apart_rows = page.without_language(rows)
    inside = sum(row["latency"]["best_cut"] not in ("server", "device") for row in apart_rows)
    mean, most = times(apart["latency_mean"]), times(apart["latency_most"])
    return f"""**[{mean} as fast in the mean]({docs}evaluation.md#beside-the-published-figures)** as everything on the
        server, and {most} at most: the Neurosurgeon paper's networks for vision and speech, by what its authors
        measured. The planner finds the best cut in {every["latency_optimal"]} of {every["configurations"]}
        configurations, and that is an end of the network in most: a split is the best in {inside} of the
        {len(apart_rows)} for vision and speech."""


def _server(docs: str) -> str:
    read = json.loads(device_figures.SERVING.read_text())
    gains = {name: server_rivals.over_by_hand(found["rows"]["20"]) for name, found in read["results"].items()}
    (alone,) = (gain for name, gain in gains.items() if name != ON_GPU)
    every = result_file.known(server_rivals.OUT).values()
    on_cpu = [server_rivals.over_by_hand(found["rows"]["20"]) for found in every]
    least, most = min(on_cpu), max(on_cpu)
    return f"""**[{times(gains[ON_GPU])} as many requests a second]({docs}serving.md#speed)** as the quicker of two
        servers that one writes by hand with Starlette: twenty connections ask for the second half of ViT-B/16, which an
        {read["environment"]["gpu"]} computes, and requests that wait run together. With ResNet-18, whose requests were
        not joined in that run, it is {times(alone)}. On two processor cores it is {least:.2f} to {most:.2f}×."""


def _backends(docs: str) -> str:
    shares = [
        share
        for rows in result_file.known(backends.OUT).values()
        for row in rows
        if row["part"] == "whole" and row["threads"] == 1
        if (share := backends.over(row, "onnxruntime", "eager")) is not None
    ]
    least, middle, most = (percent(value, 0) for value in (min(shares), statistics.median(shares), max(shares)))
    return f"""**[{middle} of the time]({docs}backends.md#what-it-costs)**: ONNX Runtime takes so much of what eager
        PyTorch takes to run a whole network on one core, in the median of {len(shares)} networks ({least} to {most}).
        This needs no split, and each side of a split can run by it, too."""


def main() -> None:
    for path, docs in PAGES.items():
        result_file.show(path, BEGIN, END, figures(docs))


if __name__ == "__main__":
    main()
