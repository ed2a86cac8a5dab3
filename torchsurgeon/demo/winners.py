"""Which way to run a model is the best, over the rate of the uplink and the speed of the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchsurgeon.link import Link
from torchsurgeon.planning import Frontier, Row, Sweep, sweep
from torchsurgeon.planning.grid import LEAST_GAIN
from torchsurgeon.planning.plans import place
from torchsurgeon.report.pictures import new_figure, plain, save_figure

UPLINKS_BIT_S = tuple(np.geomspace(0.1e6, 100e6, 61))
SLOWDOWNS = tuple(np.geomspace(1, 100, 41))
# A colour, and matplotlib's maps with the parts of them that are used.
_DEVICE, _SPLITS, _SERVERS = "#d9d9d9", ("Greens", 0.25, 0.95), ("Oranges", 0.2, 0.5)


def winners(
    frontier: Frontier,
    link: Link,
    objective: str = "latency",
    *,
    uplink_bit_s: Sequence[float] = UPLINKS_BIT_S,
    slowdowns: Sequence[float] = SLOWDOWNS,
    device_w: float | None = None,
) -> Sweep:
    """Return the best row at every slow-down of the device and rate of the uplink, as ``sweep()`` does.

    Both axes of the plane count logarithmically.
    """
    return sweep(frontier, link, uplink_bit_s, slowdowns, objective, varied="slowdown", device_w=device_w)


def winners_picture(
    planes: Sequence[tuple[str, Sweep]],
    title: str,
    path: str | Path,
    *,
    marks: Sequence[tuple[str, float, float]] = (),
    name: Callable[[Row], str] = place,
) -> None:
    """Draw which way is the best over uplink and slow-down; a line encloses where a cut in between is.

    Args:
        planes: what is drawn side by side, each with its heading.
        title: the picture's title.
        path: the picture's file. Its ending says in which format it is drawn.
        marks: points to mark: name, uplink in bit/s and slow-down.
        name: a row in words.

    Raises:
        TorchSurgeonError: matplotlib is not installed, or knows no format of this name.
    """
    figure = new_figure(6.2 * len(planes), 6.4)
    panels = figure.subplots(1, len(planes), sharey=True, squeeze=False)[0]
    every: dict[str, Row] = {}
    for _, found in planes:
        every |= {name(row): row for row in found.winners}
    colors = _colors(every)
    for axis, (heading, found) in zip(panels, planes, strict=True):
        _panel(axis, found, [colors.get(name(row), _DEVICE) for row in found.rows])
        axis.set_title(
            f"{heading}\na split is the best in {found.is_split.mean():.0%}, up to {found.gain.max():.1f}× better"
        )
        for label, uplink_bit_s, slowdown in marks:
            axis.plot(uplink_bit_s / 1e6, slowdown, "k+", markersize=9)
            axis.annotate(plain(label), (uplink_bit_s / 1e6, slowdown), xytext=(4, 4), textcoords="offset points")
    panels[0].set_ylabel("device, times slower than the server")
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=color, edgecolor="0.4", label=plain(text)) for text, color in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), fontsize=8, frameon=False)
    figure.suptitle(plain(title))
    save_figure(figure, path)


def _panel(axis: Any, found: Sweep, colors: Sequence[Any]) -> None:
    from matplotlib.colors import to_rgb

    image = np.array([to_rgb(color) for color in colors])[found.chosen]
    rates = found.uplink_bit_s / 1e6
    axis.pcolormesh(rates, found.factors, image, shading="nearest")
    if found.is_split.any():
        levels = [level for level in (LEAST_GAIN, 1.5, 2, 3, 5, 8) if level <= found.gain.max()]
        lines = axis.contour(rates, found.factors, found.gain, levels, colors="black", linewidths=0.8)
        axis.clabel(lines, fmt="%g×", fontsize=8)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("uplink (Mbit/s)")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter("{x:g}")
        side.set_minor_formatter("")


def _colors(every: dict[str, Row]) -> dict[str, Any]:
    """Return a colour for each name: grey on the device, orange on the server, green in between, darker further on."""
    from matplotlib import colormaps

    ordered = sorted(every.items(), key=lambda item: (item[1].on_device, item[1].index, item[1].size_bytes))
    groups = {
        _SERVERS: [text for text, row in ordered if not row.on_device and row.index == 0],
        _SPLITS: [text for text, row in ordered if not row.on_device and row.index > 0],
    }
    colors = {
        text: colormaps[kind](low + (high - low) * k / max(1, len(texts) - 1))
        for (kind, low, high), texts in groups.items()
        for k, text in enumerate(texts)
    }
    return colors | {text: _DEVICE for text, row in ordered if row.on_device}
