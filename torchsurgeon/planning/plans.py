"""What a plan holds, and how it explains itself: in plain text, alike in a terminal, a log and a notebook."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torchsurgeon._place import place_text
from torchsurgeon.codec import Finding
from torchsurgeon.link import Link
from torchsurgeon.planning.costs import Terms
from torchsurgeon.planning.frontier import Frontier
from torchsurgeon.planning.objective import Constraints, Objective
from torchsurgeon.planning.row import Row
from torchsurgeon.tracing.specs import PartitionPoint

_PARTS = ("head", "encode", "uplink", "decode", "tail", "downlink", "latency", "interval")

_LIMITS = {
    "latency_s": "the limit on latency",
    "energy_j": "the limit on energy",
    "memory_bytes": "the limit on memory",
    "min_layers": "layers that must run on the device",
    "raw_input": "the rule that no input leaves the device",
    "server_allowed": "the rule that nothing leaves the device",
}


@dataclasses.dataclass(frozen=True)
class Crossover:
    """Where the choice changes as one quantity rises.

    Attributes:
        quantity: ``"uplink_bit_s"`` or ``"load"``.
        at: its value at the change.
        before: the choice below that value.
        after: the choice above it.
    """

    quantity: str
    at: float
    before: Row
    after: Row


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The chosen way to run a model, and what it was chosen over.

    Attributes:
        point: where to cut.
        terms: what an inference is predicted to cost, term by term.
        value: the objective's value.
        objective: what was minimized.
        constraints: what was kept.
        link: the link that was planned for.
        load: the factor by which the server is slower than its profile says.
        slowdown: the factor by which the device is slower than its profile says.
        device_only: what it costs to run everything on the device, whether or not that keeps the constraints.
        server_only: the same on the server; None where a constraint forbids the server.
        runner_up: the best that keeps the constraints and cuts elsewhere; None where nothing does.
        prices: for each constraint, the objective's value without it.
        crossovers: the uplink rates and loads at which the choice changes, all else equal.
        interval_s: the latency's interval that follows from both predictions' intervals; None without these.
        warned: what is known badly of the times of the layers on device and server, a sentence each.
        fresh_s: how many seconds more a request takes on a new connection.
        frontier: the rows that keep the constraints on memory, layers and inputs, and can win.
        rows: all rows that keep them.
        budget: the accuracy budget that the codecs were measured with, in words; empty without one.
    """

    point: PartitionPoint
    terms: Terms
    value: float
    objective: Objective
    constraints: Constraints
    link: Link
    load: float
    slowdown: float
    device_only: Terms
    server_only: Terms | None
    runner_up: Terms | None
    prices: Mapping[str, float]
    crossovers: tuple[Crossover, ...]
    interval_s: tuple[float, float] | None
    warned: tuple[str, ...]
    fresh_s: float
    frontier: Frontier
    rows: tuple[Row, ...]
    budget: str = ""

    @property
    def row(self) -> Row:
        """The chosen row."""
        return self.terms.row

    @property
    def codec(self) -> str:
        """How the boundary tensors are encoded."""
        return self.row.codec

    def explain(self) -> str:
        """Return the choice beside the other ways, term by term, as text."""
        return explain(self)


def explain(plan: Plan) -> str:
    """Return the chosen way beside the two ends and the runner-up, and what would change the choice, as text."""
    table = comparison(plan)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = [headline(plan), f"  {situation(plan)}", ""]
    for row in table:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join([*lines, "", *(f"  {remark}" for remark in remarks(plan))])


def headline(plan: Plan) -> str:
    """Return the chosen way and its value in a line."""
    return f"{plan.frontier.model}: {place(plan.row)}, least {plan.objective}: {_value(plan, plan.value)}"


def situation(plan: Plan) -> str:
    """Return what the plan was made for in a line: link, load, slow-down and constraints."""
    return f"over {plan.link}; load {plan.load:g}, slow-down {plan.slowdown:g}; constraints: {plan.constraints}"


def comparison(plan: Plan) -> list[list[str]]:
    """Return the chosen way beside the two ends and the runner-up, as a table.

    The first row holds the names of the ways, and the first cell of each row the name of its quantity, with its unit.
    """
    columns: list[tuple[str, Terms]] = [("chosen", plan.terms), ("all on device", plan.device_only)]
    if plan.server_only is not None:
        columns.append(("all on server", plan.server_only))
    if plan.runner_up is not None:
        columns.append(("runner-up", plan.runner_up))
    table = [["", *(name for name, _ in columns)], ["cut", *(_short(terms.row) for _, terms in columns)]]
    if any(terms.row.backend != "eager" or terms.row.server_backend != "eager" for _, terms in columns):
        table.append(["device's backend", *("–" if not terms.head_s else terms.row.backend for _, terms in columns)])
        table.append(
            ["server's backend", *("–" if terms.row.on_device else terms.row.server_backend for _, terms in columns)]
        )
    table.append(["codec", *("–" if terms.row.on_device else terms.row.codec for _, terms in columns)])
    table.append(["sent, kB", *(f"{terms.row.size_bytes / 1e3:.1f}" for _, terms in columns)])
    measures = dict.fromkeys(finding.measure for _, terms in columns for finding in terms.row.findings)
    table += [[measure, *(_found(terms.row, measure) for _, terms in columns)] for measure in measures]
    if any(terms.row.budget_used for _, terms in columns):
        table.append(["budget used", *(f"{terms.row.budget_used:.0%}" for _, terms in columns)])
    table += [[f"{part}, ms", *(f"{getattr(terms, part + '_s') * 1e3:.2f}" for _, terms in columns)] for part in _PARTS]
    if any(terms.device_j is not None or terms.radio_j for _, terms in columns):
        for part in ("device", "radio", "energy"):
            joules = [getattr(terms, part + "_j") for _, terms in columns]
            table.append([f"{part}, J", *("?" if value is None else f"{value:.4f}" for value in joules)])
    if any(terms.row.memory_bytes is not None for _, terms in columns):
        sizes = [terms.row.memory_bytes for _, terms in columns]
        table.append(["memory, MB", *("?" if size is None else f"{size / 1e6:.1f}" for size in sizes)])
    return table


def remarks(plan: Plan) -> list[str]:
    """Return what else is known of the choice, a sentence each: its interval, its prices, and what would change it."""
    lines = [_surely(plan.row, finding) for finding in plan.row.findings]
    if plan.row.budget_used and not plan.row.findings:
        lines.append("what the codec changes was not measured, only that it is within the budget")
    if plan.budget and plan.row.budget_used:
        lines.append(f"the budget: {plan.budget}")
    if plan.interval_s is not None:
        low_s, high_s = plan.interval_s
        lines.append(f"latency between {low_s * 1e3:.2f} and {high_s * 1e3:.2f} ms by the predictions' intervals")
    lines += plan.warned
    if plan.fresh_s:
        lines.append(f"a request on a fresh connection takes {plan.fresh_s * 1e3:.1f} ms more")
    for name, value in plan.prices.items():
        lines.append(f"without {_LIMITS[name]}: {plan.objective} {_value(plan, value)}")
    lines += [f"{_when(c)}: {place(c.after)} instead of {place(c.before)}" for c in plan.crossovers]
    if not plan.crossovers:
        lines.append("no other uplink rate and no other load would change the choice")
    if not plan.frontier.exact:
        lines.append("the search among cuts across parallel branches was cut short, so a slightly better one may exist")
    return lines


def place(row: Row) -> str:
    """Return where a row cuts and what it sends, in words."""
    where = place_text(row.index, _short(row), on_device=row.on_device)
    if row.on_device:
        return where
    if row.student:
        where = f"a student in place of the layers up to {_short(row)}"
    return where if row.codec == "raw" else f"{where} as {row.codec}"


def _found(row: Row, measure: str) -> str:
    """Return what a sample showed of a measure, with the bound for all calls in brackets."""
    if not row.budget_used:
        return "–"
    return next((str(finding) for finding in row.findings if finding.measure == measure), "?")


def _surely(row: Row, finding: Finding) -> str:
    """Return what a finding says of the measured calls and of all, and how much of the budget that uses."""
    estimate, bound, limit = (finding.text(value) for value in (finding.estimate, finding.bound, finding.limit))
    words = {"≤": "at most", "≥": "at least"}
    used = "" if finding.used is None else f", of which {finding.used:.0%} is used"
    return (
        f"{row.codec}: {finding.measure} was {estimate} in {finding.count} measured, so it is surely "
        f"{words[finding.sign]} {bound} in all; the limit is {limit}{used}"
    )


def _short(row: Row) -> str:
    if row.on_device or row.index == 0:
        return "–"
    return row.name if len(row.name) <= 40 else f"{row.name[:18]}…{row.name[-18:]}"


def _when(change: Crossover) -> str:
    if change.quantity == "load":
        return f"from a server load of {change.at:.3g} on"
    return f"from an uplink of {change.at / 1e6:.4g} Mbit/s on"


def _value(plan: Plan, value: float) -> str:
    if plan.objective.unit == "s":
        return f"{value * 1e3:.2f} ms"
    return f"{value:.4g} {plan.objective.unit}".rstrip()
