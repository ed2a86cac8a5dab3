"""How sure a plan is: the interval of its latency, and what is known badly of the times that it rests on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from torchsurgeon.planning.costs import Terms
from torchsurgeon.profiling import LayerProfile
from torchsurgeon.tracing.graph import LayerGraph


def used_profiles(
    terms: Terms, devices: Sequence[LayerProfile], servers: Sequence[LayerProfile]
) -> tuple[LayerProfile, LayerProfile]:
    """Return the profiles of the backends that run head and tail; the first one's where nothing runs."""
    row = terms.row
    return (
        next((profile for profile in devices if profile.backend == row.backend), devices[0]),
        next((profile for profile in servers if profile.backend == row.server_backend), servers[0]),
    )


def interval_of(
    terms: Terms, device: LayerProfile, server: LayerProfile, load: float, slowdown: float
) -> tuple[float, float] | None:
    """Return the interval of the latency that follows from those of head and tail; None without intervals."""
    on_device = np.zeros(len(device.layers), dtype=bool)
    on_device[list(terms.row.layers) if terms.row.layers is not None else slice(terms.row.index)] = True
    head, tail = device.interval_of(on_device), server.interval_of(~on_device)
    if terms.row.student:
        head = (terms.row.head_s, terms.row.head_s)
    if head is None or tail is None:
        return None
    if terms.row.on_device:
        return slowdown * head[0], slowdown * head[1]
    others_s = terms.latency_s - terms.head_s - terms.tail_s
    return others_s + slowdown * head[0] + load * tail[0], others_s + slowdown * head[1] + load * tail[1]


def warnings_of(graph: LayerGraph, terms: Terms, device: LayerProfile, server: LayerProfile) -> tuple[str, ...]:
    """Return a sentence for device and server where layers that would run there are predicted badly."""
    chosen = terms.row.layers if terms.row.layers is not None else range(terms.row.index)
    head = {graph.layers[index].name for index in chosen}
    sentences = [
        f"the {where}'s seconds by {profile.backend} are interpolated between those at {len(profile.parts.points)} "
        f"points, which had been foreseen to {profile.parts.error:.0%} in the median"
        for where, profile in (("device", device), ("server", server))
        if profile.parts is not None
    ]
    for where, warned in (
        ("device", {name: why for name, why in device.warned.items() if name in head and not terms.row.student}),
        ("server", {name: why for name, why in server.warned.items() if name not in head}),
    ):
        if warned:
            first, why = next(iter(warned.items()))
            count = f"{len(warned)} layers" if len(warned) > 1 else "a layer"
            sentences.append(f"on the {where} the time of {count} may be off by a factor: {first} ({why})")
    return tuple(sentences)
