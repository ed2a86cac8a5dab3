"""One way to run a model, what it costs, and which of many can be the best; arithmetic without PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from torchsurgeon._json_file import AMOUNT, FLAG, NUMBER, OBJECTS, TEXT, WHOLE, WHOLES, check_fields
from torchsurgeon._place import place_text
from torchsurgeon.accuracy.finding import Finding

Array = NDArray[np.float64]
_FIELDS = {
    "index": WHOLE, "name": TEXT, "codec": TEXT, "head_s": AMOUNT, "encode_s": AMOUNT, "size_bytes": AMOUNT,
    "tail_s": AMOUNT, "decode_s": AMOUNT, "device_j": NUMBER.or_null(), "memory_bytes": AMOUNT.or_null(),
    "raw_input": FLAG, "lossless": FLAG, "on_device": FLAG, "layers": WHOLES.or_null(), "findings": OBJECTS,
    "student": FLAG, "backend": TEXT, "server_backend": TEXT,
}  # fmt: skip
"""What the fields of a row in a file must hold."""

_Point = TypeVar("_Point", covariant=True)


class _Graph(Protocol[_Point]):
    """A ``LayerGraph``, as far as a row needs it."""

    def point(self, ref: int) -> _Point: ...

    def point_of(self, layers: Collection[int]) -> _Point: ...


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to run a model: where it is cut and how what crosses is encoded, with its cost at load and slowdown 1.

    Attributes:
        index: the partition point's index.
        name: the partition point's name.
        codec: how the boundary tensors are encoded.
        head_s: the device's seconds for the head.
        encode_s: the device's seconds for encoding.
        size_bytes: what crosses the uplink.
        tail_s: the server's seconds for the tail.
        decode_s: the server's seconds for decoding.
        device_j: the device's joules for head and encoding; None where no meter measured them.
        memory_bytes: the most that the head's weights (buffers and other tensors of its modules included) and the
            tensors that it computes take; None where it was not measured.
        raw_input: whether an input of the model crosses, or a view of one.
        lossless: whether the codec keeps every bit.
        on_device: whether everything runs on the device, and nothing crosses.
        layers: the device's layers where these are not simply the first ``index``; None where they are.
        findings: what a sample showed of the model's answers behind the codec; empty where that was not measured.
        student: whether the codec's student computes the boundary tensors in place of the model's first layers.
        backend: what runs the head.
        server_backend: what runs the tail.
    """

    index: int
    name: str
    codec: str
    head_s: float
    encode_s: float
    size_bytes: float
    tail_s: float
    decode_s: float
    device_j: float | None = None
    memory_bytes: int | None = None
    raw_input: bool = False
    lossless: bool = True
    on_device: bool = False
    layers: tuple[int, ...] | None = None
    findings: tuple[Finding, ...] = ()
    student: bool = False
    backend: str = "eager"
    server_backend: str = "eager"

    @property
    def where(self) -> str:
        """Where it cuts, in words: ``all on the server``, ``cut after features.5`` or ``all on the device``."""
        return place_text(self.index, self.name, on_device=self.on_device)

    @property
    def budget_used(self) -> float:
        """How much of the accuracy budget is used: 0 where nothing is lost, 1 at its limit or where it is not known."""
        if self.lossless:
            return 0.0
        used = [finding.used for finding in self.findings]
        return max((1.0 if one is None else one for one in used), default=1.0)

    def point(self, graph: _Graph[_Point]) -> _Point:
        """Return where to cut ``graph``, for ``cut()``."""
        return graph.point(self.index) if self.layers is None else graph.point_of(self.layers)

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain data."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Row:
        """Return the row in ``data``.

        Raises:
            ValueError: a field holds what it cannot, such as a negative number of seconds.
            KeyError: a field is missing.
            TypeError: there is a field too many.
        """
        check_fields(data, _FIELDS)
        layers = None if data["layers"] is None else tuple(data["layers"])
        return Row(**{**data, "layers": layers, "findings": tuple(map(Finding.from_json, data["findings"]))})


def columns(rows: Iterable[Row]) -> Array:
    """Return the rows as numbers, shape (rows, 5).

    The columns are device seconds, bytes sent, server seconds, joules (0 where unknown), and 1 where anything crosses.
    """
    table = [
        (r.head_s + r.encode_s, r.size_bytes, r.tail_s + r.decode_s, r.device_j or 0.0, 0.0 if r.on_device else 1.0)
        for r in rows
    ]
    return np.array(table, dtype=np.float64).reshape(-1, 5)


def columns_and_losses(rows: Iterable[Row]) -> Array:
    """Return ``columns()``, and how much of the accuracy budget each row uses, shape (rows, 6)."""
    known = list(rows)
    return np.column_stack([columns(known), [row.budget_used for row in known]])


def non_dominated(costs: Array) -> list[int]:
    """Return the indices of the rows of ``costs`` that no other row undercuts, in order.

    One row undercuts another if it is at most as large in every column. Of equal rows the first is kept.

    Args:
        costs: shape (rows, columns).
    """
    if not len(costs):
        return []
    order = np.lexsort(costs.T[::-1])
    # Sorted by the first column, a row can be undercut only by one before it, so the first need not be compared.
    rest = [column for column in costs.T[1:] if np.ptp(column) > 0]
    kept = [np.empty_like(column) for column in rest]
    indices: list[int] = []
    for i in order:
        count = len(indices)
        below = np.ones(count, dtype=bool)
        for column, known in zip(rest, kept, strict=True):
            below &= known[:count] <= column[i]
        if not below.any():
            for column, known in zip(rest, kept, strict=True):
                known[count] = column[i]
            indices.append(int(i))
    return sorted(indices)
