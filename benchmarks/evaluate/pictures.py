"""The paper's figures, drawn again from the authors' measurements: AlexNet's layers, its cuts, and all gains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import zoo
from benchmarks.evaluate.configurations import (
    GOALS,
    LINKS,
    MEASURED,
    PROCESSORS,
    Application,
    cut_name,
    paper_link,
)
from torchsurgeon.report.pictures import BLUE, GREEN, ORANGE, RED, SKY, new_figure, save_figure

LAYERS, CUTS, GAINS = "alexnet-layers.png", "alexnet-cuts.png", "gains.png"
LINK_NAMES = {"3g": "3G", "lte": "LTE", "wifi": "Wi-Fi"}
CUT_LINK, CUT_PROCESSOR = "wifi", "gpu"
"""The configuration whose cuts are drawn."""
_GREY = "#888888"


def draw(results: Mapping[str, Any], folder: Path) -> None:
    """Draw all figures into a folder.

    Args:
        results: what ``configurations.run()`` returned.
        folder: where they are written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _layers(folder / LAYERS)
    _cuts(folder / CUTS)
    _gains(results["configurations"], folder / GAINS)


def _layers(path: Path) -> None:
    """Draw how long each layer of AlexNet takes on the Tegra K1, and how much it hands on."""
    application = Application.read("imc")
    figure = new_figure(10, 6)
    upper, lower = figure.subplots(2, 1, sharex=True)
    at = np.arange(len(application.layers))
    for offset, processor, color, name in (
        (-0.2, "cpu", BLUE, "CPU, measured by layer"),
        (0.2, "gpu", ORANGE, "GPU, measured total spread by flops and bytes"),
    ):
        upper.bar(at + offset, 1e3 * application.seconds[processor], 0.4, color=color, label=name)
    upper.set_ylabel("ms on the Tegra K1")
    upper.set_title("AlexNet: what each layer takes, and what it hands on", loc="left")
    upper.legend(frameon=False)
    lower.bar(at, application.sizes_bytes[1:] / 1e3, 0.8, color=GREEN)
    lower.axhline(application.sizes_bytes[0] / 1e3, color=RED, linestyle="--", label="input, a byte for each value")
    lower.set_ylabel("kB handed on")
    lower.legend(frameon=False)
    lower.set_xticks(at, application.layers, rotation=60, ha="right")
    _bare(upper, lower)
    save_figure(figure, path)


def _cuts(path: Path) -> None:
    """Draw latency and energy of every cut of AlexNet, stacked by where they arise, with a star at the best."""
    application, link = Application.read("imc"), paper_link(CUT_LINK)
    assert link.radio is not None
    costs = application.costs(CUT_PROCESSOR, link)
    seconds = {
        "device": np.concatenate([[0.0], np.cumsum(application.seconds[CUT_PROCESSOR])]),
        "uplink": application.sizes_bytes * 8 / link.uplink_bit_s,
        "server": np.concatenate([np.cumsum(application.seconds["server"][::-1])[::-1], [0.0]]),
    }
    seconds["uplink"][-1] = 0.0
    joules = {
        "device": seconds["device"] * application.power_w[CUT_PROCESSOR],
        "radio": seconds["uplink"] * link.radio.sending_w(link.uplink_bit_s),
    }
    figure = new_figure(10, 7)
    panels = figure.subplots(2, 1, sharex=True)
    at = np.arange(len(application.layers) + 1)
    for panel, goal, parts, unit, scale in (
        (panels[0], "latency", seconds, "ms", 1e3),
        (panels[1], "energy", joules, "J of the device", 1.0),
    ):
        bottom = np.zeros(len(at))
        for (name, values), color in zip(parts.items(), (BLUE, ORANGE, GREEN), strict=False):
            panel.bar(at, scale * values, 0.8, bottom=bottom, color=color, label=name)
            bottom += scale * values
        best = int(costs[goal].argmin())
        panel.plot(best, bottom[best] + 0.05 * bottom.max(), "*", color=RED, markersize=14)
        panel.set_ylabel(unit)
        panel.set_ylim(0, 1.12 * bottom.max())
        panel.legend(frameon=False, ncol=3)
    named = [cut_name(application, cut) for cut in at]
    panels[1].set_xticks(at, ["all on server", *named[1:-1], "all on device"], rotation=60, ha="right")
    panels[0].set_title(
        f"AlexNet cut after each layer: Tegra K1's {CUT_PROCESSOR.upper()}, {LINK_NAMES[CUT_LINK]}, K40; the star is "
        "the best cut",
        loc="left",
    )
    _bare(*panels)
    save_figure(figure, path)


def _gains(rows: list[Mapping[str, Any]], path: Path) -> None:
    """Draw for each configuration how many times better than the server alone the best cut and the device alone are."""
    figure = new_figure(12, 7.5)
    panels = figure.subplots(2, 1, sharex=True)
    at, ticks = [], []
    for index, row in enumerate(rows):
        # Six configurations of an application stand together.
        at.append(index + index // 6)
        ticks.append(f"{row['device'].upper()} {LINK_NAMES[row['link']]}")
    for panel, goal in zip(panels, GOALS, strict=True):
        ours = [row[goal]["server_only"] / row[goal]["chosen"][MEASURED]["costs"] for row in rows]
        alone = [row[goal]["server_only"] / row[goal]["device_only"] for row in rows]
        panel.bar(at, ours, 0.8, bottom=0, color=SKY, label="ours")
        panel.plot(at, alone, "_", color=RED, markersize=9, markeredgewidth=2, label="all on the device")
        panel.axhline(1, color=_GREY, linewidth=1)
        panel.set_yscale("log")
        panel.set_ylim(0.6 * min(alone), 1.5 * max(ours))
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    panels[0].set_ylabel("latency: times faster\nthan all on the server")
    panels[1].set_ylabel("device's energy: times less\nthan all on the server")
    panels[0].legend(frameon=False, loc="upper left")
    panels[1].set_xticks(at, ticks, rotation=90, fontsize=7)
    for start in range(0, len(rows), len(LINKS) * len(PROCESSORS)):
        name = rows[start]["application"]
        middle = at[start] + 2.5
        suffix = "\n(language)" if name in zoo.LANGUAGE else ""
        panels[0].text(middle, 1.02, name + suffix, transform=panels[0].get_xaxis_transform(), ha="center", va="bottom")
    _bare(*panels)
    save_figure(figure, path)


def _bare(*panels: Any) -> None:
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.01)
