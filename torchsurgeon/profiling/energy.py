"""The energy of a model's layers, as a profile holds it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchsurgeon.errors import ProfileError, short

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, eq=False)
class LayerEnergy:
    """The energy of one run of each layer, and of the whole model, above that of the idle machine.

    Attributes:
        meter: the meter and what it meters ("rapl package-0").
        idle_power_w: the power of the idle machine in watts, which is subtracted.
        layer_j: mean joules of each layer, shape (layers,); NaN where nothing was metered.
        interval_j: their 95 % confidence intervals, shape (layers, 2); NaN where nothing was metered.
        whole_j: mean joules of the whole model, and the ends of their 95 % confidence interval.
    """

    meter: str
    idle_power_w: float
    layer_j: Array
    interval_j: Array
    whole_j: tuple[float, float, float]

    def check(self) -> None:
        """Check that these can be energies.

        A mean may be a little below zero, since the idle power is subtracted, but not where its interval says that it
        is not noise.

        Raises:
            ProfileError: a value is infinite, an interval has its ends swapped, or a value is below zero for certain.
        """
        if np.isinf([*self.layer_j, *self.whole_j, *self.interval_j.ravel(), self.idle_power_w]).any():
            raise ProfileError(
                "layer_j, interval_j and whole_j must hold finite joules, or NaN where they are not known; got an "
                "infinite one; measure the profile again"
            )
        if not self.idle_power_w >= 0:
            raise ProfileError(f"idle_power_w must be watts from 0 on; got {self.idle_power_w}; measure again")
        for what, means, intervals in (
            ("layer_j", self.layer_j, self.interval_j),
            ("whole_j", np.array(self.whole_j[:1]), np.array([self.whole_j[1:]])),
        ):
            low, high = intervals.T
            if (low > high).any():
                raise ProfileError(
                    f"an interval of {what} must have its lower end first; got "
                    f"{short(intervals[low > high][0].tolist())}; measure the profile again"
                )
            wrong = (means < 0) & ~((low <= means) & (high >= 0))
            if wrong.any():
                raise ProfileError(
                    f"{what} must hold joules from 0 on, or such as noise explains: a value below 0 whose interval "
                    f"reaches 0; got {means[wrong][0]:.6g}; measure the profile again"
                )

    def to_json(self) -> dict[str, Any]:
        """Return the energies as plain data; unknown ones are null."""
        return {
            "meter": self.meter,
            "idle_power_w": self.idle_power_w,
            "layer_j": _nulls(self.layer_j.tolist()),
            "interval_j": _nulls(self.interval_j.tolist()),
            "whole_j": _nulls(list(self.whole_j)),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> LayerEnergy:
        """Return the energies in plain data.

        Args:
            data: what ``to_json()`` returned.

        Raises:
            KeyError: a field is missing.
            TypeError: a field is of another type.
            ValueError: a field holds no number.
        """
        mean_j, low_j, high_j = floats(data["whole_j"]).tolist()
        return LayerEnergy(
            str(data["meter"]),
            float(floats(data["idle_power_w"])),
            floats(data["layer_j"]),
            floats(data["interval_j"]).reshape(-1, 2),
            (mean_j, low_j, high_j),
        )


def _nulls(values: Any) -> Any:
    """Return nested lists of numbers with None for NaN and infinities, which JSON does not have."""
    if isinstance(values, list):
        return [_nulls(value) for value in values]
    return values if math.isfinite(values) else None


def floats(values: Any) -> Array:
    """Return nested lists of numbers as an array, with NaN for None.

    Raises:
        TypeError: they hold something that is no number, such as true or "1", which NumPy would take for one.
    """
    _check_numbers(values)
    return np.asarray(values, dtype=np.float64)


def _check_numbers(values: Any) -> None:
    """Raise where nested lists hold anything but numbers and null: NumPy would take true and "1" for numbers, too."""
    if isinstance(values, list):
        for value in values:
            _check_numbers(value)
    elif values is not None and type(values) not in (int, float):
        raise TypeError
