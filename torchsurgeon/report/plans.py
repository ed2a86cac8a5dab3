"""Tables of plans and sweeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from torchsurgeon._place import place_text
from torchsurgeon.planning import Constraints, Objective, Plan
from torchsurgeon.planning.grid import Sweep
from torchsurgeon.planning.plans import comparison, headline, remarks, situation
from torchsurgeon.planning.row import Row
from torchsurgeon.report.narrow import CHOSEN, Column, FittingTable, names
from torchsurgeon.report.units import bytes_text, joules_text, number_text, seconds_text

_VALUES = {
    "latency": "latency",
    "energy": "energy",
    "throughput": "time between answers",
    "server_time": "server time",
}


def plan_table(plan: Plan, most: int = 12) -> FittingTable:
    """Return the best cuts by a plan's objective, best first, with a star at the plan's choice.

    Limits on latency and energy do not remove a cut from the table, so the choice may not be the first.

    Args:
        plan: what was planned.
        most: how many cuts are listed.
    """
    frontier = plan.frontier
    costs = frontier.costs(plan.link, plan.load, plan.slowdown, plan.objective)
    best = [int(i) for i in np.argsort(costs, kind="stable")[:most]]
    rows = [frontier.rows[i] for i in best]
    terms = [frontier.terms(row, plan.link, plan.load, plan.slowdown) for row in rows]
    columns = [
        names("cut after", [(CHOSEN if row == plan.row else "") + _cut(row) for row in rows]),
        *_codecs(rows, rank=7),
        Column("sent", ["–" if row.on_device else bytes_text(row.size_bytes) for row in rows], rank=6),
        Column("head", [_seconds(t.head_s + t.encode_s) for t in terms], rank=5, note="Head includes encoding."),
        Column("uplink", [_seconds(t.uplink_s) for t in terms], rank=4),
        Column("tail", [_seconds(t.decode_s + t.tail_s) for t in terms], rank=3, note="Tail includes decoding."),
        Column("downlink", [_seconds(t.downlink_s) for t in terms], rank=2),
        Column("latency", [seconds_text(t.latency_s) for t in terms]),
    ]
    if any(row.budget_used for row in rows):
        used = ["" if row.on_device else f"{row.budget_used:.0%}" for row in rows]
        columns.append(Column("budget", used, rank=1, note="Budget: how much of the accuracy budget the codec uses."))
    if plan.objective != Objective(latency=1.0):
        unit = plan.objective.unit
        values = [seconds_text(costs[i]) if unit == "s" else f"{costs[i]:.4g} {unit}".rstrip() for i in best]
        columns.append(Column(objective_name(plan.objective), values))
    return FittingTable(
        f"{frontier.model}: the best cuts by {plan.objective}",
        columns,
        f"The best of {len(frontier.rows)} combinations of cut and codec that can be the best at some link and load.",
        bold=[i for i, row in enumerate(rows) if row == plan.row],
    )


def plan_explanation(plan: Plan) -> Group:
    """Return what ``Plan.explain()`` says, for a terminal of any width: long names are shortened, columns left out."""
    (_, *ways), *rows = comparison(plan)
    names_of_rows, *cells = zip(*rows, strict=True)
    # The two ends are what a choice is judged by, so the runner-up is the first to go.
    ranks = {"runner-up": 2, "all on server": 3, "all on device": 4}
    columns = [
        Column("", names_of_rows, left=True),
        *(
            Column(way, of, rank=ranks.get(way, 0), is_name=True, enough=12)
            for way, of in zip(ways, cells, strict=True)
        ),
    ]
    listed = Table.grid(padding=(0, 1))
    for remark in remarks(plan):
        listed.add_row("•", Text(remark))
    return Group(Text(headline(plan)), Text(situation(plan)), FittingTable("", columns), listed)


def sweep_table(sweep: Sweep) -> FittingTable:
    """Return the cuts that are the best anywhere in a sweep: how often, where, and the most that each gains."""
    used = [int(i) for i in np.unique(sweep.chosen)]
    rows = [sweep.rows[i] for i in used]
    here = [sweep.chosen == i for i in used]
    return FittingTable(
        f"{sweep.model}: the best cuts by {sweep.objective}, at {sweep.chosen.size} pairs of uplink rate and load",
        [
            names("cut after", [_cut(row) for row in rows]),
            *_codecs(rows, rank=4),
            Column("pairs", [str(int(at.sum())) for at in here], rank=2, note="Pairs: how many these are."),
            Column("uplink, Mbit/s", [_range(sweep.uplink_bit_s[at.any(axis=0)] / 1e6) for at in here]),
            Column(sweep.varied, [_range(sweep.factors[at.any(axis=1)]) for at in here], rank=5),
            Column(
                "largest gain",
                [f"{sweep.gain[at].max():.2f}×" for at in here],
                rank=3,
                note="Gain: how many times better it is than the better of all on the device and all on the server.",
            ),
        ],
        "Each line is a cut, and the range of rates and loads of the pairs at which it is the best.",
    )


def objective_name(objective: Objective) -> str:
    """Return what the value of an objective is called."""
    return _VALUES.get(str(dataclasses.replace(objective, in_flight=None)), "weighted sum")


def constraint_texts(constraints: Constraints) -> list[str]:
    """Return what a plan has to keep to, each constraint in words; nothing where there is none."""
    texts = {
        "latency_s": f"latency at most {seconds_text(constraints.latency_s or 0.0)}",
        "energy_j": f"energy of the device at most {joules_text(constraints.energy_j or 0.0)}",
        "memory_bytes": f"memory of the head at most {bytes_text(constraints.memory_bytes or 0)}",
        "min_layers": f"at least {constraints.min_layers} layers on the device",
        "raw_input": "no input of the model leaves the device",
        "server_allowed": "nothing leaves the device",
    }
    return [texts[name] for name in constraints.given()]


def _cut(row: Row) -> str:
    return place_text(row.index, row.name, on_device=row.on_device, before="")


def _codecs(rows: Sequence[Row], rank: int) -> list[Column]:
    """A column of codecs, where any row uses one."""
    if all(row.on_device or row.codec == "raw" for row in rows):
        return []
    return [Column("codec", ["–" if row.on_device else row.codec for row in rows], rank=rank, left=True)]


def _seconds(seconds: float) -> str:
    return seconds_text(seconds) if seconds else "–"


def _range(values: np.ndarray) -> str:
    return f"{number_text(values.min())} … {number_text(values.max())}"
