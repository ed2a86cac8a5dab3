"""A device on which every part of a model takes just what a profile says, whatever else this machine does meanwhile.

``SlowDevice`` multiplies what a call took, and with it every disturbance of a shared machine. This one waits until the
profile's time is over; the machine has to be several times quicker than that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

import torchsurgeon as ts
from torchsurgeon.cutting.partition import Head
from torchsurgeon.cutting.segment import Segment

SPIN_S = 3e-4


class PacedDevice:
    """A device with ``profile`` for the parts of ``graph``; ``wrap`` is a backend for SplitModule."""

    def __init__(self, graph: ts.LayerGraph, profile: ts.LayerProfile) -> None:
        self._profile = profile
        self._layers = {step: layer for layer, step in enumerate(graph.flow.layers)}

    def wrap(self, module: nn.Module) -> Callable[..., Any]:
        takes_s = self.takes_s(module)

        def call(*args: Any, **kwargs: Any) -> Any:
            end_s = time.perf_counter() + takes_s
            result = module(*args, **kwargs)
            time.sleep(max(0.0, end_s - SPIN_S - time.perf_counter()))
            while time.perf_counter() < end_s:
                pass
            return result

        return call

    def takes_s(self, part: nn.Module) -> float:
        """Seconds of the model, or of a head, middle or tail of it."""
        segment = part.segment if isinstance(part, Head) else part
        if not isinstance(segment, Segment):
            return self._profile.total_s
        layers = sorted(self._layers[step] for step in segment.steps if step in self._layers)
        head_s = self._profile.head_s
        if layers == list(range(len(layers))):
            return float(head_s[len(layers)])
        if layers == list(range(layers[0], len(self._layers))):
            return float(head_s[-1] - head_s[layers[0]])
        return float(self._profile.layer_s[layers].sum())


def paced(model: nn.Module, x: torch.Tensor, total_s: float) -> tuple[ts.LayerGraph, ts.LayerProfile, PacedDevice]:
    """A device on which ``model`` takes ``total_s``, its profile, and the graph that both are of."""
    graph = ts.trace(model, x)
    measured = ts.profile(graph, inputs=[x], repeats=20, meter=None)
    profile = measured.scaled(total_s / measured.total_s)
    return graph, profile, PacedDevice(graph, profile)


def warm(split: ts.SplitModule, x: torch.Tensor, rows: Iterable[ts.Row]) -> None:
    """Connect, shake hands, and have both sides cut whatever of ``rows`` may be chosen later."""
    for row in rows:
        split.partition = row.point(split.graph)
        split(x)
    split.partition = "auto"
    split(x)
