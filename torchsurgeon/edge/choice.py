"""Where a device without PyTorch cuts the model at one call, and how long it waits for the answer."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping

from torchsurgeon.adapting import (
    SURE,
    Decider,
    Decision,
    Estimates,
    Refusals,
    SlowdownEstimator,
    check_deadline,
    patience,
    rescue,
)
from torchsurgeon.codec.names import FITTED
from torchsurgeon.edge.bundle import Bundle, BundlePoint, OnnxPart
from torchsurgeon.edge.codec import ArrayCodec, find_codec, lossless
from torchsurgeon.edge.codecs import BundleCodecs
from torchsurgeon.edge.server import EdgeServer
from torchsurgeon.errors import BundleError, CodecError, MissingCodecWarning, is_finite, warn_caller
from torchsurgeon.link import Link
from torchsurgeon.planning.costs import Expected
from torchsurgeon.planning.objective import Objective
from torchsurgeon.planning.row import Row

# What a row costs that the server cannot decode. It is finite, since a decider compares differences.
_NEVER = 1e30


class Choices:
    """The rows of a bundle that one model chooses among, by the arithmetic by which a ``SplitModule`` chooses.

    Args:
        bundle: what the device has of the model.
        server: the server; None to run everything on the device.
        partition: as ``open()`` takes it, like all that follow.
        objective: what to minimize.
        codec: how to encode boundary arrays, in place of the rows' codecs; None for these.

    Raises:
        BundleError: the bundle has no row for the partition.
        PartitionError: it has no such point.
        CodecError: neither a device without PyTorch nor the bundle has such a codec.

    Attributes:
        rows: the rows.
        device: the row that runs everything on the device.
        fixed: the row of every call; None where each call chooses.
        slowdown: how much slower than predicted the device is.
        decider: chooses a row before a call.
    """

    def __init__(
        self,
        bundle: Bundle,
        server: EdgeServer | None,
        *,
        partition: int | str,
        objective: str | Mapping[str, float] | Objective,
        codec: str | None,
    ) -> None:
        self._bundle, self._server = bundle, server
        self._codecs = BundleCodecs(bundle)
        self._codec = None if codec is None else self._codecs.find(codec)
        self._warned_of: set[str] = set()
        self._objective = objective if objective == "latency" else Objective.of(objective)
        self._points = {(point.index, point.layers): point for point in bundle.points}
        self._refusals = Refusals()
        self.slowdown = SlowdownEstimator()
        device = next((row for row in bundle.costs.rows if row.on_device), None)
        if device is None:
            raise BundleError("the bundle's frontier has no row for the device alone; export it again")
        self.device = device
        self.fixed = self._fixed_row(partition)
        self.rows = [self.fixed] if self.fixed is not None else self._all_rows()
        for row in self.rows:
            self._wanted(row)
        place = {id(row): i for i, row in enumerate(bundle.costs.rows)}
        self._places = [place[id(row)] for row in self.rows]
        self.decider = Decider(self.rows, self._costs, losses=[row.budget_used for row in self.rows])

    def point_of(self, row: Row) -> BundlePoint:
        """Return where a row cuts the model."""
        return self._points[row.index, row.layers]

    def codec_of(self, row: Row) -> ArrayCodec:
        """Return how what crosses is encoded: as wanted, or by the next best codec where the server lacks that."""
        wanted, server = self._wanted(row), self._server
        if server is None or server.has(wanted):
            return wanted
        other = self._next_best(row)
        if wanted.name not in self._warned_of:
            self._warned_of.add(wanted.name)
            warn_caller(
                f"{server.url} does not have the codec {wanted.name}, so {other.name} is used in its place; start the "
                f"server with --codec {server.name}=FILE",
                MissingCodecWarning,
            )
        return other

    def head_of(self, row: Row, codec: ArrayCodec) -> tuple[OnnxPart | None, bool]:
        """Return what computes what crosses under a codec, and whether that is a student.

        Args:
            row: where the model is cut.
            codec: how what crosses is encoded.
        """
        point = self.point_of(row)
        student = self._codecs.student(codec, point)
        return (point.head, False) if student is None else (student, True)

    def heads_of(self, row: Row) -> tuple[OnnxPart | None, ...]:
        """Return all that may compute what crosses: a student, and the model's own layers if the server lacks it."""
        return self.point_of(row).head, self.head_of(row, self._wanted(row))[0]

    def _next_best(self, row: Row) -> ArrayCodec:
        """Return the codec of fewest bytes that was measured at a row's point and has no file, or a lossless one."""
        for one in sorted(self._rows_at(row), key=lambda one: one.size_bytes):
            if one.codec != "raw" and not one.codec.startswith(FITTED):
                # The package that it needs may be missing here.
                with contextlib.suppress(CodecError):
                    return find_codec(one.codec)
        return lossless()

    def _wanted(self, row: Row) -> ArrayCodec:
        return self._codec or self._codecs.find(row.codec)

    def _decodable(self, row: Row) -> bool:
        """Return whether the server decodes what a row sends, or another codec takes the place of the one asked for."""
        return self._codec is not None or self._server is None or self._server.has(self._wanted(row))

    def _rows_at(self, row: Row | BundlePoint) -> list[Row]:
        return [one for one in self._bundle.costs.rows if (one.index, one.layers) == (row.index, row.layers)]

    @property
    def on_device(self) -> bool:
        """Whether every call runs on the device as a whole."""
        return self._server is None or (self.fixed is not None and self.fixed.on_device)

    def choose(self, scale: float) -> tuple[Row, Decision[Row] | None]:
        """Return how to run a call with a server, and what that was chosen on; None where the cut is fixed.

        Args:
            scale: how many times as large as the traced example the call is.
        """
        if self.fixed is not None:
            return self.fixed, None
        assert self._server is not None
        state = self._server.state
        decision = self.decider.decide(
            Estimates(state.link.estimate(), state.load.estimate(), self.slowdown.estimate(), scale)
        )
        return decision.row, decision

    def whole_s(self, scale: float) -> float:
        """Return the seconds that the whole model takes on the device now, for a call of this scale."""
        return self.device.head_s * scale * self.slowdown.estimate().value

    def within(self, deadline_s: float, row: Row, scale: float, *, split: bool) -> Row:
        """Return the chosen row if its predicted latency keeps the deadline, or else the quickest.

        Args:
            deadline_s: seconds within which the answer is due.
            row: what was chosen without regard to the deadline.
            scale: how many times as large as the traced example the call is.
            split: whether the server may be asked.

        Raises:
            DeadlineError: every way of answering would miss the deadline with 99 % confidence.
        """
        slowdown = self.slowdown.estimate()
        ways: list[tuple[float, float, Row]] = []
        if self._bundle.whole is not None:
            ways.append((self.device.head_s * scale * slowdown.value, slowdown.error, self.device))
        if split and self._server is not None and not self.on_device:
            for one in self.rows:
                if not one.on_device and self._decodable(one):
                    after = self.expected(one, scale)
                    taken_s = one.head_s * scale * slowdown.value + after.remote_s
                    ways.append((taken_s, max(slowdown.error, after.spread), one))
        best_s, _, quickest = min(ways, key=lambda way: way[0])
        taken_s = next((way[0] for way in ways if way[2] is row), best_s)
        if is_finite(deadline_s) and any(deadline_s >= likely * math.exp(-SURE * error) for likely, error, _ in ways):
            self._refusals.end()
        elif not is_finite(deadline_s) or self._refusals.refuse(best_s):
            check_deadline(deadline_s, best_s, quickest.where)
        return row if taken_s <= deadline_s else quickest

    def expected(self, row: Row, scale: float) -> Expected:
        """Return how long the server's part of a row should take for a call of this scale."""
        assert self._server is not None
        state = self._server.state
        link, load, slowdown = state.link.estimate(), state.load.estimate(), self.slowdown.estimate().value
        return self._bundle.costs.expected(row, link, load, slowdown, max(scale, 1.0))

    def patience(self, row: Row, scale: float, due_s: float | None) -> tuple[float, str, Expected]:
        """Return how long to wait for an answer, what to say if none has come then, and what is expected."""
        assert self._server is not None
        expected, slowdown = self.expected(row, scale), self.slowdown.estimate()
        whole_s = self.whole_s(scale)
        wait_s = patience(expected.remote_s, expected.spread, expected.round_trip_s, stoppable=False, tail_s=whole_s)
        late = (
            f"late: {self._server.url} gave no answer within {wait_s * 1e3:.3g} ms, expected after "
            f"{expected.remote_s * 1e3:.3g} ms"
        )
        if due_s is None:
            return wait_s, late, expected
        plan = rescue(
            due_s - time.perf_counter(),
            remote_s=expected.remote_s,
            remote_spread=expected.spread,
            tail_s=whole_s,
            tail_spread=slowdown.spread,
        )
        if plan.start_s >= wait_s:
            return wait_s, late, expected
        why = "will probably be late" if plan.hedged else f"had not come {plan.start_s * 1e3:.3g} ms after the head"
        return plan.start_s, f"deadline: the answer of {self._server.url} {why}", expected

    def _costs(self, link: Link, load: float, slowdown: float, *, scale: float) -> list[float]:
        costs = self._bundle.costs.costs(link, load, slowdown, self._objective, scale)
        return [
            float(costs[place]) if row.on_device or self._decodable(row) else _NEVER
            for place, row in zip(self._places, self.rows, strict=True)
        ]

    def _fixed_row(self, partition: int | str) -> Row | None:
        """Return the row of a fixed partition; None where each call chooses."""
        if partition == "auto":
            return None
        if partition == "device":
            return self.device
        point = self._bundle.point(partition)
        rows = self._rows_at(point)
        if not rows:
            raise BundleError(f"the bundle's frontier says nothing of the point {point.name}; export it again")
        name = "raw" if self._codec is None else self._codec.name
        # At another rate of the same codec, the same head runs.
        return min(rows, key=lambda row: (row.codec != name, row.codec.partition("@")[0] != name.partition("@")[0]))

    def _all_rows(self) -> list[Row]:
        rows = [
            row
            for row in self._bundle.costs.rows
            if (self._bundle.whole is not None if row.on_device else (row.index, row.layers) in self._points)
        ]
        if not rows:
            raise BundleError("the bundle's frontier has no row for its points; export it again")
        return rows
