"""What each way to run a model costs under any link and load; arithmetic without PyTorch and SciPy.

A device without PyTorch chooses among the same rows, by the same arithmetic, as a ``Frontier`` does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from torchsurgeon import _json_file
from torchsurgeon._cached import cached_property
from torchsurgeon._json_file import AMOUNT, FLAG, OBJECTS, TEXT, WHOLE
from torchsurgeon.adapting.link import LinkEstimate
from torchsurgeon.adapting.load import LoadEstimate
from torchsurgeon.errors import PlanError, short
from torchsurgeon.link import Link
from torchsurgeon.planning.objective import Objective
from torchsurgeon.planning.row import Array, Row, columns

if TYPE_CHECKING:
    from typing_extensions import Self

FORMAT = "torchsurgeon.frontier/3"
_FIELDS = {
    "model": TEXT, "fingerprint": TEXT, "batch": WHOLE, "layers": WHOLE, "answer_bytes": AMOUNT, "exact": FLAG,
    "rows": OBJECTS,
}  # fmt: skip
"""What the fields of a frontier in a file must hold."""


@dataclasses.dataclass(frozen=True)
class Terms:
    """What one inference costs when it is run as ``row`` says, under one link and load, term by term.

    Every term except ``head_s`` is 0 when everything runs on the device.

    Attributes:
        row: where the model is cut, and how what crosses is encoded.
        head_s: seconds of the head on the device.
        encode_s: seconds of encoding on the device.
        uplink_s: seconds of sending, with half the round trip.
        tail_s: seconds of the tail on the server.
        decode_s: seconds of decoding on the server.
        downlink_s: seconds of receiving the answer, with half the round trip.
        interval_s: seconds between the answers of a stream of inferences, where enough of these are under way.
        device_j: the device's joules for head and encoding; None where they are unknown.
        radio_j: the joules of its radio; None where they are unknown.
    """

    row: Row
    head_s: float
    encode_s: float
    uplink_s: float
    tail_s: float
    decode_s: float
    downlink_s: float
    interval_s: float
    device_j: float | None
    radio_j: float | None

    @property
    def latency_s(self) -> float:
        """Seconds from call to answer."""
        return self.head_s + self.encode_s + self.uplink_s + self.decode_s + self.tail_s + self.downlink_s

    @property
    def energy_j(self) -> float | None:
        """The device's joules, including its radio's; None where either is unknown."""
        return None if self.device_j is None or self.radio_j is None else self.device_j + self.radio_j


class Expected(NamedTuple):
    """How long the server's part should take.

    Attributes:
        remote_s: seconds from the end of the head to the answer.
        spread: their relative deviation.
        round_trip_s: one round trip of the link and the wait in the server's queue, which are part of them.
    """

    remote_s: float
    spread: float
    round_trip_s: float


@dataclasses.dataclass(frozen=True, eq=False)
class CostTable:
    """Rows to choose from, and what they cost.

    Attributes:
        model: the model's class name.
        fingerprint: the graph's fingerprint.
        batch: the batch size that the costs are for.
        layers: how many layers the model has.
        answer_bytes: what crosses the downlink when anything crosses.
        rows: the rows.
        exact: whether no cut across parallel branches is missing that could win with its tensors sent as they are:
            under the objective of a plan, or else under any.
    """

    model: str
    fingerprint: str
    batch: int
    layers: int
    answer_bytes: int
    rows: tuple[Row, ...]
    exact: bool = True

    def __post_init__(self) -> None:
        if not self.rows:
            raise PlanError("a frontier without rows leaves nothing to choose from")
        # Computed now, so that the first decision is as quick as all others.
        assert len(self._columns)

    @cached_property
    def _columns(self) -> Array:
        return np.asfortranarray(columns(self.rows))

    @cached_property
    def has_energy(self) -> bool:
        """Whether the joules of all rows are known."""
        return all(row.device_j is not None for row in self.rows)

    def costs(
        self,
        link: Link,
        load: float = 1.0,
        slowdown: float = 1.0,
        objective: str | Mapping[str, float] | Objective = "latency",
        scale: float = 1.0,
    ) -> Array:
        """Return what each row costs, shape (rows,), in the objective's unit.

        Args:
            link: the link between device and server.
            load: the factor by which the server is slower than its profile says.
            slowdown: the factor by which the device is slower than its profile says.
            objective: what to minimize, as ``Objective.of()`` takes it.
            scale: how many times as large as the traced example the call is. Its seconds of computing, joules and bytes
                are taken to grow alike; the round trip and the radio's tail do not grow.

        Raises:
            PlanError: load, slowdown or scale is not positive, the objective is unknown, or it counts energy and no
                joules are known.
        """
        return self._costs(self._columns, link, load, slowdown, objective, scale)

    def _costs(
        self,
        table: Array,
        link: Link,
        load: float,
        slowdown: float,
        objective: str | Mapping[str, float] | Objective,
        scale: float,
    ) -> Array:
        # A call of twice the size takes as long as the example does with machines and a link of half the speed. The
        # radio's power remains that at the link's own rate.
        device, bits, server = slowdown * scale, 8.0 * scale, load * scale
        if not (scale > 0.0 and server > 0.0 and device > 0.0 and server + device < math.inf):
            given = {"load": load, "slowdown": slowdown, "scale": scale}
            what = next((name for name, value in given.items() if not 0.0 < value < math.inf), "scale")
            raise PlanError(f"{what} must be a positive number; got {given[what]}")
        up_s_per_byte, downlink_s = bits / link.uplink_bit_s, self.answer_bytes * bits / link.downlink_bit_s
        latency = (device, up_s_per_byte, server, 0.0, link.round_trip_s + downlink_s)
        if objective == "latency":
            # Latency has a short way, since it is asked for before every inference.
            return table.dot(latency)  # type: ignore[no-any-return]
        wanted = Objective.of(objective)
        weights = [wanted.latency * seconds for seconds in latency]
        if wanted.energy:
            for place, joules in enumerate(self._joules(link, scale)):
                weights[place] += wanted.energy * joules
        if wanted.server_time:
            weights[2] += wanted.server_time * scale
        if not wanted.throughput:
            return table.dot(np.array(weights))  # type: ignore[no-any-return]
        device_s, size_bytes, server_s, _, crosses = table.T
        slowest: Array = device_s * device
        for stage_s in (size_bytes * up_s_per_byte, server_s * server, crosses * downlink_s):
            np.maximum(slowest, stage_s, out=slowest)
        if wanted.in_flight is not None:
            np.maximum(slowest, table.dot(np.array(latency)) / wanted.in_flight, out=slowest)
        if wanted.throughput != 1.0:
            slowest *= wanted.throughput
        sums = wanted.latency or wanted.energy or wanted.server_time
        return slowest + table.dot(np.array(weights)) if sums else slowest

    def _joules(self, link: Link, scale: float) -> tuple[float, float, float, float, float]:
        """Return the joules of a call for each unit of the columns."""
        if not self.has_energy:
            raise PlanError(
                f"the energy of {self.model} on the device is unknown: its profile has no joules for some layers; "
                "profile it where a meter exists (docs/profiling.md), or choose another objective"
            )
        answer_bytes = self.answer_bytes * scale
        fixed_j = link.request_j(0, answer_bytes)
        return 0.0, (link.request_j(1, answer_bytes) - fixed_j) * scale, 0.0, scale, fixed_j

    def expected(
        self, row: Row, link: LinkEstimate, load: LoadEstimate, slowdown: float, scale: float = 1.0
    ) -> Expected:
        """Return how long the server's part of a row should take.

        Args:
            row: the row.
            link: rates and round trip.
            load: how busy the server is.
            slowdown: the factor by which the device is slower than its profile says.
            scale: how many times as large as the traced example the call is. The round trip and the wait in the
                server's queue do not grow with it.
        """
        round_trip_s = link.round_trip.value + load.queue_s
        up_s = row.size_bytes * scale * 8 / link.uplink.value
        tail_s = (row.tail_s + row.decode_s) * scale * load.compute.value
        down_s = self.answer_bytes * scale * 8 / link.downlink.value
        remote_s = up_s + tail_s + down_s + row.encode_s * scale * slowdown + round_trip_s
        spread = math.hypot(
            up_s * link.uplink.spread,
            tail_s * load.compute.spread,
            down_s * link.downlink.spread,
            link.round_trip.value * link.round_trip.spread,
            load.queue_spread_s,
        )
        return Expected(remote_s, spread / remote_s if remote_s > 0 else 0.0, round_trip_s)

    def terms(self, row: Row, link: Link, load: float = 1.0, slowdown: float = 1.0) -> Terms:
        """Return what ``row`` costs under a link, a load and a slowdown, term by term."""
        up_s, down_s = link.uplink_s(row.size_bytes), link.downlink_s(self.answer_bytes)
        half_s = link.round_trip_s / 2
        device_s, server_s = slowdown * (row.head_s + row.encode_s), load * (row.tail_s + row.decode_s)
        if row.on_device:
            return Terms(row, device_s, 0.0, 0.0, 0.0, 0.0, 0.0, device_s, row.device_j, 0.0)
        return Terms(
            row,
            head_s=slowdown * row.head_s,
            encode_s=slowdown * row.encode_s,
            uplink_s=half_s + up_s,
            tail_s=load * row.tail_s,
            decode_s=load * row.decode_s,
            downlink_s=half_s + down_s,
            interval_s=max(device_s, up_s, server_s, down_s),
            device_j=row.device_j,
            radio_j=None if link.radio is None else link.request_j(row.size_bytes, self.answer_bytes),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the frontier as plain data, with its format's version; ``docs/planning.md`` says what to compute."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "rows"}
        return {"format": FORMAT, **fields, "rows": [row.to_json() for row in self.rows]}

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Return the frontier in ``data``.

        Raises:
            PlanError: it is of another version, cut short or edited; the message names what is wrong.
        """
        _json_file.check_format(data, FORMAT, PlanError, "a frontier", "build the frontier again")
        try:
            fields = {f.name: data[f.name] for f in dataclasses.fields(cls) if f.name != "rows"}
            _json_file.check_fields(data, _FIELDS)
            return cls(**fields, rows=tuple(Row.from_json(row) for row in data["rows"]))
        except PlanError:
            raise
        except KeyError as error:
            raise PlanError(
                f"the frontier has no field {short(error)}; it was cut short or edited: build it again"
            ) from None
        except (AttributeError, OverflowError, TypeError, ValueError) as error:
            raise PlanError(f"the frontier holds a wrong value: {short(error)}; build it again") from None

    def save(self, path: str | Path) -> None:
        """Write the frontier to ``path`` as JSON.

        Raises:
            PlanError: the file cannot be written.
        """
        _json_file.write(path, self.to_json(), PlanError)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a frontier from a file.

        Raises:
            PlanError: the file is not a frontier; the message says what is wrong with it.
        """
        return _json_file.load(path, cls.from_json, PlanError, "build it again")
