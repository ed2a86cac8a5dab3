"""What a million inferences cost in money and energy, from prices and powers that the reader gives."""

from __future__ import annotations

import dataclasses

from torchsurgeon.errors import SimulationError, is_finite, short
from torchsurgeon.simulate.fluid import Settled

_HOUR_S = 3600.0
_J_PER_KWH = 3.6e6


@dataclasses.dataclass(frozen=True)
class Prices:
    """Prices and powers of a datacenter. None has a default, since each one is an assumption that its user must state.

    Attributes:
        server_usd: the price of a server.
        lifetime_s: the seconds after which it is replaced.
        idle_w: the power of a server that computes nothing.
        busy_w: the power of a server that computes all the time; in between, power is proportional to utilization.
        overhead: the datacenter's power divided by that of its servers (PUE), from 1 on.
        usd_per_kwh: the price of electricity.

    Raises:
        SimulationError: a value is negative or not finite, or outside what its line says.
    """

    server_usd: float
    lifetime_s: float
    idle_w: float
    busy_w: float
    overhead: float
    usd_per_kwh: float

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not (is_finite(value) and value >= 0):
                raise SimulationError(f"{name} must be zero or a positive number; got {short(value)}")
        if self.lifetime_s == 0:
            raise SimulationError("lifetime_s must be above 0 s; got 0")
        if self.overhead < 1:
            raise SimulationError(f"overhead must be at least 1, the servers' own power; got {self.overhead}")
        if self.busy_w < self.idle_w:
            raise SimulationError(f"busy_w must be at least idle_w; got {self.busy_w} and {self.idle_w}")

    def per_million(self, settled: Settled) -> PerMillion:
        """Return what a million inferences cost where servers and devices have settled.

        Args:
            settled: where they settled.

        Raises:
            SimulationError: the servers are overloaded, so that inferences are never all answered.
        """
        if settled.utilization >= 1:
            raise SimulationError(
                "the servers must have a utilization below 1 to answer every inference; "
                f"got {settled.utilization:.3g}; give more servers or a lower rate"
            )
        seconds = 1e6 / settled.rate_per_s
        power_w = self.idle_w + (self.busy_w - self.idle_w) * settled.utilization
        server_kwh = settled.servers * power_w * self.overhead * seconds / _J_PER_KWH
        machines_usd = settled.servers * self.server_usd * seconds / self.lifetime_s
        device_kwh = None if settled.device_j is None else 1e6 * settled.device_j / _J_PER_KWH
        return PerMillion(machines_usd, server_kwh * self.usd_per_kwh, server_kwh, device_kwh)


@dataclasses.dataclass(frozen=True)
class PerMillion:
    """What a million inferences cost.

    Attributes:
        machines_usd: the servers' price, spread over their lifetime.
        electricity_usd: the electricity of the datacenter.
        server_kwh: its energy.
        device_kwh: the energy of the devices with their radios; None where it is unknown.
    """

    machines_usd: float
    electricity_usd: float
    server_kwh: float
    device_kwh: float | None

    @property
    def usd(self) -> float:
        """The operator's cost: servers and their electricity."""
        return self.machines_usd + self.electricity_usd
