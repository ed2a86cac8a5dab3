"""What Triton's protocol extensions tell of models: their configuration, and which there are.

After the pages extension_model_configuration and extension_model_repository of Triton's protocol, version 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchsurgeon import wire
from torchsurgeon.serve.batching import batch_dimension
from torchsurgeon.serve.registry import ModelRegistry
from torchsurgeon.serve.served import ServedModel
from torchsurgeon.serve.tails import place_of
from torchsurgeon.tracing.specs import TensorSpec

# The types that a configuration has names for.
_TYPES = frozenset(
    {"BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "BF16", "FP32", "FP64"}
)
_STATES = {"loading": "LOADING", "reloading": "LOADING", "failed": "UNAVAILABLE", "unloaded": "UNAVAILABLE"}


def configuration(served: ServedModel) -> dict[str, Any]:
    """Return the JSON of a model's ``ModelConfig``, as far as this server has what it tells of.

    ``max_batch_size`` is 0, and the dimensions have the batch, where not all inputs and outputs have it first.
    """
    graph, intake = served.graph, served.intake
    first = graph.batch_free and all(batch_dimension(spec) == 0 for spec in (*graph.inputs, *graph.outputs))
    on_cpu = place_of(graph.model).type == "cpu"
    told: dict[str, Any] = {
        "name": served.name,
        "platform": "",
        "backend": "torchsurgeon",
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": served.max_batch if first else 0,
        "input": _tensors(graph.inputs, first),
        "output": _tensors(graph.outputs, first),
        "instance_group": [
            {"name": served.name, "kind": "KIND_CPU" if on_cpu else "KIND_GPU", "count": intake.worker.concurrency}
        ],
        "parameters": {"source": {"string_value": served.source}} if served.source else {},
    }
    if served.together > 1:
        told["dynamic_batching"] = {
            "preferred_batch_size": [served.together],
            "max_queue_delay_microseconds": 0,
            "default_queue_policy": {"max_queue_size": intake.max_queue, "allow_timeout_override": True},
        }
    return told


def index(registry: ModelRegistry, *, ready: bool = False) -> list[dict[str, str]]:
    """Return the entries of all models.

    Args:
        registry: the models.
        ready: whether to leave out those that are not ready.
    """
    found = []
    for name, (model, reason) in sorted(registry.states().items()):
        if isinstance(model, ServedModel):
            found += [{"name": name, "version": one, "state": "READY", "reason": ""} for one in model.versions]
        elif not ready:
            found.append({"name": name, "version": "", "state": _STATES[model], "reason": reason})
    return found


def _tensors(specs: Sequence[TensorSpec], without_batch: bool) -> list[dict[str, Any]]:
    return [
        {
            "name": spec.name,
            "data_type": f"TYPE_{kind}" if (kind := wire.datatype_of(spec.dtype)) in _TYPES else "TYPE_INVALID",
            "dims": list(spec.wire_shape[1:] if without_batch else spec.wire_shape),
        }
        for spec in specs
    ]
