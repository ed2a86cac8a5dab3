"""Tables of timed operations, from a calibration or from CSV files of measurements made with other tools."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchsurgeon.errors import CalibrationError, short
from torchsurgeon.prediction.kinds import KINDS, Array, Kind, Operation

FEWEST_SAMPLES = 20
# Relative errors are fitted, so values are divided by these, and nothing may overflow.
_LEAST_SECONDS, _LEAST_JOULES = 1e-12, 1e-30
_MOST_SECONDS, _MOST_JOULES, _MOST_SIZE, _MOST_ITEM_BYTES = 3600.0, 1e6, 1e15, 16.0


@dataclasses.dataclass(frozen=True)
class Sample:
    """One timed operation.

    Attributes:
        operation: what was timed.
        seconds: how long it took.
        joules: its energy; NaN where nothing was metered.
        before_bytes: bytes that the layer before it read and wrote, which fill the caches.
        group: the number of the network in which it was timed. Samples of one network are alike, so a validation
            never has some of them among those fitted on and others among those predicted.
        network_bytes: bytes that all layers of its network read and write; 0 where that is unknown. Weights are still
            in the caches from the call before, if this is little.
    """

    operation: Operation
    seconds: float
    joules: float = math.nan
    before_bytes: float = 0.0
    group: int = 0
    network_bytes: float = 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class SampleTable:
    """Samples of one kind, column by column.

    Attributes:
        kind: the kind.
        variants: what of the kind each sample is.
        sizes: the columns that describe each, shape (samples, columns of the kind).
        item_bytes: bytes of one element.
        before_bytes: bytes that the layer before it read and wrote.
        seconds: how long each took.
        joules: the energy of each; NaN where nothing was metered.
        groups: the number of the network in which each was timed.
        network_bytes: bytes that all layers of its network read and write; 0 where that is unknown.
    """

    kind: Kind
    variants: NDArray[np.str_]
    sizes: Array
    item_bytes: Array
    before_bytes: Array
    seconds: Array
    joules: Array
    groups: NDArray[np.int64]
    network_bytes: Array

    def __len__(self) -> int:
        return len(self.seconds)

    @staticmethod
    def of(kind: str, samples: Sequence[Sample]) -> SampleTable:
        """Return a table of samples.

        Args:
            kind: the kind that all of them have.
            samples: the samples.
        """
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
            np.array([s.network_bytes for s in samples], dtype=np.float64),
        )

    def samples(self) -> list[Sample]:
        """Return the rows as samples."""
        sizes = self.sizes.astype(int).tolist()
        return [
            Sample(Operation(self.kind.name, variant, tuple(size), int(item)), second, joule, before, group, network)
            for variant, size, item, second, joule, before, group, network in zip(
                self.variants.tolist(),
                sizes,
                self.item_bytes.tolist(),
                self.seconds.tolist(),
                self.joules.tolist(),
                self.before_bytes.tolist(),
                self.groups.tolist(),
                self.network_bytes.tolist(),
                strict=True,
            )
        ]

    def take(self, rows: Any) -> SampleTable:
        """Return a table of some rows.

        Args:
            rows: their indices, or a mask of shape (samples,).
        """
        return dataclasses.replace(self, **{name: getattr(self, name)[rows] for name in _ARRAYS})

    def to_json(self) -> dict[str, Any]:
        """Return the table as plain data; joules that were not metered are null, unknown bytes of networks left out."""
        return {
            "variants": self.variants.tolist(),
            **{name: self.sizes[:, i].astype(int).tolist() for i, name in enumerate(self.kind.columns)},
            "item_bytes": self.item_bytes.astype(int).tolist(),
            "before_bytes": self.before_bytes.astype(int).tolist(),
            "seconds": self.seconds.tolist(),
            "joules": None if np.isnan(self.joules).all() else [None if j != j else j for j in self.joules.tolist()],
            "network": self.groups.tolist(),
            **({"network_bytes": self.network_bytes.astype(int).tolist()} if self.network_bytes.any() else {}),
        }

    @staticmethod
    def from_json(kind: str, data: Mapping[str, Any]) -> SampleTable:
        """Return the table in plain data.

        Args:
            kind: the kind that all samples have.
            data: what ``to_json()`` returned.

        Raises:
            KeyError: the kind is unknown, or a column is missing.
            TypeError: a column is of another type.
            ValueError: columns differ in length, or a value is out of range.
        """
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
            # CSV files and calibrations of earlier versions do not say it.
            np.asarray(data.get("network_bytes", np.zeros(len(seconds))), dtype=np.float64),
        )
        if len({len(getattr(table, name)) for name in _ARRAYS}) != 1:
            raise ValueError(f"the columns of {kind} differ in length")
        for what, values, least, most in (
            ("seconds", seconds, _LEAST_SECONDS, _MOST_SECONDS),
            ("joules", table.joules[~np.isnan(table.joules)], _LEAST_JOULES, _MOST_JOULES),
            ("sizes", table.sizes, 1.0, _MOST_SIZE),
            ("item_bytes", table.item_bytes, 1.0, _MOST_ITEM_BYTES),
            ("before_bytes", table.before_bytes, 0.0, _MOST_SIZE),
            ("network_bytes", table.network_bytes, 0.0, _MOST_SIZE),
        ):
            wrong = values[~((values >= least) & (values <= most))]
            if wrong.size:
                raise ValueError(f"{what} of {kind} must be from {least:g} to {most:g}; got {wrong[0]}")
        return table


_ARRAYS = tuple(field.name for field in dataclasses.fields(SampleTable) if field.name != "kind")


def tables(samples: Iterable[Sample]) -> dict[str, SampleTable]:
    """Return samples as one table a kind, by the name of the kind; samples of unknown kinds are left out."""
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.operation.kind, []).append(sample)
    return {kind: SampleTable.of(kind, rows) for kind, rows in found.items() if kind in KINDS}


def read_csv(kind: str, path: str | Path) -> list[Sample]:
    """Read samples of one kind from a CSV file, such as measurements made with another tool.

    The first line names the columns: those of the kind (``KINDS[kind].columns``), one of ``seconds``, ``ms`` and
    ``us``, and optionally ``joules``, ``variant`` and ``item_bytes`` (4 unless given). Columns of the kind that are
    mostly 1, such as groups and stride, may be left out.

    Args:
        kind: the kind, by its name or a short form of it ("conv", "fc").
        path: the file.

    Raises:
        CalibrationError: the file cannot be read or holds no samples; the message names file, line and column.
    """
    known = _kind_named(kind)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise CalibrationError(f"{path} is not a CSV file: {short(error)}") from None
    if not rows:
        raise CalibrationError(f"{path} is empty; its first line must name columns: {_wanted(known)}")
    line, names = rows[0][0], [cell.strip() for cell in rows[0][1]]
    wrong = _wrong_columns(known, names)
    if wrong:
        raise CalibrationError(f"{path}:{line}: {wrong} for {known.name}; name {_wanted(known)}, separated by commas")
    found = [_sample(known, names, row, f"{path}:{line}") for line, row in rows[1:]]
    if len(found) < FEWEST_SAMPLES:
        raise CalibrationError(
            f"{path}: a model of {known.name} and its error need at least {FEWEST_SAMPLES} samples; the file holds "
            f"{len(found)} samples"
        )
    # Two rows of the same operation are alike, so a validation has both among those fitted on or both among the others.
    groups: dict[Operation, int] = {}
    return [dataclasses.replace(sample, group=groups.setdefault(sample.operation, len(groups))) for sample in found]


def _wrong_columns(kind: Kind, names: Sequence[str]) -> str:
    """Return what is wrong with the names of a file's columns; an empty text where they are right."""
    missing = [name for name in kind.columns if name not in names and name not in kind.optional]
    if missing:
        return f"there is no column {', '.join(map(repr, missing))}"
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        return f"there is more than one column {short(', '.join(map(repr, twice)))[1:-1]}"
    unknown = [name for name in names if name not in {*kind.columns, *_UNITS, *_EXTRA_COLUMNS}]
    if unknown:
        return f"there is an unknown column {short(', '.join(map(repr, unknown)))[1:-1]}"
    units = [name for name in _UNITS if name in names]
    return "" if len(units) == 1 else "there must be exactly one of the columns seconds, ms, us"


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
    """Return the kind of this name or short form."""
    found = KINDS.get(_SHORT.get(kind, kind).replace("_", " "))
    if found is None or not found.columns:
        raise CalibrationError(f"there is no kind of layer {short(kind)}; the kinds are {', '.join(KINDS)}")
    return found


def _wanted(kind: Kind) -> str:
    """Return which columns a file of this kind needs and may have, as a message lists them."""
    needed = [name for name in kind.columns if name not in kind.optional]
    optional = ", ".join([*kind.optional, *_EXTRA_COLUMNS])
    return f"{', '.join(needed)} and one of seconds, ms, us (optional: {optional})"


def _sample(kind: Kind, names: Sequence[str], cells: Sequence[str], where: str) -> Sample:
    """Return the sample in one line of a file; ``where`` is file and line, as a message names them."""
    if len(cells) != len(names):
        raise CalibrationError(
            f"{where}: a line must have {len(names)} cells, as many as the first line names columns; got {len(cells)}"
        )
    row = {name: cell.strip() for name, cell in zip(names, cells, strict=True)}

    def number(name: str, least: float, most: float, what: str) -> float:
        try:
            value = float(row[name])
        except ValueError:
            raise CalibrationError(f"{where}: {name} must be {what}; got {short(row[name], 100)}") from None
        if not least <= value <= most:
            raise CalibrationError(f"{where}: {name} must be {what}; got {short(row[name], 100)}")
        return value

    def whole(name: str, most: float) -> int:
        value = number(name, 1, most, "a whole number from 1 on")
        if value != int(value):
            raise CalibrationError(f"{where}: {name} must be a whole number from 1 on; got {short(row[name], 100)}")
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
