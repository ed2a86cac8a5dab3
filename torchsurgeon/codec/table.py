"""The table of what codecs cost and change at a model's partition points, and its JSON format."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchsurgeon import _json_file
from torchsurgeon._json_file import AMOUNT, FLAG, NUMBER, OBJECT, OBJECTS, TEXT, TEXTS, WHOLE, WHOLES
from torchsurgeon.accuracy.finding import Finding
from torchsurgeon.errors import CodecError, is_finite, short
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import PartitionPoint

FORMAT = "torchsurgeon.codecs/3"
_FIELDS = {
    "point": WHOLE, "name": TEXT, "raw_bytes": AMOUNT, "cost": OBJECT, "boundary": OBJECT.or_null(),
    "findings": OBJECTS, "untested": TEXT, "layers": WHOLES.or_null(),
}  # fmt: skip
_COSTS = {
    "codec": TEXT, "size_bytes": AMOUNT, "encode_s": AMOUNT, "decode_s": AMOUNT, "lossless": FLAG,
    "within_budget": FLAG, "head_share": AMOUNT.or_null(),
}  # fmt: skip
_DIFFERENCES = {"max_abs": AMOUNT, "rmse": AMOUNT, "cosine": NUMBER}
_TABLES = {
    "model": TEXT, "fingerprint": TEXT, "budget": TEXT, "batch": WHOLE, "samples": WHOLE, "rows": OBJECTS,
    "provenance": OBJECT, "unfinished": TEXTS,
}  # fmt: skip
"""What the fields of a table in a file, of its rows and of their parts must hold."""


@dataclasses.dataclass(frozen=True)
class CodecCost:
    """What one codec costs at one partition point, for one inference of the measured samples' batch size.

    Attributes:
        codec: the codec's name.
        size_bytes: bytes that cross, as the mean over the samples.
        encode_s: median seconds of encoding.
        decode_s: median seconds of decoding.
        lossless: whether the tail gets the same bits that the head computed.
        within_budget: true for every lossless codec, and for a lossy one where an accuracy budget was given and met.
        head_share: seconds of the codec's student, which runs in place of the layers before the point, over those of
            the whole model on the same machine; None for a codec without one.

    Raises:
        CodecError: a number is negative or not finite, or a flag is not a bool.
    """

    codec: str
    size_bytes: float
    encode_s: float
    decode_s: float
    lossless: bool
    within_budget: bool
    head_share: float | None = None

    def __post_init__(self) -> None:
        for field in ("size_bytes", "encode_s", "decode_s", "head_share"):
            value = getattr(self, field)
            if field == "head_share" and value is None:
                continue
            if not (is_finite(value) and value >= 0):
                raise CodecError(
                    f"{field} of codec {short(self.codec)} must be finite and not negative; got {short(value, 100)}"
                )
        if not (type(self.lossless) is bool and type(self.within_budget) is bool):
            raise CodecError(
                f"lossless and within_budget of codec {short(self.codec, 100)} must be true or false; got "
                f"{short(self.lossless, 100)} and {short(self.within_budget, 100)}"
            )


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far decoded boundary tensors are from the encoded ones, over all samples.

    Attributes:
        max_abs: the largest absolute difference.
        rmse: the root of the mean squared difference.
        cosine: the lowest cosine similarity of any sample.
    """

    max_abs: float
    rmse: float
    cosine: float


@dataclasses.dataclass(frozen=True)
class CodecRow:
    """One codec at one partition point: its cost, and what it changes in the boundary tensors and the model's output.

    Attributes:
        point: index of the partition point.
        name: name of the partition point.
        raw_bytes: the boundary's size without a codec.
        cost: what the codec costs.
        boundary: how it changes the boundary tensors; None for a lossless codec.
        findings: what became of the model's answers, one finding for each limit of the budget; empty for a lossless
            codec, without a budget, and where the codec was not tested.
        untested: why the codec was not tested with the budget; empty where it was, and where there was nothing to test.
        layers: the device's layers where the cut goes across branches; None where they are the first ``point``.
    """

    point: int
    name: str
    raw_bytes: float
    cost: CodecCost
    boundary: Difference | None = None
    findings: tuple[Finding, ...] = ()
    untested: str = ""
    layers: tuple[int, ...] | None = None

    def finding(self, measure: str) -> Finding | None:
        """Return the finding of this measure; None where the budget does not limit it, or the codec was not tested."""
        return next((finding for finding in self.findings if finding.measure == measure), None)

    @property
    def ratio(self) -> float:
        """How many times smaller the encoded boundary is than the plain tensors."""
        return self.raw_bytes / self.cost.size_bytes if self.cost.size_bytes else 1.0


@dataclasses.dataclass(frozen=True)
class CodecTable:
    """Codecs measured at the partition points of one model, on a user's own samples.

    Attributes:
        model: name of the model's class.
        fingerprint: the traced graph's fingerprint.
        batch: batch size of the samples.
        samples: how many calls judged. Sizes and times are of at most 32 of them.
        budget: the accuracy budget in words; empty without one.
        rows: one row for each codec and point. Points that were not measured have no rows.
        provenance: where and how it was measured.
        unfinished: names of the points that were still to be measured when the measurement was interrupted.
    """

    model: str
    fingerprint: str
    batch: int
    samples: int
    budget: str
    rows: tuple[CodecRow, ...]
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    unfinished: tuple[str, ...] = ()

    def at(self, point: int | PartitionPoint) -> tuple[CodecRow, ...]:
        """Return the rows of a partition point, or of the one with this index; empty where none were measured."""
        place = (point, None) if isinstance(point, int) else point.place
        return tuple(row for row in self.rows if (row.point, row.layers) == place)

    def costs(self, point: int | PartitionPoint) -> tuple[CodecCost, ...]:
        """Return what each codec costs at a partition point, or at the one with this index."""
        return tuple(row.cost for row in self.at(point))

    def allowed(self, point: int | PartitionPoint, codec: str) -> bool:
        """Return whether a codec may be used at a point: it is lossless, or was measured within the budget.

        Args:
            point: the partition point or its index.
            codec: the codec's name.

        Raises:
            CodecError: the codec was not measured at this point.
        """
        for row in self.at(point):
            if row.cost.codec == codec:
                return row.cost.within_budget
        known = ", ".join(row.cost.codec for row in self.at(point)) or "none"
        where = point if isinstance(point, int) else short(point.name, 100)
        raise CodecError(
            f"codec {short(codec)} was not measured at point {where}; measured are: {known}. Measure the codecs again"
        )

    def check(self, graph: LayerGraph) -> None:
        """Check that this is a table of ``graph``, with its batch size.

        Raises:
            CodecError: it is one of another graph or batch size.
        """
        if self.fingerprint != graph.fingerprint:
            raise CodecError(
                f"these codecs were measured on {self.model[:100]} (fingerprint {self.fingerprint[:12]}), not on "
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
        """Return the table that ``to_json()`` made ``data`` of.

        Raises:
            CodecError: ``data`` is no such table, or one of another version of the format.
        """
        _json_file.check_format(data, FORMAT, CodecError, "a codec table", "measure the codecs again")
        try:
            _json_file.check_fields(data, _TABLES)
            known = {name: data[name] for name in _TABLES}
            return CodecTable(
                **{**known, "rows": tuple(map(_row, data["rows"])), "unfinished": tuple(data["unfinished"])}
            )
        except CodecError:
            raise
        except KeyError as error:
            raise CodecError(
                f"the codec table has no field {short(error)}; it was cut short or edited; measure the codecs again"
            ) from None
        except (AttributeError, OverflowError, TypeError, ValueError) as error:
            raise CodecError(f"the codec table holds a wrong value: {short(error)}; measure the codecs again") from None

    def save(self, path: str | Path) -> None:
        """Write the table to ``path`` as JSON.

        Raises:
            CodecError: the file is not writable.
        """
        _json_file.write(path, self.to_json(), CodecError)

    @staticmethod
    def load(path: str | Path) -> CodecTable:
        """Return the table in the file ``path``.

        Raises:
            CodecError: the file is not readable, or holds no such table; the message names the file.
        """
        return _json_file.load(path, CodecTable.from_json, CodecError, "measure the codecs again")


def _row(data: Mapping[str, Any]) -> CodecRow:
    _json_file.check_fields(data, _FIELDS)
    cost, boundary, layers = data["cost"], data["boundary"], data["layers"]
    _json_file.check_fields(cost, _COSTS)
    if boundary is not None:
        _json_file.check_fields(boundary, _DIFFERENCES)
    return CodecRow(
        **{
            **data,
            "cost": CodecCost(**cost),
            "boundary": None if boundary is None else Difference(**boundary),
            "findings": tuple(map(Finding.from_json, data["findings"])),
            "layers": None if layers is None else tuple(layers),
        }
    )
