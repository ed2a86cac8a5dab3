"""Warnings, at the line of the program that called."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import FrameType

import torch

_BETWEEN = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))


def warn_caller(text: str, category: type[Warning]) -> None:
    """Warn at the first line up the stack that is neither this package's nor PyTorch's."""
    level = 2
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=level)
