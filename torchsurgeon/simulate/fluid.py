"""Where very many servers and devices settle: devices choose their cuts by the servers' load, which the cuts make.

With ten thousand servers and ten million devices single queries no longer matter, only their flows (the mean-field
limit). A server shares its time among the queries it has, so at utilization u it answers 1 / (1 - u) times as slowly,
whatever the shape of the service times (M/G/1 with processor sharing; Kleinrock 1976). That factor is the load that
plans are made for. Each device takes the way that is quickest for it at this load; the higher the load, the less work
they send. Work that is sent falls with the load and the load rises with the work, so there is one load at which the two
agree. Where devices of a class are indifferent between two ways there, some take the one and some the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from torchsurgeon.errors import SimulationError, is_finite, short
from torchsurgeon.link import Link
from torchsurgeon.planning import Frontier

Array = NDArray[np.float64]
Choice = Literal["adapting", "load-blind", "server-only", "device-only"]
"""How devices choose: by the load; as if servers were idle; all on the server; all on the device."""
_HIGHEST_LOAD = 1e9
_STEPS = 200


@dataclass(frozen=True, eq=False)
class DeviceClass:
    """Devices that are alike: the same model, speed and link.

    Attributes:
        name: the class's name.
        rate_per_s: inferences per second of all its devices together.
        latency_s: each way's seconds on device and link, shape (ways,). The first way is all on the server, the last
            one all on the device.
        server_s: each way's seconds on an idle server, shape (ways,).
        energy_j: each way's joules of the device with its radio, shape (ways,); None where they are unknown.
    """

    name: str
    rate_per_s: float
    latency_s: Array
    server_s: Array
    energy_j: Array | None = None

    def __post_init__(self) -> None:
        if not (is_finite(self.rate_per_s) and self.rate_per_s >= 0):
            raise SimulationError(
                f"the rate of the device class {short(self.name, 50)} must be zero or a positive number of inferences "
                f"per second; got {short(self.rate_per_s)}"
            )
        for array in (self.latency_s, self.server_s):
            if not (array.shape == self.latency_s.shape and len(array) and np.isfinite(array).all()):
                raise SimulationError(
                    f"the device class {short(self.name, 50)} must have a finite latency and server time for each way; "
                    f"got {short(list(array), 100)}"
                )

    @staticmethod
    def of(name: str, frontier: Frontier, link: Link, rate_per_s: float, slowdown: float = 1.0) -> DeviceClass:
        """Return the class of devices whose ways are those of a frontier.

        Args:
            name: the class's name.
            frontier: the cuts that can win, for this model, kind of device and kind of server.
            link: the devices' link.
            rate_per_s: inferences per second of all its devices together.
            slowdown: the factor by which the devices are slower than the frontier says.

        Raises:
            SimulationError: the rate is negative or not finite, the slowdown is not positive, or the frontier lacks one
                of its ends.
        """
        if not (is_finite(slowdown) and slowdown > 0):
            raise SimulationError(f"a slowdown must be a positive number; got {short(slowdown)}")
        crossing = [row for row in frontier.rows if not row.on_device]
        inside = [row for row in frontier.rows if row.on_device]
        whole = [row for row in crossing if row.index == 0]
        if not inside or not whole:
            raise SimulationError(
                f"the frontier of {frontier.model} must hold running all on the server and all on the device; "
                f"got {len(frontier.rows)} rows"
            )
        whole.sort(key=lambda row: link.uplink_s(row.size_bytes) + slowdown * row.encode_s)
        inside.sort(key=lambda row: -row.head_s)
        rows = [whole[0], *(row for row in crossing if row is not whole[0]), *inside]
        terms = [frontier.terms(row, link, 1.0, slowdown) for row in rows]
        server_s = np.array([each.tail_s + each.decode_s for each in terms])
        latency_s = np.array([each.latency_s for each in terms]) - server_s
        joules = [each.energy_j for each in terms]
        known = [joule for joule in joules if joule is not None]
        energy_j = np.array(known) if len(known) == len(joules) else None
        return DeviceClass(name, rate_per_s, latency_s, server_s, energy_j)

    def way(self, load: float, choice: Choice) -> int:
        """Return the way that devices of this class take.

        Args:
            load: the factor by which servers are slower than idle ones.
            choice: how devices choose.

        Raises:
            SimulationError: they do not choose in that way.
        """
        if choice not in get_args(Choice):
            raise SimulationError(
                f"how devices choose must be one of {', '.join(get_args(Choice))}; got {short(choice, 100)}"
            )
        if choice == "server-only":
            return 0
        if choice == "device-only":
            return len(self.latency_s) - 1
        seen = load if choice == "adapting" else 1.0
        return int((self.latency_s + seen * self.server_s).argmin())


@dataclass(frozen=True, eq=False)
class Settled:
    """Where servers and devices settle.

    Attributes:
        servers: how many servers there are.
        rate_per_s: inferences per second of all devices.
        utilization: the share of the servers' time that is asked for; 1 or more where they are overloaded.
        load: the factor by which servers are slower than idle ones; infinite where they are overloaded.
        shares: for each class, the share of its inferences that takes each way.
        latency_s: the mean seconds from call to answer over all inferences; infinite where servers are overloaded.
        device_j: the devices' mean joules per inference with their radios; None where they are unknown.
        reaching: the share of inferences that reach a server.
    """

    servers: float
    rate_per_s: float
    utilization: float
    load: float
    shares: tuple[Array, ...]
    latency_s: float
    device_j: float | None
    reaching: float


def settle(classes: Sequence[DeviceClass], servers: float, choice: Choice = "adapting") -> Settled:
    """Return where servers and devices settle.

    Args:
        classes: the devices.
        servers: how many servers there are; above 0.
        choice: how devices choose their cuts.

    Returns:
        The one load at which the work that devices send makes this load.

    Raises:
        SimulationError: there are no servers or no inferences, or devices do not choose in that way.
    """
    if not (is_finite(servers) and servers > 0):
        raise SimulationError(f"the number of servers must be positive; got {short(servers)}")
    if not sum(each.rate_per_s for each in classes) > 0:
        raise SimulationError("the device classes must make inferences; got a rate of 0 for all of them")
    if choice != "adapting":
        shares = _taken(classes, 1.0, choice)
        utilization = _work(classes, shares) / servers
        load = 1 / (1 - utilization) if utilization < 1 else math.inf
        return _settled(classes, servers, shares, load)
    low, high = 1.0, _HIGHEST_LOAD
    # Invariant: at `low` devices send at least the work that makes this load, at `high` less.
    for _ in range(_STEPS):
        middle = math.sqrt(low * high)
        if not low < middle < high:
            break
        if _work(classes, _taken(classes, middle)) / servers >= 1 - 1 / middle:
            low = middle
        else:
            high = middle
    more, fewer = _taken(classes, low), _taken(classes, high)
    most, least, wanted = _work(classes, more), _work(classes, fewer), servers * (1 - 1 / low)
    part = 1.0 if most <= least else min(max((wanted - least) / (most - least), 0.0), 1.0)
    shares = tuple(part * a + (1 - part) * b for a, b in zip(more, fewer, strict=True))
    return _settled(classes, servers, shares, low)


def servers_needed(classes: Sequence[DeviceClass], load: float, choice: Choice = "adapting") -> float:
    """Return how many servers keep the load at a level.

    Args:
        classes: the devices.
        load: the factor by which servers may be slower than idle ones; above 1.
        choice: how devices choose their cuts.

    Raises:
        SimulationError: the load is not above 1, or devices do not choose in that way.
    """
    if not (is_finite(load) and load > 1):
        raise SimulationError(f"the load must be above 1, since only idle servers have a load of 1; got {short(load)}")
    return _work(classes, _taken(classes, load, choice)) / (1 - 1 / load)


def _taken(classes: Sequence[DeviceClass], load: float, choice: Choice = "adapting") -> tuple[Array, ...]:
    """Return which way each class takes at a load, as shares of its inferences."""
    return tuple(np.eye(len(each.latency_s))[each.way(load, choice)] for each in classes)


def _work(classes: Sequence[DeviceClass], shares: Sequence[Array]) -> float:
    """Return the servers' seconds of computing that devices ask for in a second."""
    return sum(each.rate_per_s * float(part @ each.server_s) for each, part in zip(classes, shares, strict=True))


def _settled(classes: Sequence[DeviceClass], servers: float, shares: tuple[Array, ...], load: float) -> Settled:
    rate_per_s = sum(each.rate_per_s for each in classes)
    latency_s, energy_j, reaching = 0.0, 0.0, 0.0
    known = True
    for each, part in zip(classes, shares, strict=True):
        weight = each.rate_per_s / rate_per_s
        computed_s = float(part @ each.server_s)
        latency_s += weight * (float(part @ each.latency_s) + (load * computed_s if computed_s else 0.0))
        reaching += weight * float(part[each.server_s > 0].sum())
        known = known and each.energy_j is not None
        energy_j += 0.0 if each.energy_j is None else weight * float(part @ each.energy_j)
    utilization = _work(classes, shares) / servers
    return Settled(servers, rate_per_s, utilization, load, shares, latency_s, energy_j if known else None, reaching)
