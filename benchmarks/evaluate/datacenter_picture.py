"""Draws what benchmarks.evaluate.datacenter found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchsurgeon.report.pictures import BLUE, GREEN, ORANGE, RED, new_figure, save_figure

LINK_NAMES = {"wifi": "Wi-Fi", "lte": "LTE", "3g": "3G"}
_CURVES = {
    "status quo": (RED, "-"),
    "device-only": (ORANGE, "--"),
    "ours": (GREEN, "-"),
    "ours, blind to load": (BLUE, ":"),
}
_SHADES = ("#c6dbef", "#6baed6", "#2171b5", "#08306b")
_MOST_GAIN = 20.0


def picture(results: dict[str, Any], path: Path) -> None:
    """Draw gains over the status quo with their intervals, and where 10,000 servers and 10 million devices settle.

    Args:
        results: what the benchmark found.
        path: the file.
    """
    figure = new_figure(10.5, 8)
    grid = figure.add_gridspec(2, 2)
    first, second = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    below = figure.add_subplot(grid[1, :])
    simulated = results["simulated"]
    for axes, (name, rows) in zip((first, second), results["tables"].items(), strict=True):
        _gains(axes, rows, results["published"])
        axes.set_title(f"Simulated, {simulated['servers']} servers: {name}", fontsize=10)
    first.set_ylabel(
        "highest rate of inferences, × the status quo\n"
        f"(p{simulated['percentile']:g} of the wait at most {1e3 * simulated['limit_s']:g} ms)"
    )
    fluid = results["fluid"]
    for name, (colour, style) in _CURVES.items():
        points = [row for row in fluid["curves"][name] if row["latency_s"] is not None]
        below.plot(
            [row["rate_per_device_s"] for row in points],
            [row["latency_s"] for row in points],
            style,
            color=colour,
            label=name,
            linewidth=2.5,
        )
        if len(points) < len(fluid["curves"][name]):
            last = points[-1]
            below.plot(
                last["rate_per_device_s"], last["latency_s"], "x", color=colour, markersize=9, markeredgewidth=2.5
            )
    below.plot([], [], "x", color="black", label="servers are overloaded beyond")
    below.set_xscale("log")
    below.set_xticks([0.01, 0.1, 1, 10], ["0.01", "0.1", "1", "10"])
    below.minorticks_off()
    below.set_ylim(0, 2.6)
    below.set_xlabel("inferences per second of each device")
    below.set_ylabel("mean latency (s)")
    below.set_title(
        f"Fluid model: {fluid['servers']:,} servers, {fluid['devices'] / 1e6:g} million devices", fontsize=10
    )
    below.legend(fontsize=9, loc="upper right")
    save_figure(figure, path)


def _gains(axes: Any, rows: list[dict[str, Any]], published: dict[str, float]) -> None:
    shares = sorted({row["gpu_share"] for row in rows})
    width = 0.8 / len(shares)
    for k, link in enumerate(LINK_NAMES):
        for row in rows:
            if row["link"] != link:
                continue
            place = shares.index(row["gpu_share"])
            x, gain = k - 0.4 + width * (place + 0.5), row["gain"]
            label = f"{100 * row['gpu_share']:g} % of devices with a GPU" if k == 0 else None
            axes.bar(
                x, _MOST_GAIN if gain is None else gain["value"], 0.92 * width, color=_SHADES[place], label=label,
                hatch="//" if gain is None else None, edgecolor="white",
            )  # fmt: skip
            if gain is None:
                axes.text(
                    x, 4.0, "any rate", rotation=90, ha="center", va="center", fontsize=8,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
                )  # fmt: skip
            else:
                errors = [[gain["value"] - gain["low"]], [gain["high"] - gain["value"]]]
                axes.errorbar(x, gain["value"], errors, color="black", capsize=2, linewidth=1)
        line = axes.plot([k - 0.4, k + 0.4], [published[link]] * 2, color=RED, linewidth=2)[0]
        if k == 0:
            line.set_label("published")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_ylim(0.8, _MOST_GAIN)
    axes.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axes.minorticks_off()
    axes.set_xticks(range(len(LINK_NAMES)), LINK_NAMES.values())
    axes.legend(fontsize=8, loc="upper left")
