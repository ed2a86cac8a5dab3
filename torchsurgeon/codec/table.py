"""What codecs cost and give at a model's partition points, as a value, and its JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchsurgeon import _json_file
from torchsurgeon.errors import CodecError
from torchsurgeon.tracing.graph import LayerGraph

FORMAT = "torchsurgeon.codecs/1"


@dataclasses.dataclass(frozen=True)
class CodecCost:
    """What one codec costs at one partition point, for one inference of the measured samples' batch size.

    ``size_bytes`` is the mean over the samples of what crosses; ``encode_s`` and ``decode_s`` are medians. ``lossless``
    says that the tail gets the head's own bits. ``within_budget`` is true for every lossless codec, and for a lossy one
    only where an accuracy budget was given and kept.
    """

    codec: str
    size_bytes: float
    encode_s: float
    decode_s: float
    lossless: bool
    within_budget: bool

    def __post_init__(self) -> None:
        for field in ("size_bytes", "encode_s", "decode_s"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value >= 0):
                raise CodecError(f"{field} of codec {self.codec!r} is {value}; it must be finite and not negative")
        if not (type(self.lossless) is bool and type(self.within_budget) is bool):
            raise CodecError(f"lossless and within_budget of codec {self.codec!r} must be true or false")


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far decoded boundary tensors are from what was encoded, over all samples.

    ``max_abs`` is the largest absolute difference, ``rmse`` the root of the mean squared one, and ``cosine`` the
    smallest cosine similarity of any sample.
    """

    max_abs: float
    rmse: float
    cosine: float


@dataclasses.dataclass(frozen=True)
class CodecRow:
    """One codec at one partition point: its cost, and what it does to the boundary and to the model's output.

    ``raw_bytes`` is the boundary's size without a codec. ``boundary`` is None for a lossless codec. ``top1_change`` is
    the share of predictions that differ, ``output_cosine`` the smallest cosine similarity of any sample's output, and
    ``accepted`` the share of samples that the budget's own function accepted; each is None where it was not asked for.
    """

    point: int
    name: str
    raw_bytes: float
    cost: CodecCost
    boundary: Difference | None = None
    top1_change: float | None = None
    output_cosine: float | None = None
    accepted: float | None = None

    @property
    def ratio(self) -> float:
        """How many times smaller than the plain tensors."""
        return self.raw_bytes / self.cost.size_bytes if self.cost.size_bytes else 1.0


@dataclasses.dataclass(frozen=True)
class CodecTable:
    """Codecs measured at the partition points of one model, on a user's own sample.

    ``samples`` is how many calls were measured, ``budget`` what a lossy codec had to keep to, in words (empty without
    one). Points that were not measured have no rows.
    """

    model: str
    fingerprint: str
    batch: int
    samples: int
    budget: str
    rows: tuple[CodecRow, ...]
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def at(self, point: int) -> tuple[CodecRow, ...]:
        """Return the rows of the partition point with this index; empty where none were measured."""
        return tuple(row for row in self.rows if row.point == point)

    def costs(self, point: int) -> tuple[CodecCost, ...]:
        """Return what each codec costs at the partition point with this index; empty where none were measured."""
        return tuple(row.cost for row in self.at(point))

    def allowed(self, point: int, codec: str) -> bool:
        """Return whether ``codec`` may be used at a point: it is lossless, or was measured within the budget.

        Raises :class:`~torchsurgeon.wire.CodecError` when it was not measured there.
        """
        for row in self.at(point):
            if row.cost.codec == codec:
                return row.cost.within_budget
        known = ", ".join(row.cost.codec for row in self.at(point)) or "none"
        raise CodecError(f"codec {codec!r} was not measured at point {point}; measured there: {known}")

    def check(self, graph: LayerGraph) -> None:
        """Raise :class:`~torchsurgeon.wire.CodecError` when this is not a table of ``graph`` and its batch size."""
        if self.fingerprint != graph.fingerprint:
            raise CodecError(
                f"these codecs were measured on {self.model} (fingerprint {self.fingerprint[:12]}), not on "
                f"{type(graph.model).__name__} ({graph.fingerprint[:12]}); measure them on that model"
            )
        if self.batch != graph.batch:
            raise CodecError(
                f"these codecs were measured on batches of {self.batch}, the graph is of batches of {graph.batch}; "
                "measure them on that graph"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the table as plain data, with its format's version."""
        fields = dataclasses.asdict(dataclasses.replace(self, provenance=dict(self.provenance)))
        return {"format": FORMAT, **fields}

    @staticmethod
    def from_json(data: Any) -> CodecTable:
        """Return the table in ``data``. Raises :class:`~torchsurgeon.wire.CodecError` naming what is wrong."""
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        if found != FORMAT:
            raise CodecError(f"not a codec table of this version: format is {found!r}, not {FORMAT!r}; measure again")
        try:
            rows = tuple(_row(row) for row in data["rows"])
            model, fingerprint, budget = (str(data[key]) for key in ("model", "fingerprint", "budget"))
            batch, samples = (int(data[key]) for key in ("batch", "samples"))
            return CodecTable(model, fingerprint, batch, samples, budget, rows, dict(data["provenance"]))
        except CodecError:
            raise
        except KeyError as error:
            raise CodecError(f"the codec table has no field {error}; it was cut short or edited") from None
        except (AttributeError, OverflowError, TypeError, ValueError) as error:
            raise CodecError(f"the codec table holds a value that is none: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the table to ``path`` as JSON. Raises :class:`~torchsurgeon.wire.CodecError` where it cannot be."""
        _json_file.write(path, self.to_json(), CodecError)

    @staticmethod
    def load(path: str | Path) -> CodecTable:
        """Read a table. Raises :class:`~torchsurgeon.wire.CodecError` naming the file and what is wrong with it."""
        return _json_file.load(path, CodecTable.from_json, CodecError, "measure the codecs again")


def _row(data: Mapping[str, Any]) -> CodecRow:
    boundary = data["boundary"]
    return CodecRow(
        **{
            **data,
            "point": int(data["point"]),
            "cost": CodecCost(**{**data["cost"], "codec": str(data["cost"]["codec"])}),
            "boundary": None if boundary is None else Difference(**boundary),
        }
    )
