"""The sections of docs/evaluation.md that show what was found as it is, from the files of results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import zoo
from benchmarks.evaluate import pictures, today
from benchmarks.evaluate.configurations import HELD_OUT, MEASURED
from benchmarks.evaluate.markdown import cut, percent, picture, table, text, times


def configurations(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for row in rows:
        cells = [row["application"], row["device"].upper(), pictures.LINK_NAMES[row["link"]]]
        for goal, scale, digits in (("latency", 1e3, 1), ("energy", 1.0, 3)):
            own = row[goal]
            chosen = own["chosen"][MEASURED]
            held = own["chosen"][HELD_OUT]
            cells += [f"{scale * own[end]:.{digits}f}" for end in ("server_only", "device_only")]
            cells += [f"{scale * chosen['costs']:.{digits}f}", cut(chosen["cut"])]
            if goal == "latency":
                cells.append("the same" if held["cut"] == chosen["cut"] else cut(held["cut"]))
        lines.append(tuple(cells))
    return "\n\n".join(
        [
            text(
                """
                Measured costs. Server, device and ours: all on the server, all on the device, and the planner's cut,
                which is named by the last layer on the device.
                """
            ),
            table(
                (
                    "application",
                    "device",
                    "link",
                    "server, ms",
                    "device, ms",
                    "ours, ms",
                    "cut",
                    "cut, held out",
                    "server, J",
                    "device, J",
                    "ours, J",
                    "cut for energy",
                ),
                lines,
            ),
        ]
    )


def variants(variants: Mapping[str, Mapping[str, float]]) -> str:
    return "\n\n".join(
        [
            text("What the best cuts gain at measured costs, counted otherwise:"),
            table(
                (
                    "",
                    "times faster, vision and speech",
                    "at most",
                    "energy saved, vision and speech",
                    "energy saved, all",
                ),
                [
                    (
                        name,
                        f"{own['latency_mean']:.2f}×",
                        times(own["latency_most"]),
                        percent(own["energy_saved_mean"]),
                        percent(own["energy_saved_mean_of_all"]),
                    )
                    for name, own in variants.items()
                ],
            ),
            text(
                """
                Elsewhere on this page links have no round trip and answers take no time, as in the paper, and the LTE
                radio's tail is left out, as for inferences that follow each other.
                """
            ),
        ]
    )


def alexnet() -> str:
    return "\n\n".join(
        [
            picture(
                pictures.LAYERS, "What each layer of AlexNet takes on the Tegra K1, and how many bytes it hands on"
            ),
            text(
                """
                Measured by the authors. Convolutions take long and hand on much; pool5 hands on less than the picture
                has, and behind it most of the time is still to be spent.
                """
            ),
            picture(pictures.CUTS, "Latency and energy of AlexNet cut after each layer, with a star at the best cut"),
        ]
    )


def networks(networks: Mapping[str, Mapping[str, Any]], right: float) -> str:
    return "\n\n".join(
        [
            text(
                f"""
                [`benchmarks/zoo.py`](../benchmarks/zoo.py) builds them. LeNet is trained on scikit-learn's digits, and
                reads {percent(right)} of those rightly that it was not trained on; the other weights are random, which
                changes no cost.
                """
            ),
            table(
                ("application", "network", "layers of the authors", "parameters", "input, bytes"),
                [
                    (
                        name,
                        zoo.NETWORKS[name],
                        str(own["layers"]),
                        f"{own['parameters'] / 1e6:.2f} M",
                        f"{own['input_bytes']:,}",
                    )
                    for name, own in networks.items()
                ],
            ),
        ]
    )


def networks_of_today(results: Mapping[str, Mapping[str, Any]], machine: str) -> str:
    lines = []
    for name, own in results.items():
        cells = [name, f"{own['parameters'] / 1e6:.1f} M", f"{own['input_bytes']:,}", f"{1e3 * own['measured_s']:.0f}"]
        for link in today.LINKS:
            row = own["links"][link]
            best_end = min(row["server_only_s"], row["device_only_s"])
            gain = f", {best_end / row['latency_s']:.2f}×" if row["cut"] not in ("server", "device") else ""
            cells.append(f"{cut(row['cut'])}{gain} ({times(row['server_only_s'] / row['latency_s'])})")
        lines.append(tuple(cells))
    return "\n\n".join(
        [
            text(
                f"""
                Measured on one thread of this machine ({machine}), which is the server; the device is emulated, at
                {today.SLOWER:g} times these times. Links are the presets, with their round trips; tensors are sent as
                they are, and pictures as bytes. Each cell names the best place for latency; in brackets stands how
                many times faster it is than all on the server, and before that, for a cut in between, how many times
                faster than the better end.
                """
            ),
            table(
                (
                    "network",
                    "parameters",
                    "input, bytes",
                    "here, ms",
                    *(pictures.LINK_NAMES[link] for link in today.LINKS),
                ),
                lines,
            ),
            text(
                """
                Networks of today seldom have a layer as small as AlexNet's pool5 so early: without a codec one end or
                the other is mostly the best. [Where a split pays](planning.md#where-a-split-pays) says what codecs
                change in that.
                """
            ),
        ]
    )


def datacenter(path: Path) -> str:
    results = json.loads(path.read_text())["results"]
    published = results["published"]
    parts = [
        text(
            f"""
            Simulated: {results["simulated"]["servers"]} servers, and the eight applications in equal shares at measured
            costs. How many times as many inferences the servers can take as with the status quo, with 95 % intervals;
            published: {published["wifi"]}× over Wi-Fi, {published["lte"]}× over LTE, {published["3g"]}× over 3G,
            {published["most"]}× at most. “Any” means that every application runs on the device, so that no query
            reaches a server. [Planning a datacenter](simulation.md) has the rest.
            """
        )
    ]
    for name, rows in results["tables"].items():
        parts += [f"{name[0].upper()}{name[1:]}:", _gain_table(rows)]
    return "\n\n".join(parts)


def _gain_table(rows: Iterable[Mapping[str, Any]]) -> str:
    found: dict[float, dict[str, str]] = {}
    for row in rows:
        gain = row["gain"]
        shown = "any" if gain is None else f"{gain['value']:.2f}× ({gain['low']:.2f} … {gain['high']:.2f})"
        found.setdefault(row["gpu_share"], {})[row["link"]] = shown
    links = list(next(iter(found.values())))
    return table(
        ("devices with a GPU", *(pictures.LINK_NAMES.get(link, link) for link in links)),
        [(percent(share), *(own[link] for link in links)) for share, own in found.items()],
    )
