"""Timed operations as a table: from a calibration, or from measurements taken elsewhere, in CSV files."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchsurgeon.errors import CalibrationError
from torchsurgeon.prediction.kinds import KINDS, Array, Kind, Operation

FEWEST_SAMPLES = 20
# Relative errors are fitted, and nothing may overflow when divided by these.
_LEAST_SECONDS, _LEAST_JOULES = 1e-12, 1e-30
_MOST_SECONDS, _MOST_JOULES, _MOST_SIZE, _MOST_ITEM_BYTES = 3600.0, 1e6, 1e15, 16.0


@dataclasses.dataclass(frozen=True)
class Sample:
    """One operation with its seconds, and its joules where they were metered (else NaN).

    ``before_bytes`` is what the layer before it moved, which has taken the caches; ``group`` numbers the network it
    was timed in: samples of one network are alike, so they are never on both sides of a validation.
    """

    operation: Operation
    seconds: float
    joules: float = math.nan
    before_bytes: float = 0.0
    group: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class SampleTable:
    """Samples of one kind, column by column; ``sizes`` has shape (samples, columns of the kind)."""

    kind: Kind
    variants: NDArray[np.str_]
    sizes: Array
    item_bytes: Array
    before_bytes: Array
    seconds: Array
    joules: Array
    groups: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.seconds)

    @staticmethod
    def of(kind: str, samples: Sequence[Sample]) -> SampleTable:
        """Return the samples, all of one kind, as a table."""
        width = len(KINDS[kind].columns)
        return SampleTable(
            KINDS[kind],
            np.array([s.operation.variant for s in samples], dtype=np.str_),
            np.array([s.operation.sizes for s in samples], dtype=np.float64).reshape(len(samples), width),
            np.array([s.operation.item_bytes for s in samples], dtype=np.float64),
            np.array([s.before_bytes for s in samples], dtype=np.float64),
            np.array([s.seconds for s in samples], dtype=np.float64),
            np.array([s.joules for s in samples], dtype=np.float64),
            np.array([s.group for s in samples], dtype=np.int64),
        )

    def samples(self) -> list[Sample]:
        """Return the rows one by one."""
        sizes = self.sizes.astype(int).tolist()
        return [
            Sample(Operation(self.kind.name, variant, tuple(size), int(item)), second, joule, before, group)
            for variant, size, item, second, joule, before, group in zip(
                self.variants.tolist(),
                sizes,
                self.item_bytes.tolist(),
                self.seconds.tolist(),
                self.joules.tolist(),
                self.before_bytes.tolist(),
                self.groups.tolist(),
                strict=True,
            )
        ]

    def take(self, rows: Any) -> SampleTable:
        """Return the table of some rows."""
        return dataclasses.replace(self, **{name: getattr(self, name)[rows] for name in _ARRAYS})

    def to_json(self) -> dict[str, Any]:
        """Return the table as plain data; joules that were not metered are null."""
        return {
            "variants": self.variants.tolist(),
            **{name: self.sizes[:, i].astype(int).tolist() for i, name in enumerate(self.kind.columns)},
            "item_bytes": self.item_bytes.astype(int).tolist(),
            "before_bytes": self.before_bytes.astype(int).tolist(),
            "seconds": self.seconds.tolist(),
            "joules": None if np.isnan(self.joules).all() else [None if j != j else j for j in self.joules.tolist()],
            "network": self.groups.tolist(),
        }

    @staticmethod
    def from_json(kind: str, data: Mapping[str, Any]) -> SampleTable:
        """Return the table in ``data``. Raises KeyError, TypeError or ValueError for what is none."""
        known = KINDS[kind]
        seconds = np.asarray(data["seconds"], dtype=np.float64)
        columns = [np.asarray(data[name], dtype=np.float64) for name in known.columns]
        joules = data["joules"]
        table = SampleTable(
            known,
            np.asarray(data["variants"], dtype=np.str_),
            np.stack(columns, axis=1) if columns else np.zeros((len(seconds), 0)),
            np.asarray(data["item_bytes"], dtype=np.float64),
            np.asarray(data["before_bytes"], dtype=np.float64),
            seconds,
            np.full(len(seconds), np.nan) if joules is None else np.asarray(joules, dtype=np.float64),
            np.asarray(data["network"], dtype=np.int64),
        )
        if len({len(getattr(table, name)) for name in _ARRAYS}) != 1:
            raise ValueError(f"the columns of {kind} differ in length")
        for what, values, least, most in (
            ("seconds", seconds, _LEAST_SECONDS, _MOST_SECONDS),
            ("joules", table.joules[~np.isnan(table.joules)], _LEAST_JOULES, _MOST_JOULES),
            ("sizes", table.sizes, 1.0, _MOST_SIZE),
            ("item_bytes", table.item_bytes, 1.0, _MOST_ITEM_BYTES),
            ("before_bytes", table.before_bytes, 0.0, _MOST_SIZE),
        ):
            wrong = values[~((values >= least) & (values <= most))]
            if wrong.size:
                raise ValueError(f"{what} of {kind} cannot be {wrong[0]}")
        return table


_ARRAYS = tuple(field.name for field in dataclasses.fields(SampleTable) if field.name != "kind")


def tables(samples: Iterable[Sample]) -> dict[str, SampleTable]:
    """Return samples as one table a kind."""
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.operation.kind, []).append(sample)
    return {kind: SampleTable.of(kind, rows) for kind, rows in found.items() if kind in KINDS}


def read_csv(kind: str, path: str | Path) -> list[Sample]:
    """Read samples of one kind, measured elsewhere.

    The first line names the columns: those of the kind (``KINDS[kind].columns``; the ones that are mostly 1, such as
    groups and stride, may be left out), ``seconds`` or ``ms`` or ``us``, and optionally ``joules``, ``variant`` and
    ``item_bytes`` (4). Raises :class:`~torchsurgeon.errors.CalibrationError` naming file, line and column.
    """
    known = _kind_named(kind)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise CalibrationError(f"{path} is not a CSV file: {error}") from None
    if not rows:
        raise CalibrationError(f"{path} is empty; its first line must name columns: {_wanted(known)}")
    line, names = rows[0][0], [cell.strip() for cell in rows[0][1]]
    wrong = _wrong_columns(known, names)
    if wrong:
        raise CalibrationError(f"{path}:{line}: {wrong} for {known.name}; name {_wanted(known)}, separated by commas")
    found = [_sample(known, names, row, f"{path}:{line}") for line, row in rows[1:]]
    if len(found) < FEWEST_SAMPLES:
        raise CalibrationError(
            f"{path}: {len(found)} samples of {known.name} are too few to fit a model and know its error; "
            f"give at least {FEWEST_SAMPLES}"
        )
    return [dataclasses.replace(sample, group=group) for group, sample in enumerate(found)]


def _wrong_columns(kind: Kind, names: Sequence[str]) -> str:
    """What is wrong with the names of a file's columns; nothing where they are right."""
    missing = [name for name in kind.columns if name not in names and name not in kind.optional]
    if missing:
        return f"there is no column {', '.join(map(repr, missing))}"
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        return f"there is more than one column {', '.join(map(repr, twice))}"
    unknown = [name for name in names if name not in {*kind.columns, *_UNITS, *_EXTRA_COLUMNS}]
    if unknown:
        return f"there is no meaning of a column {', '.join(map(repr, unknown))}"
    units = [name for name in _UNITS if name in names]
    return "" if len(units) == 1 else "there is not one of the columns seconds, ms, us"


_UNITS = {"seconds": 1.0, "ms": 1e-3, "us": 1e-6}
_EXTRA_COLUMNS = ("variant", "joules", "item_bytes")
_SHORT = {
    "conv": "convolution",
    "fc": "linear",
    "pool": "pooling",
    "norm": "normalization",
    "depthwise": "depthwise convolution",
}


def _kind_named(kind: str) -> Kind:
    found = KINDS.get(_SHORT.get(kind, kind).replace("_", " "))
    if found is None or not found.columns:
        raise CalibrationError(f"there is no kind of layer {kind!r}; the kinds are {', '.join(KINDS)}")
    return found


def _wanted(kind: Kind) -> str:
    needed = [name for name in kind.columns if name not in kind.optional]
    optional = ", ".join([*kind.optional, *_EXTRA_COLUMNS])
    return f"{', '.join(needed)} and one of seconds, ms, us (optional: {optional})"


def _sample(kind: Kind, names: Sequence[str], cells: Sequence[str], where: str) -> Sample:
    if len(cells) != len(names):
        raise CalibrationError(f"{where}: {len(cells)} cells where the first line names {len(names)} columns")
    row = {name: cell.strip() for name, cell in zip(names, cells, strict=True)}

    def number(name: str, least: float, most: float, what: str) -> float:
        try:
            value = float(row[name])
        except ValueError:
            raise CalibrationError(f"{where}: {name} is {row[name]!r}, not a number; give {what}") from None
        if not least <= value <= most:
            raise CalibrationError(f"{where}: {name} of {row[name]} cannot be; give {what}")
        return value

    def whole(name: str, most: float) -> int:
        value = number(name, 1, most, "a whole number from 1 on")
        if value != int(value):
            raise CalibrationError(f"{where}: {name} of {row[name]} cannot be; give a whole number from 1 on")
        return int(value)

    sizes = tuple(whole(name, _MOST_SIZE) if name in row else 1 for name in kind.columns)
    unit = next(name for name in _UNITS if name in row)
    least, most = _LEAST_SECONDS / _UNITS[unit], _MOST_SECONDS / _UNITS[unit]
    seconds = _UNITS[unit] * number(unit, least, most, f"a positive time below an hour in {unit}")
    joules = math.nan
    if row.get("joules"):
        joules = number("joules", _LEAST_JOULES, _MOST_JOULES, "a positive energy in joules, or nothing")
    item = whole("item_bytes", _MOST_ITEM_BYTES) if row.get("item_bytes") else 4
    return Sample(Operation(kind.name, row.get("variant") or kind.usual, sizes, item), seconds, joules)
