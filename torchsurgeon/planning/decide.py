"""The best way to run a model under an objective and constraints, and why it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import numpy as np

from torchsurgeon.codec import CodecTable
from torchsurgeon.errors import InfeasibleError, PlanError, is_finite, short
from torchsurgeon.link import Link
from torchsurgeon.planning.chain import ChainPlan, plan_chain
from torchsurgeon.planning.costs import Terms
from torchsurgeon.planning.frontier import Frontier
from torchsurgeon.planning.objective import Constraints, Objective
from torchsurgeon.planning.plans import Crossover, Plan
from torchsurgeon.planning.row import Row
from torchsurgeon.planning.rows import LayerCosts
from torchsurgeon.planning.sets import across_branches
from torchsurgeon.planning.sides import Profiles, as_profiles, with_joules
from torchsurgeon.planning.sureness import interval_of, used_profiles, warnings_of
from torchsurgeon.profiling import LayerProfile
from torchsurgeon.tracing.graph import LayerGraph

_LEAST_UPLINK_BIT_S, _MOST_UPLINK_BIT_S = 1e4, 1e10
_LEAST_LOAD, _MOST_LOAD = 0.05, 100.0
_GRID = 40

Wanted = str | Mapping[str, float] | Objective


@overload
def plan(
    graph: LayerGraph,
    *,
    device: Profiles,
    server: Profiles,
    link: Link | str,
    objective: Wanted = "latency",
    codecs: CodecTable | None = None,
    load: float = 1.0,
    slowdown: float = 1.0,
    allow_bounds: bool = False,
    **constraints: Any,
) -> Plan: ...


@overload
def plan(
    graph: LayerGraph,
    *,
    stages: Sequence[LayerProfile],
    links: Sequence[Link | str],
    objective: Wanted = "latency",
    codecs: CodecTable | None = None,
    loads: Sequence[float] | None = None,
    allow_bounds: bool = False,
) -> ChainPlan: ...


def plan(
    graph: LayerGraph,
    *,
    device: Profiles | None = None,
    server: Profiles | None = None,
    link: Link | str | None = None,
    objective: Wanted = "latency",
    codecs: CodecTable | None = None,
    load: float = 1.0,
    slowdown: float = 1.0,
    stages: Sequence[LayerProfile] | None = None,
    links: Sequence[Link | str] | None = None,
    loads: Sequence[float] | None = None,
    allow_bounds: bool = False,
    **constraints: Any,
) -> Plan | ChainPlan:
    """Return the best way to run a model between a device and a server, or along a row of machines.

    The choice follows Neurosurgeon (Kang et al., ASPLOS 2017), and adds codecs, constraints and cuts across branches.

    Args:
        graph: the traced model.
        device: what each layer costs on the device, measured or predicted. With several profiles, each of another
            backend, the backend of the head is chosen together with the cut. Where energy counts, backends whose joules
            are unknown are left out.
        server: what each layer costs on the server, likewise.
        link: the link between them, or what ``Link.parse()`` understands, such as ``"lte"``.
        objective: ``"latency"``, ``"energy"``, ``"throughput"``, ``"server_time"``, or weights by these names.
        codecs: measured codecs; without them, tensors are sent as they are. Over several machines, those of all links
            together keep the accuracy budget.
        load: the factor by which the server is slower than its profile says.
        slowdown: the factor by which the device is slower than its profile says.
        stages: what each layer costs on each machine of a row, in place of device, server, link and load.
        links: the links between the machines of ``stages``, or what ``Link.parse()`` understands.
        loads: for each machine of ``stages``, the factor by which it is slower than its profile says.
        allow_bounds: whether a profile may be one that was predicted from a data sheet. Its times are lower bounds, and
            real ones are longer by factors that differ from layer to layer, so the plan may be far from the best.
        **constraints: as in ``Constraints``.

    Returns:
        A ``Plan``, or with ``stages`` a ``ChainPlan``.

    Raises:
        InfeasibleError: nothing keeps all constraints; the message says how near to each one can come.
        PlanError: an objective, constraint or load is wrong, or needs energy or memory that was not measured; or a
            profile is a bound and ``allow_bounds`` is false.
        ProfileError: a profile is of another graph or batch size.
        CodecError: ``codecs`` is of another graph.
    """
    if codecs is not None and not isinstance(codecs, CodecTable):
        raise PlanError(f"codecs must be a measured CodecTable; got {short(codecs)}; CodecTable.load() reads one")
    if not allow_bounds:
        _refuse_bounds(device, server, stages)
    if not isinstance(graph, LayerGraph):
        raise PlanError(f"plan takes a traced model; got {type(graph).__name__}; call plan(trace(model, example), …)")
    if stages is not None:
        if device is not None or server is not None or link is not None or constraints:
            raise PlanError(
                "a plan for stages= and links= takes no device=, server=, link= or constraints; leave them out"
            )
        if (load, slowdown) != (1.0, 1.0):
            raise PlanError(
                f"a plan for stages= takes loads=, one for each machine; got load={short(load, 100)} and "
                f"slowdown={short(slowdown, 100)}; leave these out"
            )
        return plan_chain(graph, stages, links or (), objective, loads, codecs)
    if device is None or server is None or link is None:
        raise PlanError("a plan needs device=, server= and link=, or stages= and links=")
    if isinstance(link, str):
        link = Link.parse(link)
    unknown = [name for name in constraints if name not in Constraints.__dataclass_fields__]
    if unknown:
        raise PlanError(
            f"a constraint must be one of {', '.join(Constraints.__dataclass_fields__)}; got {short(unknown[0])}"
        )
    if not isinstance(link, Link):
        raise PlanError(f'link must be a Link, or a text such as "lte"; got {short(link)}')
    for name, factor in (("load", load), ("slowdown", slowdown)):
        if not (is_finite(factor) and factor > 0):
            raise PlanError(f"{name} must be a positive number; got {short(factor)}")
    limits, wanted = Constraints(**constraints), Objective.of(objective)
    devices, servers = list(as_profiles(device, "device")), as_profiles(server, "server")
    if wanted.energy or limits.energy_j is not None:
        devices = with_joules(devices)
    costs = LayerCosts(graph, devices, servers)
    if limits.memory_bytes is not None and any(profile.memory_bytes is None for profile in devices):
        raise PlanError(
            "memory_bytes needs a device profile that holds memory, and one that was given does not; give a profile in "
            "eager PyTorch, which holds it, or leave memory_bytes out"
        )
    # Constraints come before the frontier, since a row that another one undercuts may be the best that keeps them.
    rows = costs.rows(codecs)
    branches, exact = across_branches(costs, rows, limits, wanted)
    rows += branches
    chooser = _Chooser(graph, rows, exact, wanted, link, load, slowdown)
    frontier = chooser.feasible(limits)
    terms = chooser.best(frontier, limits)
    if frontier is None or terms is None:
        raise chooser.infeasible(limits)
    used = used_profiles(terms, devices, servers)
    value = chooser.value(terms.row)
    chosen = _place(terms.row)
    others = [row for row in rows if limits.keeps(row) and _place(row) != chosen]
    ends = [Frontier.of(graph, [row for row in rows if row.index == k]) for k in (len(graph.layers), 0)]
    device_only, server_only = (chooser.best(end, Constraints()) for end in ends)
    assert device_only is not None
    prices = {}
    for name in limits.given():
        freed = chooser.best(chooser.feasible(limits.without(name)), limits.without(name))
        assert freed is not None
        prices[name] = chooser.value(freed.row)
    return Plan(
        point=terms.row.point(graph),
        terms=terms,
        value=value,
        objective=wanted,
        constraints=limits,
        link=link,
        load=load,
        slowdown=slowdown,
        device_only=device_only,
        server_only=server_only if limits.server_allowed else None,
        runner_up=chooser.best(Frontier.of(graph, others), limits) if others else None,
        prices=prices,
        crossovers=crossovers(frontier, link, load, slowdown, wanted, limits),
        interval_s=interval_of(terms, *used, load, slowdown),
        warned=warnings_of(graph, terms, *used),
        fresh_s=0.0 if terms.row.on_device else _fresh_s(link, terms.row.size_bytes, frontier.answer_bytes),
        frontier=frontier,
        rows=tuple(row for row in rows if limits.keeps(row)),
        budget="" if codecs is None else codecs.budget,
    )


def _place(row: Row) -> tuple[int, tuple[int, ...] | None, str]:
    # Two students at one cut are two ways, while two rates of one student are not.
    return row.index, row.layers, row.codec.partition("@")[0] if row.student else ""


def crossovers(
    frontier: Frontier,
    link: Link,
    load: float = 1.0,
    slowdown: float = 1.0,
    objective: Wanted = "latency",
    constraints: Constraints | None = None,
) -> tuple[Crossover, ...]:
    """Return the uplink rates from 10 kbit/s to 10 Gbit/s, and the loads from 0.05 to 100, where the choice changes.

    Args:
        frontier: the rows to choose among.
        link: the link; its uplink is varied, and its downlink stays.
        load: the server's load while the uplink is varied.
        slowdown: the factor by which the device is slower than its profile says.
        objective: what to minimize.
        constraints: limits on latency and energy; by default none.
    """
    limits = constraints or Constraints()

    def at_rate(bit_s: float) -> Row | None:
        found = choose(frontier, dataclasses.replace(link, uplink_bit_s=bit_s), load, slowdown, objective, limits)
        return None if found is None else found.row

    def at_load(factor: float) -> Row | None:
        found = choose(frontier, link, factor, slowdown, objective, limits)
        return None if found is None else found.row

    rates = _changes("uplink_bit_s", at_rate, _LEAST_UPLINK_BIT_S, _MOST_UPLINK_BIT_S)
    return (*rates, *_changes("load", at_load, _LEAST_LOAD, _MOST_LOAD))


def choose(
    frontier: Frontier,
    link: Link,
    load: float,
    slowdown: float,
    objective: Wanted,
    limits: Constraints,
) -> Terms | None:
    """Return the terms of the best row that keeps the limits on latency and energy; None if no row does.

    Of rows that cost the same it is the one that uses least of the accuracy budget. The frontier's rows must keep all
    other limits already.
    """
    costs = frontier.costs(link, load, slowdown, objective)
    if limits.latency_s is not None:
        costs = np.where(frontier.costs(link, load, slowdown, "latency") <= limits.latency_s, costs, np.inf)
    if limits.energy_j is not None:
        costs = np.where(frontier.costs(link, load, slowdown, "energy") <= limits.energy_j, costs, np.inf)
    least = float(costs.min())
    if not np.isfinite(least):
        return None
    alike = [frontier.rows[i] for i in np.flatnonzero(costs <= least + abs(least) * 1e-12)]
    return frontier.terms(min(alike, key=lambda row: row.budget_used), link, load, slowdown)


def _changes(quantity: str, choice: Callable[[float], Row | None], low: float, high: float) -> list[Crossover]:
    """Return where ``choice`` changes between ``low`` and ``high``, by bisection between the points of a grid."""
    found: list[Crossover] = []

    def between(a: float, row_a: Row | None, b: float, row_b: Row | None) -> None:
        if row_a == row_b:
            return
        if b / a < 1 + 1e-6:
            if row_a is not None and row_b is not None:
                found.append(Crossover(quantity, b, row_a, row_b))
            return
        middle = float(np.sqrt(a * b))
        row = choice(middle)
        between(a, row_a, middle, row)
        between(middle, row, b, row_b)

    values = np.geomspace(low, high, _GRID)
    rows = [choice(float(value)) for value in values]
    for a, row_a, b, row_b in zip(values[:-1], rows[:-1], values[1:], rows[1:], strict=True):
        between(float(a), row_a, float(b), row_b)
    return found


@dataclasses.dataclass(frozen=True)
class _Chooser:
    """The question of one plan, to be asked under several sets of constraints."""

    graph: LayerGraph
    rows: Sequence[Row]
    exact: bool
    objective: Objective
    link: Link
    load: float
    slowdown: float

    def feasible(self, limits: Constraints) -> Frontier | None:
        kept = [row for row in self.rows if limits.keeps(row)]
        return Frontier.of(self.graph, kept, exact=self.exact) if kept else None

    def best(self, frontier: Frontier | None, limits: Constraints) -> Terms | None:
        if frontier is None:
            return None
        return choose(frontier, self.link, self.load, self.slowdown, self.objective, limits)

    def value(self, row: Row) -> float:
        alone = Frontier.of(self.graph, [row])
        return float(alone.costs(self.link, self.load, self.slowdown, self.objective)[0])

    def infeasible(self, limits: Constraints) -> InfeasibleError:
        """Return the error that says, for each constraint, how near to it one can come while all others are kept."""
        least = {name: self._least(name, limits.without(name)) for name in limits.given()}
        lines = []
        for name, value in least.items():
            asked = getattr(limits, name)
            if value is None:
                alone = self._least(name, Constraints())
                lines.append(
                    f"{name}={asked}: even without it the others leave nothing; alone, {alone:.6g} is possible"
                )
            elif name in ("raw_input", "server_allowed"):
                lines.append(f"{name}={asked}: without it the best way has a {self.objective} of {value:.4g}")
            else:
                bound = "most" if name == "min_layers" else "least"
                lines.append(f"{name}={asked}: while the others are kept, the {bound} possible is {value:.6g}")
        return InfeasibleError(
            f"no way of running {type(self.graph.model).__name__} keeps all constraints: " + "; ".join(lines),
            least,
        )

    def _least(self, name: str, others: Constraints) -> float | None:
        kept = [row for row in self.rows if others.keeps(row)]
        if not kept:
            return None
        frontier = Frontier("", "", 1, 0, self.answer_bytes, tuple(kept))
        inside = np.ones(len(kept), dtype=bool)
        if others.latency_s is not None:
            inside &= frontier.costs(self.link, self.load, self.slowdown, "latency") <= others.latency_s
        if others.energy_j is not None:
            inside &= frontier.costs(self.link, self.load, self.slowdown, "energy") <= others.energy_j
        if not inside.any():
            return None
        left = [row for row, is_inside in zip(kept, inside, strict=True) if is_inside]
        if name == "memory_bytes":
            return float(min(row.memory_bytes or 0 for row in left))
        if name == "min_layers":
            return float(max(row.index for row in left))
        measure = {"latency_s": "latency", "energy_j": "energy"}.get(name, self.objective)
        return float(frontier.costs(self.link, self.load, self.slowdown, measure)[inside].min())

    @property
    def answer_bytes(self) -> int:
        return sum(spec.size_bytes for spec in self.graph.outputs)


def _refuse_bounds(*given: Profiles | None) -> None:
    for one in given:
        for profile in [one] if isinstance(one, LayerProfile) else one if isinstance(one, Sequence) else ():
            if isinstance(profile, LayerProfile) and profile.is_bound:
                raise PlanError(
                    f"a plan needs measured costs, and those of {short(profile.provenance.get('device'), 100)} are a "
                    "bound from data sheets; profile the model or calibrate the device there, or give allow_bounds=True"
                )


def _fresh_s(link: Link, up_bytes: float, down_bytes: float) -> float:
    return link.request_s(up_bytes, down_bytes, fresh=True) - link.request_s(up_bytes, down_bytes)
