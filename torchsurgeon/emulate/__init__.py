"""An emulated wireless link and an emulated slow device on one machine, for demos, tests and benchmarks."""

from __future__ import annotations

from torchsurgeon.emulate.device import SlowDevice
from torchsurgeon.emulate.proxy import LinkCounts, LinkEmulator
from torchsurgeon.link import parse_profile

__all__ = ["LinkCounts", "LinkEmulator", "SlowDevice", "parse_profile"]
