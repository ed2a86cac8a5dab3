"""Calibrations as files: written whole or not at all, read with what is wrong named."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torchsurgeon.errors import CalibrationError

Figures = TypeVar("Figures")

DAMAGE = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError)
"""What reading data raises that is not what was written."""


def write_json(path: str | Path, data: Any) -> None:
    """Write a calibration so that an interruption leaves the old file or the new one, never half of it."""
    try:
        beside = Path(f"{path}.new")
        beside.write_text(json.dumps(data, separators=(",", ":")), encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        raise CalibrationError(f"{path} cannot be written: {error.strerror}") from None


def read_json(path: str | Path) -> Any:
    """Read a calibration's plain data."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise CalibrationError(
            f"{path}:{error.lineno}: not JSON, or cut short ({error.msg} at column {error.colno}); calibrate again"
        ) from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise CalibrationError(f"{path} is not JSON: {error}; calibrate again") from None


def numbers(of: type[Figures], data: Mapping[str, Any], positive: bool = False) -> Figures:
    """Return a dataclass of numbers from ``data``, which must hold just those.

    Raises TypeError or ValueError for one that is not finite, or with ``positive`` not above zero.
    """
    for name, value in data.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} is {value!r}, not a number")
        if not math.isfinite(value) or (positive and value <= 0):
            raise ValueError(f"{name} of {value} cannot be")
    if set(data) != {field.name for field in dataclasses.fields(of)}:  # type: ignore[arg-type]
        raise ValueError(f"the figures {', '.join(data)} are not those of {of.__name__}")
    return of(**data)


def damaged(error: Exception) -> CalibrationError:
    """Return the error to raise for one of :data:`DAMAGE`."""
    what = f"no field {error}" if isinstance(error, KeyError) else str(error)
    return CalibrationError(f"the calibration was cut short or edited ({what}); calibrate again")
