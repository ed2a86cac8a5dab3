"""What commands print on besides their answer: how wide, how far, and what to beware of."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console

_WIDE = 160


class Advance(Protocol):
    """Moves a bar to ``done`` of ``total``, and says what is done now where that changes."""

    def __call__(self, done: float, total: float, what: str | None = None) -> None: ...


def console() -> Console:
    """Return standard output for tables: a terminal as wide as it is, a file or a pipe as wide as any table."""
    from rich.console import Console

    found = Console()
    return found if found.is_terminal or "COLUMNS" in os.environ else Console(width=_WIDE)


@contextlib.contextmanager
def progress(what: str) -> Iterator[Advance]:
    """Show a bar on standard error meanwhile; gives what moves it."""
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
