"""What fitting chose for a calibrated device: the form of each kind's model, and the correction of whole models."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from torchsurgeon.errors import short
from torchsurgeon.prediction.damage import numbers
from torchsurgeon.prediction.regression import FORMS, HeldOut


@dataclasses.dataclass(frozen=True)
class BlockCorrection:
    """The factor from the sum of a model's predicted layers to the time of the whole model.

    A sum misses fused activations, launches that overlap, and caches. So ``whole = sum · exp(offset + slope ·
    log(mean))``, where the mean is that of the layers' predictions.

    Attributes:
        offset: see the formula.
        slope: see the formula.
        shortest_s: the shortest mean it was fitted on; a shorter one counts as this.
        longest_s: the longest mean it was fitted on; a longer one counts as this.
        low: 90 % of the networks it was fitted on took at least this many times the corrected sum.
        high: and at most this many times.
    """

    offset: float = 0.0
    slope: float = 0.0
    shortest_s: float = 1e-6
    longest_s: float = 1.0
    low: float = 1.0
    high: float = 1.0

    @property
    def is_fitted(self) -> bool:
        """Whether enough networks were timed to fit it; otherwise the factor is 1."""
        return self.low < self.high

    def factor(self, sum_s: float, layers: int) -> float:
        """Return the whole model's seconds over the sum of its layers.

        Args:
            sum_s: the sum of the layers' predictions, in seconds.
            layers: how many layers there are.
        """
        mean_s = min(max(sum_s / max(layers, 1), self.shortest_s), self.longest_s)
        return math.exp(self.offset + self.slope * math.log(mean_s))

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> BlockCorrection:
        """Return what plain data holds.

        Raises:
            ValueError: a number is not valid, or the factor is out of all proportion.
        """
        block = numbers(BlockCorrection, data)
        ends = [block.factor(mean_s, 1) for mean_s in (block.shortest_s, block.longest_s)]
        if not (min(block.low, block.high) >= 0 and all(1e-3 < factor < 1e3 for factor in ends)):
            raise ValueError(
                f"the correction of whole models must be from 0.001 to 1000, its interval not negative; got {ends}, "
                f"{block.low} and {block.high}"
            )
        return block


@dataclasses.dataclass(frozen=True)
class FittedKind:
    """Which models were chosen for one kind.

    Attributes:
        form: the form of the model of seconds.
        held_out: its errors.
        energy_form: the form of the model of joules; None where too little was metered.
        energy_held_out: its errors.
    """

    form: str
    held_out: HeldOut
    energy_form: str | None = None
    energy_held_out: HeldOut | None = None

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> FittedKind:
        """Return what plain data holds.

        Raises:
            ValueError: there is no such form of a model, or a number is not valid.
        """
        form, energy_form, energy = data["form"], data["energy_form"], data["energy_held_out"]
        for chosen in (form, *([] if energy_form is None else [energy_form])):
            if chosen not in FORMS:
                raise ValueError(f"a model's form must be one of {', '.join(FORMS)}; got {short(chosen, 100)}")
        return FittedKind(
            form,
            numbers(HeldOut, data["held_out"], least=0.0),
            energy_form,
            None if energy is None else numbers(HeldOut, energy, least=0.0),
        )
