"""Tables that fit the terminal: where there is too little room, columns are left out and names are shortened."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import string
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

# Marks what is chosen, before its name.
CHOSEN = "★ "
# With fewer characters, layers such as features.denseblock3.denselayer24.conv2 can no longer be told apart.
_ENOUGH = 18
_LEAST = 4
# Only columns of this rank are left out although names could be shortened instead.
BEFORE_NAMES = 1


def shortened(name: str, most: int) -> str:
    """Return a name in at most ``most`` characters, with "…" for what is missing.

    A layer's name is a path such as ``features.denseblock3.denselayer24.conv2``. Its steps are shortened from the left,
    and each keeps its first letter and its number, so that names of different layers stay different:
    ``f…d…3.denselayer24.conv2``. Where that is not enough, steps without a number are left out, and the last step is
    shortened.

    Args:
        name: the name, which may begin with ``CHOSEN``.
        most: how many characters there is room for.
    """
    mark = CHOSEN if name.startswith(CHOSEN) else ""
    steps = name[len(mark) :].split(".")
    room = most - len(mark)
    for i, step in enumerate(steps[:-1]):
        if len(_path(steps)) <= room:
            break
        number = step[len(step.rstrip(string.digits)) :]
        for kept in range(len(step) - len(number) - 2, 0, -1):
            steps[i] = f"{step[:kept]}…{number}"
            if len(_path(steps)) <= room:
                break
    if len(_path(steps)) > room:
        steps[1:-1] = [step if step[-1:].isdigit() else "…" for step in steps[1:-1]]
    left = len(steps[-1]) - (len(_path(steps)) - room)
    if len(steps) > 1 and 4 <= left < len(steps[-1]):
        steps[-1] = f"{steps[-1][:1]}…{steps[-1][2 - left :]}"
    text = mark + _path(steps)
    if len(text) <= most:
        return text
    begin = max(most - 1, 0) // 5
    return f"{text[:begin]}…{text[len(text) - (most - 1 - begin) :]}" if most > 1 else "…"[:most]


def _path(steps: Sequence[str]) -> str:
    """Steps joined by dots, but for those after an ellipsis, which sets them apart already."""
    return re.sub("…+", "…", ".".join(steps).replace("….", "…"))


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a ``FittingTable``, with one cell for each row.

    Attributes:
        header: what stands above the cells, with the unit where the cells do not name it.
        cells: the cells' text. A cell may have several lines.
        rank: when this column is left out: those of rank 1 before any name is shortened, then 2, 3 and so on, as long
            as names have too little room. 0 is never left out.
        instead: the column that takes this one's place when it is left out, such as the same figures without their
            intervals.
        left: whether the cells are aligned to the left. Figures are aligned to the right.
        is_name: whether the cells are names, which ``shortened()`` shortens.
        enough: how many characters names have before a column is left out to give them more.
        note: a sentence that stands below the table where the column is shown.
    """

    header: str
    cells: Sequence[str]
    rank: int = 0
    instead: Column | None = None
    left: bool = False
    is_name: bool = False
    enough: int = _ENOUGH
    note: str = ""

    @functools.cached_property
    def width(self) -> int:
        """The characters that the widest line takes."""
        lines = itertools.chain(self.header.splitlines(), *(cell.splitlines() for cell in self.cells))
        return max(map(cell_len, lines), default=0)

    @property
    def least(self) -> int:
        """The characters that a column of names takes at least."""
        return max(cell_len(self.header), _LEAST)


def names(header: str, cells: Sequence[str]) -> Column:
    """Return a column of names, which is never left out."""
    return Column(header, cells, left=True, is_name=True)


class FittingTable:
    """A table for any width of terminal, in which no cell is folded over several lines.

    Columns are left out, those of least worth first, until the names have room, and then the names are shortened. Below
    the table stand the caption, the notes of the columns that are shown, and the names of those left out.
    """

    def __init__(
        self,
        title: str,
        columns: Sequence[Column],
        caption: str = "",
        *,
        bold: Sequence[int] = (),
        ends: Sequence[int] = (),
    ) -> None:
        """Keep what is drawn when the width is known.

        Args:
            title: what stands above the table.
            columns: the columns from left to right, all with as many cells.
            caption: what stands below the table.
            bold: the positions of rows that are drawn in bold.
            ends: the positions of rows below which the table is parted, as above a sum.
        """
        self._title, self._columns, self._caption = title, tuple(columns), caption
        self._bold, self._ends = frozenset(bold), frozenset(ends)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        width = min(_width(self._columns), options.max_width)
        return Measurement(width, width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = _fitting(self._columns, options.max_width)
        headers = {column.header for column in shown}
        missing = [column.header for column in self._columns if column.header not in headers]
        notes = [self._caption, *(column.note for column in shown)]
        if missing:
            notes.append(f"A wider terminal also shows: {', '.join(missing)}.")
        caption = " ".join(filter(None, notes))
        table = Table(title=escape(self._title), caption=escape(caption) or None, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        cells = []
        for column, most in zip(shown, _allotted(shown, options.max_width), strict=True):
            table.add_column(escape(column.header), justify="left" if column.left else "right", no_wrap=True)
            # As Text, since a layer's name may look like Rich's markup.
            cells.append([Text(shortened(cell, most) if column.is_name else cell) for cell in column.cells])
        for i, row in enumerate(zip(*cells, strict=True)):
            table.add_row(*row, style="bold" if i in self._bold else None, end_section=i in self._ends)
        yield table


def _allotted(columns: Sequence[Column], most: int) -> list[int]:
    """How many characters each column gets: the widest names give way."""
    allotted = [column.width for column in columns]
    of_names = [i for i, column in enumerate(columns) if column.is_name]
    for _ in range(_width(columns) - most):
        widest = max(of_names, key=lambda i: allotted[i] - columns[i].least, default=None)
        if widest is not None and allotted[widest] > columns[widest].least:
            allotted[widest] -= 1
    return allotted


def _width(columns: Sequence[Column]) -> int:
    """The characters that a table of these columns takes: one before each, one after, and one at the end."""
    return sum(column.width + 2 for column in columns) + 1


def _fitting(columns: Sequence[Column], most: int) -> list[Column]:
    """The columns that are shown in ``most`` characters."""
    shown = list(columns)
    while ranks := {column.rank for column in shown if column.rank}:
        least = min(ranks)
        over = _width(shown) - most
        if over <= 0 or (least > BEFORE_NAMES and over <= _spare(shown)):
            break
        narrower = (column.instead if column.rank == least else column for column in shown)
        shown = [column for column in narrower if column is not None]
    return shown


def _spare(columns: Sequence[Column]) -> int:
    """The characters that names can give without becoming too short."""
    return sum(max(column.width - max(column.least, column.enough), 0) for column in columns if column.is_name)
