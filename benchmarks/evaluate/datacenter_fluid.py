"""Past the paper: 10,000 servers and 10 million devices that react to the servers' load, with cost and energy."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from torchsurgeon.link import PRESETS
from torchsurgeon.planning import Frontier
from torchsurgeon.simulate import Choice, DeviceClass, Prices, Settled, servers_needed, settle

SERVERS, DEVICES = 10_000, 10e6
RIVALS: dict[str, Choice] = {
    "status quo": "server-only",
    "device-only": "device-only",
    "ours, blind to load": "load-blind",
    "ours": "adapting",
}
RATES_PER_DEVICE_S = tuple(float(f"{rate:.4g}") for rate in np.geomspace(0.01, 10, 46))
TABLE_RATES_PER_DEVICE_S = (0.1, 0.3)
LOAD = 2.0
"""The load that servers are bought for: half of their time is idle, and they answer twice as slowly as idle ones."""
INPUTS: dict[str, tuple[float, str]] = {
    "server_usd": (
        8000.0,
        "assumption: an accelerator of the K40's class with its share of a host, network and building",
    ),
    "lifetime_s": (4 * 365 * 24 * 3600.0, "assumption: replaced after four years"),
    "idle_w": (85.0, "assumption: 20 W of an idle K40 and 65 W of its share of a host"),
    "busy_w": (300.0, "assumption: the K40's 235 W of its data sheet and 65 W of its share of a host"),
    "overhead": (1.2, "assumption: a modern datacenter's power usage effectiveness"),
    "usd_per_kwh": (0.10, "assumption: electricity for industry"),
}
"""Prices and powers by name, each with where it comes from."""
LINK_SHARES = {"wifi": 1 / 3, "lte": 1 / 3, "3g": 1 / 3}
GPU_SHARE = 0.3
ASSUMED = (
    "a third of the devices each on Wi-Fi, LTE and 3G, with answers, round trips and radio tails; "
    "30 % of the devices with a GPU; eight applications in equal shares; "
    "each server shares its time among its queries"
)


def fluid(frontiers: dict[str, dict[str, Frontier]]) -> dict[str, Any]:
    """Return where the rivals settle at each rate, and what they cost.

    Args:
        frontiers: each application on each kind of device.
    """
    prices = Prices(**{name: value for name, (value, _) in INPUTS.items()})
    curves: dict[str, list[dict[str, Any]]] = {rival: [] for rival in RIVALS}
    for rate in RATES_PER_DEVICE_S:
        classes = fleet(frontiers, rate * DEVICES)
        for rival, choice in RIVALS.items():
            curves[rival].append({"rate_per_device_s": rate, **described(settle(classes, SERVERS, choice))})
    table = {}
    for rival, choice in RIVALS.items():
        here = {}
        for rate in TABLE_RATES_PER_DEVICE_S:
            here[f"{rate:g}"] = described(settle(fleet(frontiers, rate * DEVICES), SERVERS, choice))
        classes = fleet(frontiers, TABLE_RATES_PER_DEVICE_S[0] * DEVICES)
        # Rounded up; where nothing is sent, one server stands idle.
        bought = max(math.ceil(servers_needed(classes, LOAD, choice)), 1)
        settled = settle(classes, bought, choice)
        cost = prices.per_million(settled)
        table[rival] = {
            "here": here,
            "servers_for_load": bought,
            "with_them": described(settled),
            "per_million": dataclasses.asdict(cost) | {"usd": cost.usd},
        }
    return {
        "servers": SERVERS,
        "devices": DEVICES,
        "assumed": ASSUMED,
        "inputs": {name: {"value": value, "source": source} for name, (value, source) in INPUTS.items()},
        "rates_per_device_s": TABLE_RATES_PER_DEVICE_S,
        "load": LOAD,
        "table": table,
        "curves": curves,
    }


def fleet(frontiers: dict[str, dict[str, Frontier]], rate_per_s: float) -> list[DeviceClass]:
    """Return the classes of devices: one for each link, kind of device and application.

    Args:
        frontiers: each application on each kind of device.
        rate_per_s: inferences per second of all devices.
    """
    return [
        DeviceClass.of(
            f"{name}, {kind}, {link}",
            kinds[kind],
            PRESETS[link],
            rate_per_s * link_share * kind_share / len(frontiers),
        )
        for link, link_share in LINK_SHARES.items()
        for kind, kind_share in (("cpu", 1 - GPU_SHARE), ("gpu", GPU_SHARE))
        for name, kinds in frontiers.items()
    ]


def described(settled: Settled) -> dict[str, Any]:
    """Return where servers and devices settle as plain data; None stands for infinite."""
    names = ("utilization", "load", "latency_s", "device_j", "reaching")
    values = {name: getattr(settled, name) for name in names}
    return {name: None if value is None or math.isinf(value) else value for name, value in values.items()}
