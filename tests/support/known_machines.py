"""A device and a server of known speed, and links between them, so that it is known which cut is the best.

``device``       a backend that takes ``LAYER_S`` for each layer; the fixture ``known`` has the profiles that go with it
``FAST, SLOW``   a link over which everything belongs on the server, and one over which it belongs on the device

The device is so slow that the whole model takes it longer than a request takes a server and a link on a machine whose
processors others use as well; what is left to chance then is how soon the cut follows, and not where it goes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from classifier import GRAPH, LAYERS, Net
from torch import nn

import torchsurgeon as ts
from torchsurgeon.cutting.partition import Head

LAYER_S = 0.03
FAST, SLOW = ts.Link("fast", 1e9, 1e9, 1e-3), ts.Link("slow", 1e5, 1e5, 0.5)


def device(module: nn.Module) -> Callable[..., Any]:
    """A backend of a device that takes what its profile says, for the whole model or a part of it."""
    segment = module.segment if isinstance(module, Head) else module
    layers = LAYERS if isinstance(module, Net) else len({*segment.steps} & {*GRAPH.flow.layers})

    def run(*args: Any, **kwargs: Any) -> Any:
        time.sleep(LAYER_S * layers)
        return module(*args, **kwargs)

    return run
