"""Calibrations as files: written whole or not at all, read with what is wrong named."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torchsurgeon.errors import CalibrationError

Figures = TypeVar("Figures")
_FAR = 1e21

DAMAGE = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError)
"""What reading data raises that is not what was written."""


def write_json(path: str | Path, data: Any) -> None:
    """Write a calibration so that an interruption leaves the old file or the new one, never half of it."""
    with _beside(path) as new:
        new.write_text(json.dumps(data, separators=(",", ":")), encoding="utf-8")
        os.replace(new, path)


def check_writable(path: str | Path) -> None:
    """Raise what :func:`write_json` would where it cannot write to ``path``, whose content stays."""
    with _beside(path) as new:
        new.touch()


@contextlib.contextmanager
def _beside(path: str | Path) -> Iterator[Path]:
    # Another process may be writing the same file.
    new = Path(f"{path}.{os.getpid()}.new")
    try:
        try:
            yield new
        finally:
            new.unlink(missing_ok=True)
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
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{path} is not JSON: {error}; calibrate again") from None


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
