"""Which way to run a model is the best, over the rate of the uplink and the speed of the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchsurgeon.link import Link
from torchsurgeon.planning import Frontier, Row, sweep
from torchsurgeon.planning.plans import place
from torchsurgeon.planning.rows import Array
from torchsurgeon.report.pictures import new_figure, plain, save_figure

LEAST_GAIN = 1.02
"""A split counts as the best where it is by this factor better than the better of both ends."""
UPLINKS_BIT_S = tuple(np.geomspace(0.1e6, 100e6, 61))
SLOWDOWNS = tuple(np.geomspace(1, 100, 41))
# A colour, and matplotlib's maps with the parts of them that are used.
_DEVICE, _SPLITS, _SERVERS = "#d9d9d9", ("Greens", 0.25, 0.95), ("Oranges", 0.2, 0.5)


@dataclasses.dataclass(frozen=True, eq=False)
class Winners:
    """The best row at every slow-down of the device and rate of the uplink.

    Attributes:
        objective: what was minimized.
        link: the link whose uplink was varied.
        uplink_bit_s: the uplink's rates, shape (rates,).
        slowdowns: the factors by which the device is slower than its profile says, shape (slowdowns,).
        rows: the rows that are the best somewhere.
        chosen: the position in ``rows`` of the best, shape (slowdowns, rates).
        value: the objective's value of the best, shape (slowdowns, rates).
        on_device: its value with everything on the device, shape (slowdowns, rates).
        on_server: its value with everything on the server and the input encoded in the best way, same shape.
    """

    objective: str
    link: Link
    uplink_bit_s: Array
    slowdowns: Array
    rows: tuple[Row, ...]
    chosen: NDArray[np.intp]
    value: Array
    on_device: Array
    on_server: Array

    @property
    def gain(self) -> Array:
        """The value of the better end over that of the best row, shape (slowdowns, rates)."""
        return np.asarray(np.minimum(self.on_device, self.on_server) / self.value)

    @property
    def is_split(self) -> Array:
        """Where a cut in between is better than both ends by ``LEAST_GAIN``, shape (slowdowns, rates)."""
        between = np.array([not row.on_device and row.index > 0 for row in self.rows])
        return np.asarray(between[self.chosen] & (self.gain >= LEAST_GAIN))

    @property
    def share(self) -> float:
        """The share of the plane in which a cut in between is the best; both axes count logarithmically."""
        return float(self.is_split.mean())

    def summary(self) -> dict[str, float]:
        """Return the share, and the gain over the better end: its mean over the plane, where a cut wins, its most."""
        gain, where = self.gain, self.is_split
        return {
            "share": round(self.share, 4),
            "mean_gain": round(float(gain.mean()), 3),
            "mean_gain_where_split": round(float(gain[where].mean()), 3) if where.any() else 1.0,
            "most_gain": round(float(gain.max()), 3),
        }


def winners(
    frontier: Frontier,
    link: Link,
    objective: str = "latency",
    *,
    uplink_bit_s: Sequence[float] = UPLINKS_BIT_S,
    slowdowns: Sequence[float] = SLOWDOWNS,
    device_w: float | None = None,
) -> Winners:
    """Return the best row at every slow-down of the device and rate of the uplink.

    Args:
        frontier: the rows to choose among, with both ends of the model.
        link: the link; its downlink keeps its ratio to the uplink.
        objective: what to minimize, as ``Objective.of()`` takes it.
        uplink_bit_s: the uplink's rates.
        slowdowns: the factors by which the device is slower than its profile says.
        device_w: the watts that the device takes while it computes, at any slow-down. Without it the joules of the
            frontier's rows are taken.

    Raises:
        PlanError: as ``sweep()`` raises it.
    """
    parts, rows = [], []
    for slowdown in slowdowns:
        at = frontier
        if device_w is not None:
            joules = [device_w * slowdown * (row.head_s + row.encode_s) for row in frontier.rows]
            with_joules = zip(frontier.rows, joules, strict=True)
            at = dataclasses.replace(
                frontier, rows=tuple(dataclasses.replace(row, device_j=joules) for row, joules in with_joules)
            )
        parts.append(sweep(at, link, uplink_bit_s, [1.0], objective, slowdown))
        rows.append(parts[-1].chosen)
    used, chosen = np.unique(np.concatenate(rows), return_inverse=True)
    return Winners(
        objective,
        link,
        np.asarray(uplink_bit_s),
        np.asarray(slowdowns),
        tuple(frontier.rows[k] for k in used),
        chosen.reshape(len(slowdowns), len(uplink_bit_s)),
        *(np.concatenate([getattr(part, name) for part in parts]) for name in ("value", "on_device", "on_server")),
    )


def winners_picture(
    planes: Sequence[tuple[str, Winners]],
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
        every |= {name(row): row for row in found.rows}
    colors = _colors(every)
    for axis, (heading, found) in zip(panels, planes, strict=True):
        _panel(axis, found, [colors[name(row)] for row in found.rows])
        axis.set_title(f"{heading}\na split is the best in {found.share:.0%}, up to {found.gain.max():.1f}× better")
        for label, uplink_bit_s, slowdown in marks:
            axis.plot(uplink_bit_s / 1e6, slowdown, "k+", markersize=9)
            axis.annotate(plain(label), (uplink_bit_s / 1e6, slowdown), xytext=(4, 4), textcoords="offset points")
    panels[0].set_ylabel("device, times slower than the server")
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=color, edgecolor="0.4", label=plain(text)) for text, color in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), fontsize=8, frameon=False)
    figure.suptitle(plain(title))
    save_figure(figure, path)


def _panel(axis: Any, found: Winners, colors: Sequence[Any]) -> None:
    from matplotlib.colors import to_rgb

    image = np.array([to_rgb(color) for color in colors])[found.chosen]
    rates = found.uplink_bit_s / 1e6
    axis.pcolormesh(rates, found.slowdowns, image, shading="nearest")
    if found.is_split.any():
        levels = [level for level in (LEAST_GAIN, 1.5, 2, 3, 5, 8) if level <= found.gain.max()]
        lines = axis.contour(rates, found.slowdowns, found.gain, levels, colors="black", linewidths=0.8)
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
