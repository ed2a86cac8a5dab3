"""Plans and sweeps as tables."""

from __future__ import annotations

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from torchsurgeon.planning import Objective, Plan
from torchsurgeon.planning.grid import Sweep
from torchsurgeon.planning.plans import place
from torchsurgeon.report.units import bytes_text, seconds_text


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
    table.add_column("way", overflow="fold", min_width=12)
    more = [] if plan.objective == Objective(latency=1.0) else [str(plan.objective) if unit else "sum"]
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
