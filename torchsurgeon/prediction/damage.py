"""What a calibration's plain data must hold, and what is refused where somebody edited it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from torchsurgeon.errors import CalibrationError

Figures = TypeVar("Figures")
_FAR = 1e21

DAMAGE = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError)
"""What reading data raises that is not what was written."""


def numbers(of: type[Figures], data: Mapping[str, Any], least: float = -_FAR) -> Figures:
    """Return a dataclass of numbers from ``data``, which must hold just those.

    Raises TypeError or ValueError for one that is not finite, below ``least`` or beyond all reason.
    """
    for name, value in data.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} is {value!r}, not a number")
        if not least <= value <= _FAR:
            raise ValueError(f"{name} of {value} cannot be")
    if set(data) != {field.name for field in dataclasses.fields(of)}:  # type: ignore[arg-type]
        raise ValueError(f"the figures {', '.join(data)} are not those of {of.__name__}")
    return of(**data)


def damaged(error: Exception) -> CalibrationError:
    """Return the error to raise for one of :data:`DAMAGE`."""
    what = f"no field {error}" if isinstance(error, KeyError) else str(error)
    return CalibrationError(f"the calibration was cut short or edited ({what}); calibrate again")
