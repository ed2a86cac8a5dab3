"""The choice of a cut, and what it gains, over a grid of uplink rates and server loads."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from torchsurgeon.errors import PlanError
from torchsurgeon.link import Link
from torchsurgeon.planning.frontier import Frontier
from torchsurgeon.planning.objective import Objective
from torchsurgeon.planning.rows import Array, Row

_COLUMNS = ("uplink_bit_s", "load", "index", "cut", "codec", "value", "on_device", "on_server", "gain")


@dataclasses.dataclass(frozen=True, eq=False)
class Sweep:
    """The best row at every load and uplink rate.

    Attributes:
        model: the model's class name.
        objective: what was minimized.
        link: the link whose uplink rate was varied.
        uplink_bit_s: the uplink rates, shape (rates,).
        loads: the server's loads, shape (loads,).
        rows: the rows that were chosen among.
        chosen: the position in ``rows`` of each choice, shape (loads, rates).
        value: the objective's value of each choice, shape (loads, rates).
        on_device: its value with everything on the device, shape (loads, rates).
        on_server: its value with everything on the server, encoded in the best way, shape (loads, rates).
    """

    model: str
    objective: Objective
    link: Link
    uplink_bit_s: Array
    loads: Array
    rows: tuple[Row, ...]
    chosen: NDArray[np.intp]
    value: Array
    on_device: Array
    on_server: Array

    @property
    def gain(self) -> Array:
        """The value of the better end over that of the choice, shape (loads, rates); 1 where an end is chosen."""
        best_end = np.minimum(self.on_device, self.on_server)
        return np.divide(best_end, self.value, out=np.ones_like(best_end), where=self.value > 0)

    def save(self, path: str | Path) -> None:
        """Write one line for each load and rate as CSV.

        Raises:
            PlanError: the file cannot be written.
        """
        gain = self.gain
        try:
            with Path(path).open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(_COLUMNS)
                for i, load in enumerate(self.loads):
                    for j, rate in enumerate(self.uplink_bit_s):
                        row = self.rows[self.chosen[i, j]]
                        numbers = [self.value[i, j], self.on_device[i, j], self.on_server[i, j], gain[i, j]]
                        writer.writerow([rate, load, row.index, row.name, row.codec, *numbers])
        except OSError as error:
            raise PlanError(f"{path} cannot be written: {error.strerror}") from None


def sweep(
    frontier: Frontier,
    link: Link,
    uplink_bit_s: Sequence[float],
    loads: Sequence[float],
    objective: str | Mapping[str, float] | Objective = "latency",
    slowdown: float = 1.0,
) -> Sweep:
    """Return the choice at each uplink rate and load.

    Args:
        frontier: the rows to choose among; with both ends of the model, as ``Frontier.build()`` returns them.
        link: the link; its downlink keeps its ratio to the uplink, as ``Link.with_uplink()`` says.
        uplink_bit_s: the uplink rates.
        loads: the factors by which the server is slower than its profile says.
        objective: what to minimize, as ``Objective.of()`` takes it.
        slowdown: the factor by which the device is slower than its profile says.

    Raises:
        PlanError: rates or loads are missing, an end is, or what ``Frontier.best()`` refuses.
        LinkError: a rate is not positive.
    """
    wanted = Objective.of(objective)
    at_ends = [np.array([row.on_device for row in frontier.rows]), np.array([row.index == 0 for row in frontier.rows])]
    if not len(uplink_bit_s) or not len(loads) or not all(end.any() for end in at_ends):
        raise PlanError("a sweep needs rates, loads, and a frontier with both ends of the model")
    costs = np.empty((len(loads), len(uplink_bit_s), len(frontier.rows)))
    for j, rate in enumerate(uplink_bit_s):
        varied = link.with_uplink(float(rate))
        for i, load in enumerate(loads):
            costs[i, j] = frontier.costs(varied, float(load), slowdown, wanted)
    return Sweep(
        frontier.model,
        wanted,
        link,
        np.asarray(uplink_bit_s, dtype=np.float64),
        np.asarray(loads, dtype=np.float64),
        frontier.rows,
        costs.argmin(axis=2),
        costs.min(axis=2),
        *(costs[..., end].min(axis=2) for end in at_ends),
    )
