"""Where to cut networks of today, from times measured on this machine.

Each network is profiled here on one thread. This is the server; the device is emulated: everything takes ten times as
long there. The planner then chooses a cut for latency over the links of the paper, with their round trips, when tensors
are sent as they are. Pictures cross as bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

import torchsurgeon as ts
from benchmarks import zoo
from torchsurgeon.link import PRESETS

SLOWER = 10.0
"""How many times as long the emulated device takes."""
LINKS = ("3g", "lte", "wifi")
QUICK = ("EfficientNet-Lite0", "MobileNetV3")


def run(
    names: Iterable[str] = tuple(zoo.TODAY), *, repeats: int = 5, told: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """Return by network what it costs here, and where it is cut over each link.

    Args:
        names: the networks, by their names in ``zoo.TODAY``.
        repeats: how often each network is run for its profile.
        told: takes what has been done, a line for each network.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {}
    try:
        for name in names:
            found[name] = network(name, repeats)
            told(f"{name}: profiled here and planned over {len(LINKS)} links")
    finally:
        torch.set_num_threads(threads)
    return found


def network(name: str, repeats: int) -> dict[str, Any]:
    """Return what one network costs here, and where it is cut over each link."""
    model, example = zoo.make(name)
    graph = ts.trace(model, example)
    server = ts.profile(graph, repeats=repeats, meter=None)
    device = server.scaled(SLOWER)
    row: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": len(graph.layers),
        "input_bytes": graph.points[0].size_bytes,
        "answer_bytes": sum(spec.size_bytes for spec in graph.outputs),
        "measured_s": server.total_s,
        "links": {},
    }
    for link in LINKS:
        plan = ts.plan(graph, device=device, server=server, link=PRESETS[link])
        assert plan.server_only is not None
        at = plan.terms.row
        cut = "device" if at.on_device else "server" if at.index == 0 and at.layers is None else at.name
        row["links"][link] = {
            "cut": cut,
            "size_bytes": at.size_bytes,
            "latency_s": plan.value,
            "server_only_s": plan.server_only.latency_s,
            "device_only_s": plan.device_only.latency_s,
        }
    return row
