"""Check the plain data of a calibration, which may have been edited or cut short."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from torchsurgeon.errors import CalibrationError, short

Figures = TypeVar("Figures")
# No figure of a calibration is as large as this.
_FAR = 1e21

DAMAGE = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError)
"""What is raised by reading data that is not as it was written."""


def numbers(of: type[Figures], data: Mapping[str, Any], least: float = -_FAR) -> Figures:
    """Return a dataclass of numbers from plain data.

    Args:
        of: the dataclass.
        data: its fields by name; no other may be there.
        least: the least value that a field may have.

    Raises:
        TypeError: a field is no number.
        ValueError: a number is not finite or out of range, a field is missing, or there is another.
    """
    for name, value in data.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{short(name, 60)} must be a number; got {short(value, 100)}")
        if not least <= value <= _FAR:
            raise ValueError(f"{short(name, 60)} must be from {least:g} to {_FAR:g}; got {short(value, 100)}")
    if set(data) != {field.name for field in dataclasses.fields(of)}:  # type: ignore[arg-type]
        raise ValueError(
            f"{of.__name__} must hold {', '.join(field.name for field in dataclasses.fields(of))}; "  # type: ignore[arg-type]
            f"got {short(', '.join(map(str, data)), 100)}"
        )
    return of(**data)


def damaged(error: Exception) -> CalibrationError:
    """Return the error to raise where reading raised one of ``DAMAGE``."""
    what = f"no field {short(error)}" if isinstance(error, KeyError) else short(error)
    return CalibrationError(f"the calibration was cut short or edited ({what}); calibrate again")
