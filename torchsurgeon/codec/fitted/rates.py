"""The rates of a fitted codec and its quantization steps; NumPy only."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import numpy

from torchsurgeon.codec.names import rounded_rate
from torchsurgeon.errors import CodecError, is_finite, short

# A coefficient becomes 0 within this many steps; every other interval is one step wide, and what is decoded is its
# middle. Measured on EfficientNet-Lite0: with the usual wider zone, or with what is decoded drawn towards 0, the answer
# changes more at the same bytes, although the squared error is less. Errors that all point to 0 add up.
ZERO_STEPS = 0.58
# Float32 tells whole numbers apart up to here. Beyond, a tensor is sent without loss.
MOST_MAGNITUDE = float(1 << 24)


@dataclasses.dataclass(frozen=True)
class Rates:
    """The quantization steps that a fitted codec has tables for, and the rates that these took on its sample.

    Attributes:
        steps: the steps, the finest first.
        rates: the bits per value of each.

    Raises:
        CodecError: they do not rise and fall.
    """

    steps: tuple[float, ...]
    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        steps, rates = self.steps, self.rates
        rising = all(0 < a < b for a, b in pairwise(steps))
        falling = all(a > b > 0 for a, b in pairwise(rates))
        numbers = all(map(is_finite, (*steps, *rates)))
        if not (numbers and rising and falling and steps and steps[0] > 0 and rates and rates[-1] > 0):
            raise CodecError("the steps of a fitted codec must rise and its rates fall, all positive; fit it again")
        if len(rates) != len(steps):
            raise CodecError("a fitted codec must have a rate and tables for each step; fit it again")

    def wanted(self, rate: float | str, name: str) -> float:
        """Return a rate that was asked for, rounded to four digits.

        Args:
            rate: the rate, as a number or as the digits of one.
            name: the codec's name, which the error tells.

        Raises:
            CodecError: it does not lie between the lowest and the highest rate.
        """
        wanted, lowest, highest = map(rounded_rate, (rate, self.rates[-1], self.rates[0]))
        if not lowest <= wanted <= highest:
            raise CodecError(
                f"the rate of {name} must be from {lowest:g} to {highest:g} bits a value, as a number or its "
                f"digits; got {short(rate, 40)}"
            )
        return wanted

    def step(self, rate: float) -> float:
        """Return the step of a rate: between those of the file, as the logarithms of rates and steps lie."""
        rates, steps = numpy.log(self.rates[::-1]), numpy.log(self.steps[::-1])
        step = float(numpy.exp(numpy.interp(math.log(rate), rates, steps)))
        # The exponential of a logarithm may lie a rounding beyond the ends.
        return min(max(step, min(self.steps)), max(self.steps))

    def row(self, rate: float) -> int:
        """Return the row of tables whose rate is nearest."""
        return min(range(len(self.rates)), key=lambda row: abs(math.log(self.rates[row] / rate)))
