"""The choice and what it gains over a grid of uplink rates and server loads."""

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

    ``chosen`` holds positions in ``rows``, shape (loads, rates); ``value``, ``on_device`` and ``on_server`` the
    objective of the choice and of the two ends in their best form, of the same shape. ``gain`` is how many times the
    choice is better than the better end: 1 where an end is chosen.
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
        """The better end's objective over the choice's, shape (loads, rates)."""
        best_end = np.minimum(self.on_device, self.on_server)
        return np.divide(best_end, self.value, out=np.ones_like(best_end), where=self.value > 0)

    def save(self, path: str | Path) -> None:
        """Write one line for each load and rate as CSV. Raises PlanError where it cannot be written."""
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
    """Return the choice at each uplink rate and load; the downlink's rate stays in its ratio to the uplink's.

    The rows of ``frontier`` must hold both ends, as those of :meth:`Frontier.build` do.
    Raises :class:`~torchsurgeon.errors.PlanError` as :meth:`Frontier.best` does, and
    :class:`~torchsurgeon.errors.LinkError` for a rate that cannot be.
    """
    wanted = Objective.of(objective)
    ratio = link.downlink_bit_s / link.uplink_bit_s
    at_ends = [np.array([row.on_device for row in frontier.rows]), np.array([row.index == 0 for row in frontier.rows])]
    if not len(uplink_bit_s) or not len(loads) or not all(end.any() for end in at_ends):
        raise PlanError("a sweep needs rates, loads, and a frontier with both ends of the model")
    costs = np.empty((len(loads), len(uplink_bit_s), len(frontier.rows)))
    for j, rate in enumerate(uplink_bit_s):
        here = dataclasses.replace(link, uplink_bit_s=float(rate), downlink_bit_s=float(rate) * ratio)
        for i, load in enumerate(loads):
            costs[i, j] = frontier.costs(here, float(load), slowdown, wanted)
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
