"""Files that are written as a whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from torchsurgeon.errors import TorchSurgeonError, short

ErrorClass = type[TorchSurgeonError]


def write(path: str | Path, content: bytes, error: ErrorClass) -> None:
    """Write a file. After an interruption it holds the old content or the new, but never a part.

    What a symbolic link points to is written, and the link stays. A device or pipe, such as ``/dev/stdout``, is written
    to as it is.

    Args:
        path: the file.
        content: what it is to hold.
        error: the class that is raised where the file cannot be written.
    """
    target = Path(os.path.realpath(path))
    with _told(path, error):
        if _is_stream(target):
            target.write_bytes(content)
            return
        with _beside(target) as new:
            new.write_bytes(content)
            os.replace(new, target)


def check_writable(path: str | Path, error: ErrorClass) -> None:
    """Raise ``error`` where ``write()`` would raise it for ``path``. The content of the file stays."""
    target = Path(os.path.realpath(path))
    with _told(path, error):
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not _is_stream(target):
            with _beside(target) as new:
                new.touch()


def _is_stream(target: Path) -> bool:
    return target.exists() and not target.is_file() and not target.is_dir()


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    # The process number keeps two processes that write the same file apart.
    new = Path(f"{target}.{os.getpid()}.new")
    try:
        yield new
    finally:
        new.unlink(missing_ok=True)


@contextlib.contextmanager
def _told(path: str | Path, kind: ErrorClass) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise kind(f"{short(Path(path))} cannot be written: {error.strerror}") from None
