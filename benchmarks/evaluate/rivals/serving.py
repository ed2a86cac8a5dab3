"""The server's process of a network: torchsurgeon's server, ordinary inference servers, and tails behind a socket."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import torch
from torch import Tensor

import torchsurgeon as ts
from benchmarks.evaluate.rivals import device_only, server_only, sockets
from benchmarks.evaluate.study import BACKENDS, network
from benchmarks.support.servers import begin
from torchsurgeon.backends import Part
from torchsurgeon.serve import ModelRegistry, Server, create_app


def serve(name: str, core: int | None, told: Any) -> None:
    """Serve a network in every way; send the ports, and then answer whether all tails asked for have been built."""
    begin(core)
    warnings.simplefilter("ignore")
    model, example = network(name)
    registry = ModelRegistry()
    served = registry.add("model", model, (example,), backend=BACKENDS)
    with torch.no_grad():
        graph = ts.trace(model, example)
        ort, bf16 = (_whole(backend, graph, example) for backend in ("onnxruntime", "openvino:bf16"))
    ports = server_only.serve(model, ort, bf16, example.shape) | {"tails": sockets.serve(graph)}
    with Server(create_app(registry), port=0) as server:
        told.send(ports | {"torchsurgeon": server.port})
        while True:
            told.recv()
            builders = served.backends.builders.values()
            told.send(all(built.tried for builder in builders for built in builder.built()))


def _whole(backend: str, graph: ts.LayerGraph, example: Tensor) -> server_only.Network:
    """Return a whole network by a runtime itself, for one caller at a time."""
    given, one = example.clone(), threading.Lock()
    run = device_only.whole_by(backend, Part.head(graph, graph.points[-1]), given)

    def answer(picture: Tensor) -> Tensor:
        with one:
            given.copy_(picture)
            return run()

    return answer
