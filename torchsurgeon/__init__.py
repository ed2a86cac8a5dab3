"""Split a PyTorch model between a device and a server: trace, cut, profile, and run with the model's own answer."""

from __future__ import annotations

from torchsurgeon import hooks as hooks
from torchsurgeon import meters as meters
from torchsurgeon.adapters import Adapter, opaque, register_adapter
from torchsurgeon.codec import CodecCost, CodecTable
from torchsurgeon.cut import Partition, cut, tail_for
from torchsurgeon.errors import (
    AdaptError,
    BodyTooLargeError,
    CodecError,
    DeadlineError,
    DeviceError,
    InfeasibleError,
    LinkError,
    MeterError,
    ModelFailedError,
    ModelMismatchError,
    ModelNotReadyError,
    ModelNotServedError,
    ModelServingError,
    NativeUnavailableError,
    PartitionError,
    PlanError,
    ProfileError,
    ProtocolError,
    RequestRefusedError,
    ServerError,
    ServerUnavailableError,
    SpecError,
    TorchSurgeonError,
    TraceError,
)
from torchsurgeon.graph import Layer, LayerGraph, PartitionPoint, TensorSpec, UnrepeatableWarning, trace
from torchsurgeon.link import BandwidthTrace, Link, Radio
from torchsurgeon.module import Inference, SplitModule, measure_link
from torchsurgeon.plan import Constraints, Estimate, Frontier, Objective, Row, Terms, best, estimate
from torchsurgeon.profile import LayerEnergy, LayerProfile, NoisyProfileWarning, profile

__version__ = "0.1.0"

__all__ = [
    "AdaptError",
    "Adapter",
    "BandwidthTrace",
    "BodyTooLargeError",
    "CodecCost",
    "CodecError",
    "CodecTable",
    "Constraints",
    "DeadlineError",
    "DeviceError",
    "Estimate",
    "Frontier",
    "InfeasibleError",
    "Inference",
    "Layer",
    "LayerEnergy",
    "LayerGraph",
    "LayerProfile",
    "Link",
    "LinkError",
    "MeterError",
    "ModelFailedError",
    "ModelMismatchError",
    "ModelNotReadyError",
    "ModelNotServedError",
    "ModelServingError",
    "NativeUnavailableError",
    "NoisyProfileWarning",
    "Objective",
    "Partition",
    "PartitionError",
    "PartitionPoint",
    "PlanError",
    "ProfileError",
    "ProtocolError",
    "Radio",
    "RequestRefusedError",
    "Row",
    "ServerError",
    "ServerUnavailableError",
    "SpecError",
    "SplitModule",
    "TensorSpec",
    "Terms",
    "TorchSurgeonError",
    "TraceError",
    "UnrepeatableWarning",
    "best",
    "cut",
    "estimate",
    "measure_link",
    "opaque",
    "profile",
    "register_adapter",
    "tail_for",
    "trace",
]
