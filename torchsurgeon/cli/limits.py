"""The limits of ``torchsurgeon plan``, and what is said where they cannot be kept or rule nothing out."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchsurgeon.planning import Plan

# By the name of a constraint: its option, how much of the constraint's unit the option's unit is, and that.
_MEASURED = {
    "latency_s": ("--latency", 1.0, " s"),
    "energy_j": ("--energy", 1.0, " J"),
    "memory_bytes": ("--memory", 1e6, " MB"),
    "min_layers": ("--min-layers", 1.0, ""),
}
_FLAGS = {"raw_input": "--no-raw-input", "server_allowed": "--no-server"}


def limits_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the constraints that the options of ``plan`` mean, as ``Constraints`` takes them."""
    return {
        "latency_s": options.latency,
        "energy_j": options.energy,
        "memory_bytes": None if options.memory is None else options.memory * 1e6,
        "min_layers": options.min_layers,
        "raw_input": not options.no_raw_input,
        "server_allowed": not options.no_server,
    }


def unkept(limits: Mapping[str, Any], least: Mapping[str, float | None]) -> str:
    """Return the message for limits that cannot be kept, in the words of the command line.

    Args:
        limits: the constraints, as ``limits_of()`` returns them.
        least: what ``InfeasibleError`` says of each that was given.
    """
    asked = " and ".join(_FLAGS.get(name) or _written(name, limits[name]) for name in least)
    remedy = "or plan for another device, server or link"
    if len(least) == 1:
        ((name, value),) = least.items()
        if name in _MEASURED and value is not None:
            bound = "most" if name == "min_layers" else "least"
            possible = _written(name, value).partition(" ")[2]
            return f"{asked} cannot be kept: the {bound} possible is {possible}; allow that, {remedy}"
    enough = [
        f"{_FLAGS[name]} left out" if name in _FLAGS else _written(name, value)
        for name, value in least.items()
        if value is not None
    ]
    if not enough:
        return f"{asked} cannot be kept together, nor without one of them; leave out more, {remedy}"
    return f"{asked} cannot be kept together; change one of them: {' or '.join(enough)}; {remedy}"


def idle_latency(plan: Plan) -> str | None:
    """Return what is said of a limit on latency that every way keeps, which may be in the wrong unit; None for none."""
    limit_s = plan.constraints.latency_s
    if limit_s is None:
        return None
    ways = dataclasses.replace(plan.frontier, rows=plan.rows)
    slowest_s = float(ways.costs(plan.link, plan.load, plan.slowdown, "latency").max())
    if slowest_s > limit_s:
        return None
    return (
        f"--latency {limit_s:g} s rules nothing out, since the slowest way takes {slowest_s:.3g} s; write "
        f"{limit_s:g}ms if milliseconds are meant"
    )


def _written(name: str, value: float) -> str:
    """Return a limit as it is written on the command line, with its unit: three digits, none of which is too low."""
    option, factor, unit = _MEASURED[name]
    amount = value / factor
    if name != "min_layers" and amount > 0:
        step = 10.0 ** (math.floor(math.log10(amount)) - 2)
        amount = math.ceil(amount / step - 1e-9) * step
    return f"{option} {amount:.6g}{unit}"
