"""Tables of layers on terminals that have no room for all of them."""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_ANY_WIDTH = 10_000


class Name:
    """A cell of one line. Where there is no room its middle is left out: layers differ at their names' ends."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, max(len(self._text), 1))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text, most = self._text, options.max_width
        if len(text) > most:
            end = 2 * most // 3
            text = f"{text[: most - 1 - end]}…{text[len(text) - end :]}"
        yield Text(text, no_wrap=True, overflow="crop")


class Fitting:
    """The first of some tables that has room with nothing left out, or the last."""

    def __init__(self, *tables: Table) -> None:
        self._tables = tables

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        free = options.update_width(_ANY_WIDTH)
        widths = (Measurement.get(console, free, table).maximum for table in self._tables)
        fitting = (table for table, width in zip(self._tables, widths, strict=True) if width <= options.max_width)
        yield next(fitting, self._tables[-1])
