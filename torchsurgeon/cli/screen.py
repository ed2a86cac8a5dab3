"""What commands print besides their answer: tables as wide as there is room, progress, warnings and an interrupt."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Protocol, TextIO

from torchsurgeon import errors
from torchsurgeon.errors import NoisyProfileWarning

if TYPE_CHECKING:
    from rich.console import Console

_WIDE = 160


class Advance(Protocol):
    """Moves a progress bar to ``done`` of ``total``, and names the present step where ``what`` is given."""

    def __call__(self, done: float, total: float, what: str | None = None) -> None: ...


def console() -> Console:
    """Return standard output for tables: as wide as the terminal, or wide enough for any table in a file or a pipe."""
    from rich.console import Console

    class Output(Console):
        """As Rich's, but what it raises where nobody reads its output any more is what others raise there, too."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns) > 0:
        return Output(width=int(columns))
    # Some programs set COLUMNS to 0 for "unknown", with which Rich would print nothing.
    return Output(width=os.get_terminal_size().columns or _WIDE if sys.stdout.isatty() else _WIDE)


@contextlib.contextmanager
def progress(what: str) -> Iterator[Advance]:
    """Show a progress bar on standard error within the context, and give the function that moves it."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)

        def advance(done: float, total: float, what: str | None = None) -> None:
            bar.update(task, completed=done, total=total, description=what)

        yield advance


def warn(message: object) -> None:
    """Print a warning on standard error."""
    print(f"torchsurgeon: warning: {message}", file=sys.stderr)


@contextlib.contextmanager
def advising() -> Iterator[None]:
    """Within the context, print the package's own warnings as a command's, with advice for who uses that."""
    shown_otherwise = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if isinstance(message, NoisyProfileWarning):
            warn(f"{message.finding}; quiet or cool the machine, then start this command again")
        elif category.__module__ == errors.__name__:
            warn(message)
        else:
            shown_otherwise(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown_otherwise


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Within the context, in which packages are imported, let Ctrl-C end the process at once, with one line.

    Otherwise it would raise an exception. Raised while PyTorch's compiled code starts, that may abort the process or be
    reported as a failed import.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(signal_number: int, frame: FrameType | None) -> None:
    os.write(2, b"torchsurgeon: interrupted\n")
    os._exit(130)
