"""Objectives, which a plan minimizes, and constraints, which it keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from torchsurgeon.errors import PlanError, is_finite, is_whole, short
from torchsurgeon.planning.row import Row

_EXAMPLE = '{"latency": 1, "energy": 0.5}'
_UNITS = {"latency": "s", "energy": "J", "throughput": "s", "server_time": "s"}


@dataclasses.dataclass(frozen=True)
class Objective:
    """A weighted sum of what an inference costs; the planner minimizes it.

    Attributes:
        latency: weight of the seconds from call to answer.
        energy: weight of the device's joules for head, encoding and radio.
        throughput: weight of the seconds between the answers of a stream of inferences. These are the seconds of its
            slowest stage: device, uplink, server or downlink.
        server_time: weight of the server's seconds of computing, at a load of 1.
        in_flight: how many inferences of such a stream are under way at most. No more than so many answers come in the
            time from call to answer, however quick each stage is (Little's law). None for as many as the stages take.

    Raises:
        PlanError: a weight is negative or not finite, all are zero, or ``in_flight`` is not a positive whole number.
    """

    latency: float = 0.0
    energy: float = 0.0
    throughput: float = 0.0
    server_time: float = 0.0
    in_flight: int | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        weights = self._weights()
        for name, weight in weights.items():
            if not (is_finite(weight) and weight >= 0):
                raise PlanError(f"the weight of {name} must be zero or a positive number; got {short(weight)}")
        if not any(weights.values()):
            raise PlanError(f"an objective needs at least one weight above zero: {', '.join(_UNITS)}")
        if self.in_flight is None:
            return
        if type(self.in_flight) is not int or self.in_flight < 1:
            raise PlanError(
                "in_flight is how many inferences of a stream are under way at most, 1 or more; got "
                f"{short(self.in_flight)}"
            )
        if not self.throughput:
            raise PlanError(
                "in_flight says how large the throughput can be; it needs a weight of throughput above zero"
            )

    def _weights(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in _UNITS}

    @staticmethod
    def of(wanted: str | Mapping[str, float] | Objective) -> Objective:
        """Return an objective from its name, from weights by name, or as it is.

        Args:
            wanted: ``"latency"``, ``"energy"``, ``"throughput"``, ``"server_time"``, a mapping of these to weights, or
                an objective.

        Raises:
            PlanError: a name is not one of these.
        """
        if isinstance(wanted, Objective):
            return wanted
        if isinstance(wanted, str) and wanted in _NAMED:
            return _NAMED[wanted]
        if not isinstance(wanted, (str, Mapping)):
            raise PlanError(
                f"an objective must be one of {', '.join(_UNITS)}, or a dict of weights by these names such as "
                f"{_EXAMPLE}; got {short(wanted)}"
            )
        weights = {wanted: 1.0} if isinstance(wanted, str) else dict(wanted)
        unknown = [name for name in weights if name not in _UNITS]
        if unknown:
            raise PlanError(
                f"an objective must be one of {', '.join(_UNITS)}, or a dict of weights by these names such as "
                f"{_EXAMPLE}; {'got' if isinstance(wanted, str) else 'the dict has'} {short(unknown[0])}"
            )
        return _weighted(weights)

    @staticmethod
    def battery(level: Callable[[], float], *, s_per_j: float = 1.0) -> Battery:
        """Return the objective that saves time while the battery is full and energy when it is low.

        Args:
            level: returns the battery's charge, from 0 (empty) to 1 (full); called about once a second.
            s_per_j: how many seconds of latency a joule is worth while both count.
        """
        return Battery(level, s_per_j)

    def __str__(self) -> str:
        used = {name: weight for name, weight in self._weights().items() if weight}
        said = next(iter(used)) if len(used) == 1 else " + ".join(f"{weight:g}·{name}" for name, weight in used.items())
        return said if self.in_flight is None else f"{said} with {self.in_flight} in flight"

    @property
    def unit(self) -> str:
        """The unit of the sum; empty where it adds different quantities."""
        units = {_UNITS[name] for name, weight in self._weights().items() if weight}
        alone = [weight for weight in self._weights().values() if weight]
        return units.pop() if len(units) == 1 and alone == [1.0] else ""


@dataclasses.dataclass(frozen=True)
class Battery:
    """An objective that follows a battery's charge; made by ``Objective.battery()``.

    Above a charge of 80 % only latency counts, below 20 % only energy, and in between both in proportion.
    """

    level: Callable[[], float]
    s_per_j: float = 1.0

    def __post_init__(self) -> None:
        if not callable(self.level):
            raise PlanError(
                f"level must be a function that returns the battery's charge from 0 to 1; got {short(self.level)}"
            )
        if not (is_finite(self.s_per_j) and self.s_per_j > 0):
            raise PlanError(f"s_per_j must be a positive number of seconds; got {short(self.s_per_j)}")

    def now(self) -> Objective:
        """Return the objective at the present charge.

        Raises:
            PlanError: the charge is not within 0 to 1.
        """
        level = self.level()
        if not 0 <= level <= 1:
            raise PlanError(f"the battery's level must be from 0 (empty) to 1 (full); got {level}")
        share = min(max((level - _LOW) / (_FULL - _LOW), 0.0), 1.0)
        return Objective(latency=share, energy=(1 - share) * self.s_per_j)


_LOW, _FULL = 0.2, 0.8


def _weighted(weights: Mapping[str, float]) -> Objective:
    return Objective(*(weights.get(name, 0.0) for name in _UNITS))


_NAMED = {name: _weighted({name: 1.0}) for name in _UNITS}


@dataclasses.dataclass(frozen=True)
class Constraints:
    """What a plan must keep to; the defaults ask for nothing.

    Attributes:
        latency_s: the most seconds from call to answer.
        energy_j: the most joules of the device for one inference.
        memory_bytes: the most bytes for the head on the device: weights, buffers, other tensors of its modules, and the
            tensors that it computes. What several layers share counts once.
        min_layers: how many layers must run on the device.
        raw_input: False if no input of the model may leave the device, nor a view of one.
        server_allowed: False if nothing may leave the device.

    Raises:
        PlanError: a limit is negative or not finite, ``min_layers`` is no whole number, or a flag is no bool.
    """

    latency_s: float | None = None
    energy_j: float | None = None
    memory_bytes: int | None = None
    min_layers: int = 0
    raw_input: bool = True
    server_allowed: bool = True

    def __post_init__(self) -> None:
        for name in ("latency_s", "energy_j", "memory_bytes"):
            value = getattr(self, name)
            if value is not None and not (is_finite(value) and value >= 0):
                raise PlanError(f"the constraint {name} must be zero or a positive number; got {short(value)}")
        if not is_whole(self.min_layers) or self.min_layers < 0:
            raise PlanError(
                f"the constraint min_layers must be a whole number from 0 on; got {short(self.min_layers)}; leave it "
                "out where any number of layers may run on the device"
            )
        for name in ("raw_input", "server_allowed"):
            value = getattr(self, name)
            # A text such as "no" counts as true, so it would allow what it is to forbid.
            if not isinstance(value, bool):
                raise PlanError(f"the constraint {name} must be True or False; got {short(value)}")

    def given(self) -> list[str]:
        """Return the names of the constraints that ask for something."""
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]

    def without(self, name: str) -> Constraints:
        """Return the constraints except the one called ``name``."""
        given = {field: getattr(self, field) for field in self.given() if field != name}
        return Constraints(**given)

    def keeps(self, row: Row) -> bool:
        """Return whether a row keeps the constraints that depend on neither link nor load."""
        if self.memory_bytes is not None and (row.memory_bytes is None or row.memory_bytes > self.memory_bytes):
            return False
        return (
            row.index >= self.min_layers
            and (self.raw_input or not row.raw_input)
            and (self.server_allowed or row.on_device)
        )

    def __str__(self) -> str:
        said = {
            "latency_s": f"at most {self.latency_s} s",
            "energy_j": f"at most {self.energy_j} J",
            "memory_bytes": f"at most {(self.memory_bytes or 0) / 1e6:g} MB",
            "min_layers": f"at least {self.min_layers} layers on the device",
            "raw_input": "no input leaves the device",
            "server_allowed": "nothing leaves the device",
        }
        return ", ".join(said[name] for name in self.given()) or "none"


NO_LIMITS = Constraints()
