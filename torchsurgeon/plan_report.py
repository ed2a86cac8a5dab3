"""Plans as tables and pictures. Converts units for printing; computes nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from torchsurgeon.errors import TorchSurgeonError
from torchsurgeon.plan import Objective, Plan
from torchsurgeon.plan.explain import place
from torchsurgeon.plan.grid import Sweep
from torchsurgeon.report import bytes_text, seconds_text

_MOST_NAMES = 12


def plan_table(plan: Plan, most: int = 12) -> Table:
    """Return the best rows of a plan's frontier under its objective, best first, without regard to limits on latency
    and energy."""
    frontier = plan.frontier
    costs = frontier.costs(plan.link, plan.load, plan.slowdown, plan.objective)
    best = [int(i) for i in np.argsort(costs, kind="stable")[:most]]
    table = Table(
        caption="Head and tail with encoding and decoding.",
        title=f"{plan.frontier.model}: {len(frontier.rows)} ways can be the best; these are by {plan.objective}",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    unit = plan.objective.unit
    table.add_column("way", overflow="fold", min_width=24)
    more = [] if plan.objective == Objective(latency=1.0) else [str(plan.objective)]
    for name in ("sent", "head", "uplink", "tail", "downlink", "latency", *more):
        table.add_column(name, justify="right", no_wrap=True)
    for i in best:
        row = frontier.rows[i]
        terms = frontier.terms(row, plan.link, plan.load, plan.slowdown)
        parts = (terms.head_s + terms.encode_s, terms.uplink_s, terms.decode_s + terms.tail_s, terms.downlink_s)
        value = seconds_text(costs[i]) if unit == "s" else f"{costs[i]:.4g} {unit}".rstrip()
        table.add_row(
            ("★ " if row == plan.row else "") + place(row),
            "–" if row.on_device else bytes_text(row.size_bytes),
            *(seconds_text(part) if part else "–" for part in parts),
            seconds_text(terms.latency_s),
            *([value] if more else []),
            style="bold" if row == plan.row else None,
        )
    return table


def sweep_table(sweep: Sweep) -> Table:
    """Return the ways that are chosen anywhere in a sweep, with how often and the most that each gains."""
    table = Table(
        title=f"{sweep.model}: the least {sweep.objective} at {sweep.chosen.size} pairs of uplink rate and load",
        caption="Gain: the better of all on the device and all on the server, over the choice.",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("way", overflow="fold")
    for name in ("pairs", "uplink, Mbit/s", "load", "largest gain"):
        table.add_column(name, justify="right", no_wrap=True)
    gain = sweep.gain
    for i in np.unique(sweep.chosen):
        here = sweep.chosen == i
        rates, loads = sweep.uplink_bit_s[here.any(axis=0)] / 1e6, sweep.loads[here.any(axis=1)]
        table.add_row(
            place(sweep.rows[i]),
            str(int(here.sum())),
            f"{rates.min():.3g} … {rates.max():.3g}",
            f"{loads.min():.3g} … {loads.max():.3g}",
            f"{gain[here].max():.2f}×",
        )
    return table


def sweep_picture(sweep: Sweep, path: str | Path) -> None:
    """Draw which way is chosen, and what it gains, over uplink rate and load, into a PNG (or whatever format ``path``
    ends in). Raises :class:`~torchsurgeon.errors.TorchSurgeonError` when matplotlib is not installed."""
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import BoundaryNorm, ListedColormap
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TorchSurgeonError(f"drawing needs matplotlib ({error}): pip install 'torchsurgeon[plot]'") from None
    figure = Figure(figsize=(13, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    used, where = np.unique(sweep.chosen, return_inverse=True)
    colors = colormaps["viridis"](np.linspace(0.05, 0.95, len(used)))
    rates = sweep.uplink_bit_s / 1e6
    edges = np.arange(len(used) + 1) - 0.5
    mesh = left.pcolormesh(
        rates,
        sweep.loads,
        where.reshape(sweep.chosen.shape),
        cmap=ListedColormap(colors),
        norm=BoundaryNorm(edges, len(used)),
        shading="nearest",
    )
    bar = figure.colorbar(mesh, ax=left)
    marked = sorted({round(i) for i in np.linspace(0, len(used) - 1, min(len(used), _MOST_NAMES))})
    bar.set_ticks(marked, labels=[place(sweep.rows[used[i]]).removeprefix("cut ") for i in marked], fontsize=8)
    left.set_title("where to cut")
    gains = right.pcolormesh(rates, sweep.loads, sweep.gain, cmap="magma", shading="nearest", vmin=1.0)
    figure.colorbar(gains, ax=right, label="times better than the better end")
    right.set_title("gain over all on one side")
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("uplink (Mbit/s)")
    left.set_ylabel("server load (times its profile)")
    trip = seconds_text(sweep.link.round_trip_s)
    figure.suptitle(f"{sweep.model}: the least {sweep.objective}, round trip {trip}")
    figure.savefig(path, dpi=130)
