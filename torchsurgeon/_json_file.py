"""What the package keeps as JSON: written whole or not at all, read with the file and what is wrong with it named."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from torchsurgeon.errors import TorchSurgeonError

T = TypeVar("T")
Kind = type[TorchSurgeonError]


def write(path: str | Path, data: Any, error: Kind) -> None:
    """Write ``data`` so that an interruption leaves the old file or the new one. Raises ``error`` where it cannot be
    written."""
    with _beside(path, error) as new:
        new.write_text(json.dumps(data, separators=(",", ":"), allow_nan=False), encoding="utf-8")
        os.replace(new, path)


def check_writable(path: str | Path, error: Kind) -> None:
    """Raise what :func:`write` would where it cannot write to ``path``, whose content stays."""
    with _beside(path, error) as new:
        new.touch()


@contextlib.contextmanager
def _beside(path: str | Path, kind: Kind) -> Iterator[Path]:
    # Another process may be writing the same file.
    new = Path(f"{path}.{os.getpid()}.new")
    try:
        try:
            yield new
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        raise kind(f"{path} cannot be written: {error.strerror}") from None


def read(path: str | Path, error: Kind, remedy: str) -> Any:
    """Return the plain data in a file. Raises ``error``, with a ``remedy``, where it cannot be read or is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror}") from None
    except (ValueError, RecursionError) as problem:
        raise error(f"{path} is not JSON, or was cut short ({problem}); {remedy}") from None


def load(path: str | Path, parse: Callable[[Any], T], error: Kind, remedy: str) -> T:
    """Return what ``parse`` makes of the data in a file, which is named in the ``error`` that it raises."""
    data = read(path, error, remedy)
    try:
        return parse(data)
    except error as problem:
        raise error(f"{path}: {problem}") from None
