"""The choice of a cut, and what it gains, over a grid of uplink rates and server loads or device slow-downs."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from torchsurgeon.errors import PlanError, is_finite, short
from torchsurgeon.link import Link
from torchsurgeon.planning.frontier import Frontier
from torchsurgeon.planning.objective import Objective
from torchsurgeon.planning.row import Array, Row

LEAST_GAIN = 1.02
"""A cut in between counts as the best where it is by this factor better than the better of both ends."""
Varied = Literal["load", "slowdown"]
_COLUMNS = ("index", "cut", "codec", "value", "on_device", "on_server", "gain")


@dataclasses.dataclass(frozen=True, eq=False)
class Sweep:
    """The best row at every uplink rate, and every load of the server or slow-down of the device.

    Attributes:
        model: the model's class name.
        objective: what was minimized.
        link: the link whose uplink rate was varied.
        uplink_bit_s: the uplink rates, shape (rates,).
        varied: what else was varied: ``"load"`` or ``"slowdown"``, the factor by which server or device is slower than
            its profile says.
        factors: the values of that factor, shape (factors,).
        rows: the rows that were chosen among.
        chosen: the position in ``rows`` of each choice, shape (factors, rates).
        value: the objective's value of each choice, shape (factors, rates).
        on_device: its value with everything on the device, shape (factors, rates).
        on_server: its value with everything on the server, encoded in the best way, shape (factors, rates).
    """

    model: str
    objective: Objective
    link: Link
    uplink_bit_s: Array
    varied: Varied
    factors: Array
    rows: tuple[Row, ...]
    chosen: NDArray[np.intp]
    value: Array
    on_device: Array
    on_server: Array

    @property
    def gain(self) -> Array:
        """The value of the better end over that of the choice, shape (factors, rates); 1 where an end is chosen."""
        best_end = np.minimum(self.on_device, self.on_server)
        return np.divide(best_end, self.value, out=np.ones_like(best_end), where=self.value > 0)

    @property
    def is_split(self) -> NDArray[np.bool_]:
        """Where a cut in between is better than both ends by ``LEAST_GAIN``, shape (factors, rates)."""
        between = np.array([not row.on_device and row.index > 0 for row in self.rows])
        return np.asarray(between[self.chosen] & (self.gain >= LEAST_GAIN))

    @property
    def winners(self) -> tuple[Row, ...]:
        """The rows that are the best somewhere."""
        return tuple(self.rows[k] for k in np.unique(self.chosen))

    def summary(self) -> dict[str, float]:
        """Return the share of the grid where a cut in between is the best, and the gain over the better end.

        The gain is given as its mean over the grid, its mean where a cut in between is the best, and its most.
        """
        gain, where = self.gain, self.is_split
        return {
            "share": round(float(where.mean()), 4),
            "mean_gain": round(float(gain.mean()), 3),
            "mean_gain_where_split": round(float(gain[where].mean()), 3) if where.any() else 1.0,
            "most_gain": round(float(gain.max()), 3),
        }

    def save(self, path: str | Path) -> None:
        """Write one line for each factor and rate as CSV.

        Raises:
            PlanError: the file cannot be written.
        """
        gain = self.gain
        try:
            with Path(path).open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(["uplink_bit_s", self.varied, *_COLUMNS])
                for i, factor in enumerate(self.factors):
                    for j, rate in enumerate(self.uplink_bit_s):
                        row = self.rows[self.chosen[i, j]]
                        numbers = [self.value[i, j], self.on_device[i, j], self.on_server[i, j], gain[i, j]]
                        writer.writerow([rate, factor, row.index, row.name, row.codec, *numbers])
        except OSError as error:
            raise PlanError(f"{path} cannot be written: {error.strerror}") from None


def sweep(
    frontier: Frontier,
    link: Link,
    uplink_bit_s: Sequence[float],
    factors: Sequence[float],
    objective: str | Mapping[str, float] | Objective = "latency",
    slowdown: float = 1.0,
    *,
    varied: Varied = "load",
    device_w: float | None = None,
) -> Sweep:
    """Return the choice at each uplink rate, and each load of the server or slow-down of the device.

    Args:
        frontier: the rows to choose among; with both ends of the model, as ``Frontier.build()`` returns them.
        link: the link; its downlink keeps its ratio to the uplink, as ``Link.with_uplink()`` says.
        uplink_bit_s: the uplink rates.
        factors: the loads, or the slow-downs that ``slowdown`` is multiplied with.
        objective: what to minimize, as ``Objective.of()`` takes it.
        slowdown: the factor by which the device is slower than its profile says.
        varied: whether ``factors`` are loads (``"load"``) or slow-downs (``"slowdown"``, at a load of 1).
        device_w: the watts that the device takes while it computes, at any slow-down. Without it the joules of the
            frontier's rows are taken.

    Raises:
        PlanError: rates or factors are missing, an end is, ``varied`` is neither of both, ``device_w`` is negative, or
            what ``Frontier.best()`` refuses.
        LinkError: a rate is not positive.
    """
    wanted = Objective.of(objective)
    if varied not in get_args(Varied):
        raise PlanError(f"varied must be one of {', '.join(get_args(Varied))}; got {short(varied)}")
    if device_w is not None and not (is_finite(device_w) and device_w >= 0):
        raise PlanError(f"device_w must be zero or a positive number of watts; got {short(device_w)}")
    at_ends = [np.array([row.on_device for row in frontier.rows]), np.array([row.index == 0 for row in frontier.rows])]
    if not len(uplink_bit_s) or not len(factors) or not all(end.any() for end in at_ends):
        raise PlanError(f"a sweep needs rates, {varied}s, and a frontier with both ends of the model")
    links = [link.with_uplink(float(rate)) for rate in uplink_bit_s]
    costs = np.empty((len(factors), len(links), len(frontier.rows)))
    for i, factor in enumerate(map(float, factors)):
        load, slow = (factor, slowdown) if varied == "load" else (1.0, slowdown * factor)
        metered = frontier if device_w is None else _metered(frontier, device_w * slow)
        for j, over in enumerate(links):
            costs[i, j] = metered.costs(over, load, slow, wanted)
    return Sweep(
        frontier.model,
        wanted,
        link,
        np.asarray(uplink_bit_s, dtype=np.float64),
        varied,
        np.asarray(factors, dtype=np.float64),
        frontier.rows,
        costs.argmin(axis=2),
        costs.min(axis=2),
        *(costs[..., end].min(axis=2) for end in at_ends),
    )


def _metered(frontier: Frontier, power_w: float) -> Frontier:
    """Return a frontier whose rows take this power for each second of the device at a slow-down of 1."""
    rows = [dataclasses.replace(row, device_j=power_w * (row.head_s + row.encode_s)) for row in frontier.rows]
    return dataclasses.replace(frontier, rows=tuple(rows))
