"""JSON files: written as a whole or not at all, and read with errors that name the file and what is wrong with it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from torchsurgeon.errors import TorchSurgeonError, short

T = TypeVar("T")
Kind = type[TorchSurgeonError]


def write(path: str | Path, data: Any, error: Kind) -> None:
    """Write ``data`` as JSON. After an interruption the file holds the old data or the new, but never a part.

    Args:
        path: the file.
        data: what ``json.dumps`` accepts.
        error: the class that is raised where the file cannot be written.
    """
    with _beside(path, error) as new:
        new.write_text(json.dumps(data, separators=(",", ":"), allow_nan=False), encoding="utf-8")
        os.replace(new, path)


def check_writable(path: str | Path, error: Kind) -> None:
    """Raise ``error`` where ``write()`` would raise it for ``path``. The content of the file stays."""
    with _beside(path, error) as new:
        new.touch()


@contextlib.contextmanager
def _beside(path: str | Path, kind: Kind) -> Iterator[Path]:
    # The process number keeps two processes that write the same file apart.
    new = Path(f"{path}.{os.getpid()}.new")
    try:
        try:
            yield new
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        raise kind(f"{short(Path(path))} cannot be written: {error.strerror}") from None


def read(path: str | Path, error: Kind, remedy: str) -> Any:
    """Return the data in a JSON file.

    Args:
        path: the file.
        error: the class that is raised where the file cannot be read or is not JSON.
        remedy: what the error advises for a file that is not JSON, such as "measure it again".
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as problem:
        raise error(f"{short(Path(path))} cannot be read: {problem.strerror}") from None
    except (ValueError, RecursionError) as problem:
        what = short(problem, 100)
        raise error(f"{short(Path(path), 200)} is not JSON, or was cut short ({what}); {remedy}") from None


def load(path: str | Path, parse: Callable[[Any], T], error: Kind, remedy: str) -> T:
    """Return what ``parse`` makes of the data in a JSON file; an ``error`` that it raises then names the file.

    Args:
        path: the file.
        parse: turns the data into what is returned.
        error: as in ``read()``.
        remedy: as in ``read()``.
    """
    data = read(path, error, remedy)
    try:
        return parse(data)
    except error as problem:
        raise error(f"{short(Path(path))}: {problem}") from None
