"""Checks of the files that a command is to read. They come before PyTorch is imported, which takes seconds."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

from torchsurgeon.cli import completion
from torchsurgeon.errors import TorchSurgeonError, short


def check_given(*files: str | Path | None) -> None:
    """Check that files are there.

    Args:
        files: the files; None for one that was not given.

    Raises:
        TorchSurgeonError: one of them is not.
    """
    for file in files:
        if file is not None and not os.path.exists(file):
            raise TorchSurgeonError(f"{short(Path(file))} cannot be read: there is no such file")


def check_costs(names: Iterable[str]) -> None:
    """Check that each name is a file's or a reference device's.

    Raises:
        TorchSurgeonError: one of them is neither.
    """
    for name in names:
        if not os.path.exists(name) and name not in completion.REFERENCE_DEVICES:
            raise TorchSurgeonError(
                f"there is no file {short(Path(name))}, and no reference device of that name; there are "
                f"{completion.marked_devices()}"
            )


def check_model(options: argparse.Namespace) -> None:
    """Check that the files of the model that ``options`` name are there: an exported program, and its weights.

    Raises:
        TorchSurgeonError: one of them is not.
    """
    if options.spec.endswith(".pt2") and not os.path.isfile(options.spec):
        raise TorchSurgeonError(f"an exported program must be a file; there is no file {short(options.spec)}")
    weights = getattr(options, "weights", None)
    if weights not in (None, "default") and not os.path.isfile(weights):
        raise TorchSurgeonError(f"the weights must be a file; there is no file {short(weights)}")
